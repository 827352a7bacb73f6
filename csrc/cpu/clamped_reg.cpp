// clamped_reg and clamped_activation on the CPU: checks, allocation, and what the phases are to compute.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "shared_gradients.h"

namespace fusefeat {
namespace {

using cpu::BackwardWishes;
using cpu::Buffer;
using cpu::ForwardWishes;
using cpu::SharedGradients;
using cpu::SharedProblem;
using std::vector;

std::tuple<Tensor, Tensor> clamped_reg(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, OptionalTensor row_weight,
    int64_t operand) {
  const SharedProblem problem(context, input, weight, bias, margin, row_weight, operand);
  Tensor row_excess = new_tensor(input, {problem.sizes.rows()}, acc_type(input.scalar_type()));
  Tensor fired = cpu::zero_filled(input, {problem.sizes.features}, ScalarType::Long);
  Buffer excesses = problem.gather(std::nullopt, 0, 1);
  ForwardWishes wishes;
  wishes.row_excess = &excesses;
  wishes.fired = static_cast<int64_t*>(fired.mutable_data_ptr());
  cpu::run_forward(problem, wishes);
  problem.scatter(excesses, row_excess);
  return {row_excess, fired};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clamped_reg_backward(
    Tensor grad_row_excess, OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin,
    OptionalTensor row_weight, int64_t operand, vector<bool> needs) {
  const SharedProblem problem(context, input, weight, bias, margin, row_weight, operand);
  STD_TORCH_CHECK(needs.size() == 4, "fusefeat: needs must have 4 entries");
  check_shared_tensor(input, grad_row_excess, {problem.sizes.rows()}, "grad_row_excess");
  const SharedGradients grads(problem, context, input, weight, bias, needs);
  const Buffer excess_grads = problem.gather(grad_row_excess, 0, margin);
  BackwardWishes wishes;
  wishes.kind = cpu::Gradient::clamp;
  wishes.excess_grad = &excess_grads;
  grads.wish(wishes, context, bias, needs);
  cpu::run_backward(problem, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias};
}

Tensor clamped_activation(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, int64_t operand) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  Tensor activation = new_tensor(input, {problem.sizes.rows(), problem.sizes.features}, input.scalar_type());
  cpu::advise_huge_pages(activation.mutable_data_ptr(), activation.numel() * activation.element_size());
  ForwardWishes wishes;
  wishes.matrix = &activation;
  cpu::run_forward(problem, wishes);
  return activation;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clamped_activation_backward(
    Tensor grad, OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin,
    int64_t operand, vector<bool> needs) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  STD_TORCH_CHECK(needs.size() == 4, "fusefeat: needs must have 4 entries");
  check_shared_tensor(input, grad, {problem.sizes.rows(), problem.sizes.features}, "grad");
  const SharedGradients grads(problem, context, input, weight, bias, needs);
  BackwardWishes wishes;
  wishes.kind = cpu::Gradient::activation;
  wishes.grad = &grad;
  grads.wish(wishes, context, bias, needs);
  cpu::run_backward(problem, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias};
}

}  // namespace
}  // namespace fusefeat

STABLE_TORCH_LIBRARY_IMPL(fusefeat, CPU, m) {
  m.impl("clamped_reg", TORCH_BOX(&fusefeat::clamped_reg));
  m.impl("clamped_reg_backward", TORCH_BOX(&fusefeat::clamped_reg_backward));
  m.impl("clamped_activation", TORCH_BOX(&fusefeat::clamped_activation));
  m.impl("clamped_activation_backward", TORCH_BOX(&fusefeat::clamped_activation_backward));
}
