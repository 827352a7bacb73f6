// What the CPU and CUDA launchers of the shared-logits operators share: argument checks and sizes.
#pragma once

#include <vector>

#include "attention_pool.h"

namespace fusefeat {

struct SharedSizes {
  int64_t context_rows = 0;
  int64_t input_rows = 0;
  int64_t channels = 0;
  int64_t features = 0;

  int64_t rows() const { return context_rows + input_rows; }
};

using OptionalTensor = std::optional<Tensor>;

// Types may differ, as they do under autocast, but double goes with double only.
inline void check_shared_type(const Tensor& input, const Tensor& other, const char* name) {
  const auto type = other.scalar_type();
  STD_TORCH_CHECK(
      is_floating(type) && (type == ScalarType::Double) == (input.scalar_type() == ScalarType::Double),
      "fusefeat: ", name, " must be floating point, and float64 exactly when input is");
  check_same_device(input, other, name);
}

inline SharedSizes shared_sizes(
    const OptionalTensor& context, const Tensor& input, const Tensor& weight, const OptionalTensor& bias, double margin,
    const OptionalTensor& row_weight, int64_t operand) {
  STD_TORCH_CHECK(is_floating(input.scalar_type()) && input.dim() == 2, "fusefeat: input must be [N,D] floating point");
  SharedSizes sizes;
  sizes.input_rows = input.size(0);
  sizes.channels = input.size(1);
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(1) == sizes.channels, "fusefeat: weight must be [F,D] with the D of input");
  check_shared_type(input, weight, "weight");
  sizes.features = weight.size(0);
  STD_TORCH_CHECK(sizes.features > 0, "fusefeat: weight must have at least one row");
  if (context.has_value()) {
    STD_TORCH_CHECK(
        context->dim() == 2 && context->size(1) == sizes.channels,
        "fusefeat: context must be [Nc,D] with the D of input");
    check_shared_type(input, *context, "context");
    sizes.context_rows = context->size(0);
  }
  if (bias.has_value()) {
    check_shape(*bias, {sizes.features}, "bias");
    check_shared_type(input, *bias, "bias");
  }
  if (row_weight.has_value()) {
    check_shape(*row_weight, {sizes.rows()}, "row_weight");
    check_shared_type(input, *row_weight, "row_weight");
  }
  STD_TORCH_CHECK(margin > 0 && margin <= 1e30, "fusefeat: margin must be positive and finite");
  STD_TORCH_CHECK(operand >= 0 && operand <= 2, "fusefeat: operand must be 0, 1 or 2");
  return sizes;
}

// An incoming gradient or a saved result.
inline void check_shared_tensor(
    const Tensor& input, const OptionalTensor& tensor, const std::vector<int64_t>& shape, const char* name) {
  if (!tensor.has_value()) return;
  check_shape(*tensor, shape, name);
  check_shared_type(input, *tensor, name);
}

// A gradient for `tensor`: contiguous, or empty when nobody asks for it.
inline Tensor new_gradient(const Tensor& input, const OptionalTensor& tensor, bool need) {
  if (!need || !tensor.has_value())
    return new_tensor(tensor.value_or(input), {0}, tensor.value_or(input).scalar_type());
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < tensor->dim(); ++i) shape.push_back(tensor->size(i));
  return new_tensor(*tensor, shape, tensor->scalar_type());
}

}  // namespace fusefeat
