// How the shared-logits operators run: chunks of rows, each in phases over all threads. The partition follows from
// the shape alone, so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/shared_logits.h"
#include "memory.h"
#include "shared_logits.h"

namespace fusefeat::cpu {

Scalar scalar_of(ScalarType type);
Matrix matrix_of(const Tensor& tensor);

// One call's rows, weight and bias, the rows that take part, and the kernels to use.
class SharedProblem {
 public:
  SharedProblem(
      const OptionalTensor& context, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
      double margin, const OptionalTensor& row_weight, int64_t operand);

  SharedSizes sizes;
  bool is_double;
  const SharedKernels* kernels;
  Logits logits{};

  int64_t acc_bytes() const { return is_double ? 8 : 4; }
  int64_t padded_rows() const { return (logits.rows + 63) / 64 * 64; }
  // Rows of logits that fit a tensor of `keep_rows` rows and can be found there again.
  int64_t kept_rows(int64_t keep_rows) const;

  // A [N] tensor (or 1 everywhere, or 0) to acc, those rows that take part, padded with zeros.
  Buffer gather(const OptionalTensor& tensor, double otherwise, double scale) const;
  // And back; rows that do not take part get 0.
  void scatter(const Buffer& from, const Tensor& to) const;
  // A contiguous [F] tensor in acc.
  Buffer feature_values(const Tensor& tensor) const;

 private:
  std::vector<int64_t> used_;
  Buffer bias_{0};
};

// What a forward wants; null where it does not.
struct ForwardWishes {
  Buffer *row_entropy = nullptr, *lse = nullptr, *row_excess = nullptr;
  const Buffer* row_weight = nullptr;  // with row_entropy: of prob_sum
  void* prob_sum = nullptr;
  int64_t* fired = nullptr;
  void* kept = nullptr;
  Scalar kept_type = Scalar::f32;  // f16: all logits are rounded to it
  int64_t kept_rows = 0;
  int64_t kept_bytes = 0;  // of the memory for kept logits, used or not
  const Tensor* matrix = nullptr;
  bool softmax = false;  // what the matrix is: probabilities, or clamped logits
};

// Whether all is as wished: rows whose logits float16 may not hold end a forward that rounds them.
bool run_forward(const SharedProblem& problem, const ForwardWishes& wishes);

struct BackwardWishes {
  Gradient kind;
  const Buffer *lse = nullptr, *log_scale = nullptr, *prob_scale = nullptr, *excess_grad = nullptr, *offset = nullptr;
  Buffer *mean = nullptr, *row_dot = nullptr;  // only when dots are needed
  const void* grad_prob_sum = nullptr;
  const Tensor *grad = nullptr, *assignment = nullptr;
  const void* kept = nullptr;
  Scalar kept_type = Scalar::f32;
  int64_t kept_rows = 0;
  int64_t kept_bytes = 0;  // of all kept logits, those that are of no use included
  // Outputs, or null.
  const Tensor *grad_context = nullptr, *grad_input = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;
};

void run_backward(const SharedProblem& problem, const BackwardWishes& wishes);

}  // namespace fusefeat::cpu
