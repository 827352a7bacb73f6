// shared_penalty and shared_assignment on the CPU: checks, allocation, and what the phases are to compute.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "shared_gradients.h"
#include "shared_statistics.h"

namespace fusefeat {
namespace {

using cpu::BackwardWishes;
using cpu::Buffer;
using cpu::ForwardWishes;
using cpu::SharedGradients;
using cpu::SharedProblem;
using std::vector;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shared_penalty(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, OptionalTensor row_weight,
    int64_t operand, bool with_clamp, int64_t keep_rows) {
  const SharedProblem problem(context, input, weight, bias, margin, row_weight, operand);
  const auto kept_type = acc_type(input.scalar_type());
  const auto found = cpu::shared_statistics(problem, input, row_weight, with_clamp, with_clamp, keep_rows, kept_type);
  return {found.row_entropy, found.lse, found.prob_sum, found.row_excess, found.fired, found.kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shared_penalty_backward(
    OptionalTensor grad_row_entropy, OptionalTensor grad_lse, OptionalTensor grad_prob_sum,
    OptionalTensor grad_row_excess, OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias,
    double margin, OptionalTensor row_weight, int64_t operand, Tensor row_entropy, Tensor lse, Tensor kept,
    vector<bool> needs) {
  const SharedProblem problem(context, input, weight, bias, margin, row_weight, operand);
  const int64_t rows = problem.sizes.rows(), features = problem.sizes.features;
  STD_TORCH_CHECK(needs.size() == 5, "fusefeat: needs must have 5 entries");
  check_shared_tensor(input, grad_row_entropy, {rows}, "grad_row_entropy");
  check_shared_tensor(input, grad_lse, {rows}, "grad_lse");
  check_shared_tensor(input, grad_prob_sum, {features}, "grad_prob_sum");
  check_shared_tensor(input, grad_row_excess, {rows}, "grad_row_excess");

  cpu::StatisticsGradients incoming;
  if (grad_row_entropy.has_value()) incoming.row_entropy = problem.gather(grad_row_entropy, 0, margin);
  if (grad_lse.has_value()) incoming.lse = problem.gather(grad_lse, 0, margin);
  if (grad_prob_sum.has_value()) incoming.prob_sum = problem.feature_values(*grad_prob_sum);
  if (grad_row_excess.has_value()) incoming.row_excess = problem.gather(grad_row_excess, 0, margin);
  const SharedGradients grads(problem, context, input, weight, bias, needs);
  Tensor grad_row_weight = new_gradient(input, row_weight, needs[4]);
  Buffer row_dots = problem.gather(std::nullopt, 0, 1);
  BackwardWishes wishes;
  grads.wish(wishes, context, bias, needs);
  cpu::shared_statistics_backward(
      problem, std::move(incoming), input, row_weight, row_entropy, lse, kept, row_dots, wishes);
  if (grad_row_weight.numel() > 0) problem.scatter(row_dots, grad_row_weight);
  return {grads.context, grads.input, grads.weight, grads.bias, grad_row_weight};
}

Tensor shared_assignment(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, int64_t operand) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  Tensor assignment = new_tensor(input, {problem.sizes.rows(), problem.sizes.features}, input.scalar_type());
  cpu::advise_huge_pages(assignment.mutable_data_ptr(), assignment.numel() * assignment.element_size());
  const Buffer weights = problem.gather(std::nullopt, 1, 1);
  Buffer entropies = problem.gather(std::nullopt, 0, 1), lses = problem.gather(std::nullopt, 0, 1);
  ForwardWishes wishes;
  wishes.row_entropy = &entropies;
  wishes.lse = &lses;
  wishes.row_weight = &weights;
  wishes.matrix = &assignment;
  wishes.softmax = true;
  cpu::run_forward(problem, wishes);
  return assignment;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shared_assignment_backward(
    Tensor grad, OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin,
    int64_t operand, Tensor assignment, vector<bool> needs) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  const vector<int64_t> shape{problem.sizes.rows(), problem.sizes.features};
  STD_TORCH_CHECK(needs.size() == 4, "fusefeat: needs must have 4 entries");
  check_shared_tensor(input, grad, shape, "grad");
  check_shared_tensor(input, assignment, shape, "assignment");
  const SharedGradients grads(problem, context, input, weight, bias, needs);
  const Buffer scale = problem.gather(std::nullopt, 1, margin);
  Buffer row_dots = problem.gather(std::nullopt, 0, 1);
  BackwardWishes wishes;
  wishes.kind = cpu::Gradient::assignment;
  wishes.prob_scale = &scale;
  wishes.row_dot = &row_dots;
  wishes.grad = &grad;
  wishes.assignment = &assignment;
  grads.wish(wishes, context, bias, needs);
  cpu::run_backward(problem, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias};
}

}  // namespace
}  // namespace fusefeat

STABLE_TORCH_LIBRARY_IMPL(fusefeat, CPU, m) {
  m.impl("shared_penalty", TORCH_BOX(&fusefeat::shared_penalty));
  m.impl("shared_penalty_backward", TORCH_BOX(&fusefeat::shared_penalty_backward));
  m.impl("shared_assignment", TORCH_BOX(&fusefeat::shared_assignment));
  m.impl("shared_assignment_backward", TORCH_BOX(&fusefeat::shared_assignment_backward));
}
