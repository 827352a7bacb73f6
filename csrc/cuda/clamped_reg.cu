// clamped_reg and clamped_activation on CUDA tensors: checks, allocation, and what the passes are to compute.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "shared_problem.h"

namespace fusefeat::cuda {
namespace {

using std::vector;

std::tuple<Tensor, Tensor> clamped_reg(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, OptionalTensor row_weight,
    int64_t operand) {
  const SharedProblem problem(context, input, weight, bias, margin, row_weight, operand);
  const Tensor row_excess = new_tensor(input, {problem.sizes.rows()}, problem.acc());
  const Tensor fired = new_tensor(input, {problem.sizes.features}, ScalarType::Long);
  zero(fired);
  ForwardWishes wishes;
  wishes.row_excess = &row_excess;
  wishes.fired = &fired;
  run_forward(problem, wishes);
  return {row_excess, fired};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clamped_reg_backward(
    Tensor grad_row_excess, OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin,
    OptionalTensor row_weight, int64_t operand, vector<bool> needs) {
  const SharedProblem problem(context, input, weight, bias, margin, row_weight, operand);
  STD_TORCH_CHECK(needs.size() == 4, "fusefeat: needs must have 4 entries");
  check_shared_tensor(input, grad_row_excess, {problem.sizes.rows()}, "grad_row_excess");
  const SharedGradients grads(context, input, weight, bias, needs);
  BackwardWishes wishes;
  wishes.kind = Gradient::clamp;
  wishes.grad_row_excess = problem.values(grad_row_excess);
  grads.wish(wishes);
  run_backward(problem, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias};
}

Tensor clamped_activation(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, int64_t operand) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  const int64_t rows = problem.sizes.rows(), features = problem.sizes.features;
  const Tensor activation = new_tensor(input, {rows, features}, input.scalar_type());
  LogitsArgs args = problem.logits({0, rows, features}, nullptr, 0);
  args.matrix = activation.mutable_data_ptr();
  args.matrix_type = scalar_of(activation.scalar_type());
  launch_logits(problem.products, args, problem.stream());
  check_launch("the clamped activation");
  return activation;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clamped_activation_backward(
    Tensor grad, OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin,
    int64_t operand, vector<bool> needs) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  STD_TORCH_CHECK(needs.size() == 4, "fusefeat: needs must have 4 entries");
  check_shared_tensor(input, grad, {problem.sizes.rows(), problem.sizes.features}, "grad");
  const SharedGradients grads(context, input, weight, bias, needs);
  BackwardWishes wishes;
  wishes.kind = Gradient::activation;
  wishes.grad = &grad;
  grads.wish(wishes);
  run_backward(problem, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias};
}

}  // namespace
}  // namespace fusefeat::cuda

STABLE_TORCH_LIBRARY_IMPL(fusefeat, FUSEFEAT_DEVICE_KEY, m) {
  m.impl("clamped_reg", TORCH_BOX(&fusefeat::cuda::clamped_reg));
  m.impl("clamped_reg_backward", TORCH_BOX(&fusefeat::cuda::clamped_reg_backward));
  m.impl("clamped_activation", TORCH_BOX(&fusefeat::cuda::clamped_activation));
  m.impl("clamped_activation_backward", TORCH_BOX(&fusefeat::cuda::clamped_activation_backward));
}
