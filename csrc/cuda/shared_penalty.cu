// shared_penalty and shared_assignment on CUDA tensors: checks, allocation, and what the passes are to compute.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "shared_problem.h"

namespace fusefeat::cuda {
namespace {

using std::vector;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shared_penalty(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, OptionalTensor row_weight,
    int64_t operand, bool with_clamp, int64_t keep_rows) {
  const SharedProblem problem(context, input, weight, bias, margin, row_weight, operand);
  const int64_t rows = problem.sizes.rows(), features = problem.sizes.features;
  STD_TORCH_CHECK(keep_rows >= 0 && keep_rows <= rows, "fusefeat: keep_rows must be in [0, N]");
  const auto acc = problem.acc();
  const Tensor row_entropy = new_tensor(input, {rows}, acc), lse = new_tensor(input, {rows}, acc);
  const Tensor prob_sum = new_tensor(input, {features}, acc);
  const Tensor row_excess = new_tensor(input, {with_clamp ? rows : 0}, acc);
  Tensor fired = new_tensor(input, {with_clamp ? features : 0}, ScalarType::Long);
  const Tensor kept = new_tensor(input, keep_rows > 0 ? vector<int64_t>{keep_rows, features} : vector<int64_t>{0}, acc);
  if (rows == 0) zero(prob_sum);
  zero(fired);

  ForwardWishes wishes;
  wishes.row_entropy = &row_entropy;
  wishes.lse = &lse;
  wishes.prob_sum = &prob_sum;
  if (with_clamp) {
    wishes.row_excess = &row_excess;
    wishes.fired = &fired;
  }
  wishes.kept = &kept;
  wishes.kept_rows = keep_rows;
  run_forward(problem, wishes);
  return {row_entropy, lse, prob_sum, row_excess, fired, kept};
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
  check_shared_tensor(input, row_entropy, {rows}, "row_entropy");
  check_shared_tensor(input, lse, {rows}, "lse");
  const int64_t keep_rows = kept.dim() == 2 ? kept.size(0) : 0;
  if (keep_rows > 0) {
    check_shape(kept, {std::min(keep_rows, rows), features}, "kept");
    check_shared_tensor(input, kept, {keep_rows, features}, "kept");
    STD_TORCH_CHECK(
        kept.is_contiguous() && kept.scalar_type() == problem.acc(), "fusefeat: kept must be as the forward left it");
  }

  const SharedGradients grads(context, input, weight, bias, needs);
  const Tensor grad_row_weight = new_gradient(input, row_weight, needs[4]);
  BackwardWishes wishes;
  const bool softmax = grad_row_entropy.has_value() || grad_lse.has_value() || grad_prob_sum.has_value();
  wishes.kind = softmax ? Gradient::penalty : Gradient::clamp;
  wishes.grad_row_entropy = problem.values(grad_row_entropy);
  wishes.grad_lse = problem.values(grad_lse);
  wishes.grad_prob_sum = problem.values(grad_prob_sum);
  wishes.grad_row_excess = problem.values(grad_row_excess);
  wishes.row_entropy = problem.values(row_entropy);
  wishes.lse = problem.values(lse);
  wishes.kept = &kept;
  wishes.kept_rows = keep_rows;
  if (grad_row_weight.numel() > 0) wishes.grad_row_weight = &grad_row_weight;
  grads.wish(wishes);
  run_backward(problem, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias, grad_row_weight};
}

Tensor shared_assignment(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, int64_t operand) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  const Tensor assignment = new_tensor(input, {problem.sizes.rows(), problem.sizes.features}, input.scalar_type());
  ForwardWishes wishes;
  wishes.assignment = &assignment;
  run_forward(problem, wishes);
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
  const SharedGradients grads(context, input, weight, bias, needs);
  BackwardWishes wishes;
  wishes.kind = Gradient::assignment;
  wishes.grad = &grad;
  wishes.assignment = &assignment;
  grads.wish(wishes);
  run_backward(problem, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias};
}

}  // namespace
}  // namespace fusefeat::cuda

STABLE_TORCH_LIBRARY_IMPL(fusefeat, FUSEFEAT_DEVICE_KEY, m) {
  m.impl("shared_penalty", TORCH_BOX(&fusefeat::cuda::shared_penalty));
  m.impl("shared_penalty_backward", TORCH_BOX(&fusefeat::cuda::shared_penalty_backward));
  m.impl("shared_assignment", TORCH_BOX(&fusefeat::cuda::shared_assignment));
  m.impl("shared_assignment_backward", TORCH_BOX(&fusefeat::cuda::shared_assignment_backward));
}
