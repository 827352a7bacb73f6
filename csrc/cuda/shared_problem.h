// One call of a shared-logits operator: its tensors as the kernels see them, and the forward and backward passes over
// chunks of rows. How rows are cut follows from the shape alone.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/shared_logits.h"
#include "device_scope.h"
#include "shared_logits.h"

namespace fusefeat::cuda {

Scalar scalar_of(ScalarType type);
Matrix matrix_of(const Tensor& tensor);

class SharedProblem {
 public:
  SharedProblem(
      const OptionalTensor& context, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
      double margin, const OptionalTensor& row_weight, int64_t operand);

  SharedSizes sizes;
  bool is_double;
  double margin;
  Products products;

  cudaStream_t stream() const { return device_.stream(); }
  ScalarType acc() const { return is_double ? ScalarType::Double : ScalarType::Float; }
  int64_t acc_bytes() const { return is_double ? 8 : 4; }
  Tensor scratch(int64_t count) const { return new_tensor(input_, {count}, acc()); }
  Tensor scratch_bytes(int64_t count) const { return new_tensor(input_, {count}, ScalarType::Byte); }

  // Rows [begin, begin + count) of (context | input).
  RowMatrix rows(int64_t begin, int64_t count) const;
  RowMatrix weight() const;
  const void* row_weight() const { return pointer(row_weight_); }
  // Logits of a chunk, to acc [rows][stride].
  LogitsArgs logits(const Chunk& chunk, void* z, int64_t stride) const;

  // Elements between rows of logits in scratch: whole vectors, whatever reads them.
  int64_t stride() const { return (sizes.features + 7) / 8 * 8; }
  // How many rows' logits are in scratch at one time: fewer where others are kept, within the same bound.
  int64_t chunk_rows(int64_t kept_rows) const;
  // The rows from `begin` on that are taken at one time; all of them or none are kept, which the first rows are.
  Chunk chunk(int64_t begin, int64_t kept_rows) const;

  // A vector as acc, its elements next to each other.
  OptionalTensor values(const OptionalTensor& tensor) const;
  static const void* pointer(const OptionalTensor& tensor) {
    return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
  }

 private:
  DeviceScope device_;
  Tensor input_;
  Matrix context_matrix_, input_matrix_, weight_matrix_;
  int operand_;
  OptionalTensor bias_, row_weight_;
};

// What a forward wants; null where it does not.
struct ForwardWishes {
  const Tensor *row_entropy = nullptr, *lse = nullptr, *row_excess = nullptr;
  const Tensor *prob_sum = nullptr, *fired = nullptr;  // fired: zeros
  const Tensor* kept = nullptr;
  int64_t kept_rows = 0;
  const Tensor* assignment = nullptr;  // [N, F]
};

void run_forward(const SharedProblem& problem, const ForwardWishes& wishes);

struct BackwardWishes {
  Gradient kind = Gradient::penalty;
  // Vectors as acc.
  OptionalTensor grad_row_entropy, grad_lse, grad_prob_sum, grad_row_excess, row_entropy, lse;
  const Tensor *grad = nullptr, *assignment = nullptr;
  const Tensor* kept = nullptr;
  int64_t kept_rows = 0;
  // Outputs, or null.
  const Tensor *grad_context = nullptr, *grad_input = nullptr, *grad_weight = nullptr, *grad_bias = nullptr,
               *grad_row_weight = nullptr;
};

void run_backward(const SharedProblem& problem, const BackwardWishes& wishes);

// Gradients of context, input, weight and bias.
struct SharedGradients {
  Tensor context, input, weight, bias;

  SharedGradients(
      const OptionalTensor& context_in, const Tensor& input_in, const Tensor& weight_in, const OptionalTensor& bias_in,
      const std::vector<bool>& needs)
      : context(new_gradient(input_in, context_in, needs[0])),
        input(new_gradient(input_in, input_in, needs[1])),
        weight(new_gradient(input_in, weight_in, needs[2])),
        bias(new_gradient(input_in, bias_in, needs[3])) {}

  void wish(BackwardWishes& wishes) const {
    const auto wanted = [](const Tensor& tensor) { return tensor.numel() > 0 ? &tensor : nullptr; };
    wishes.grad_context = wanted(context);
    wishes.grad_input = wanted(input);
    wishes.grad_weight = wanted(weight);
    wishes.grad_bias = wanted(bias);
  }
};

inline void zero(Tensor tensor) {
  torch::stable::zero_(tensor);
}

template <typename Body>
void with_acc(const SharedProblem& problem, const Body& body) {
  problem.is_double ? body(double()) : body(float());
}

inline unsigned blocks_for(int64_t items, int64_t each) {
  return static_cast<unsigned>((items + each - 1) / each);
}

}  // namespace fusefeat::cuda
