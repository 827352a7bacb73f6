// Output tensors of the shared-logits operators.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "shared_phases.h"

namespace fusefeat::cpu {

inline Tensor zero_filled(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  Tensor tensor = new_tensor(like, shape, type);
  torch::stable::zero_(tensor);
  return tensor;
}

// Gradients of context, input, weight and bias; zeros where rows do not take part.
struct SharedGradients {
  Tensor context, input, weight, bias;

  SharedGradients(
      const SharedProblem& problem, const OptionalTensor& context_in, const Tensor& input_in, const Tensor& weight_in,
      const OptionalTensor& bias_in, const std::vector<bool>& needs)
      : context(new_gradient(input_in, context_in, needs[0])),
        input(new_gradient(input_in, input_in, needs[1])),
        weight(new_gradient(input_in, weight_in, needs[2])),
        bias(new_gradient(input_in, bias_in, needs[3])) {
    if (problem.logits.used != nullptr) {
      torch::stable::zero_(context);
      torch::stable::zero_(input);
    }
    if (problem.logits.rows == 0) {
      torch::stable::zero_(weight);
      torch::stable::zero_(bias);
    }
  }

  void wish(
      BackwardWishes& wishes, const OptionalTensor& context_in, const OptionalTensor& bias_in,
      const std::vector<bool>& needs) const {
    if (needs[0] && context_in.has_value()) wishes.grad_context = &context;
    if (needs[1]) wishes.grad_input = &input;
    if (needs[2]) wishes.grad_weight = &weight;
    if (needs[3] && bias_in.has_value()) wishes.grad_bias = &bias;
  }
};

}  // namespace fusefeat::cpu
