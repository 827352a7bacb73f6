// shared_penalty and shared_assignment on the CPU: checks, allocation, and what the phases are to compute.
#include <torch/csrc/stable/library.h>

#include <algorithm>
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

constexpr double kNone = 0;  // what stands for an incoming gradient that is not there

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shared_penalty(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, OptionalTensor row_weight,
    int64_t operand, bool with_clamp, int64_t keep_rows) {
  const SharedProblem problem(context, input, weight, bias, margin, row_weight, operand);
  const int64_t rows = problem.sizes.rows(), features = problem.sizes.features;
  STD_TORCH_CHECK(keep_rows >= 0 && keep_rows <= rows, "fusefeat: keep_rows must be in [0, N]");
  const auto acc = acc_type(input.scalar_type());
  Tensor row_entropy = new_tensor(input, {rows}, acc), lse = new_tensor(input, {rows}, acc);
  Tensor prob_sum = cpu::zero_filled(input, {features}, acc);
  Tensor row_excess = new_tensor(input, {with_clamp ? rows : 0}, acc);
  Tensor fired = cpu::zero_filled(input, {with_clamp ? features : 0}, ScalarType::Long);
  Tensor kept = new_tensor(input, keep_rows > 0 ? vector<int64_t>{keep_rows, features} : vector<int64_t>{0}, acc);
  const int64_t kept_rows = problem.kept_rows(keep_rows);
  cpu::advise_huge_pages(kept.mutable_data_ptr(), kept.numel() * problem.acc_bytes(), 4 << 20);
  if (kept_rows < keep_rows) torch::stable::zero_(kept);

  const Buffer weights = problem.gather(row_weight, 1, 1);
  Buffer entropies = problem.gather(std::nullopt, 0, 1), lses = problem.gather(std::nullopt, 0, 1);
  Buffer excesses = with_clamp ? problem.gather(std::nullopt, 0, 1) : Buffer(0);
  ForwardWishes wishes;
  wishes.row_entropy = &entropies;
  wishes.lse = &lses;
  wishes.row_weight = &weights;
  wishes.prob_sum = prob_sum.mutable_data_ptr();
  if (with_clamp) {
    wishes.row_excess = &excesses;
    wishes.fired = static_cast<int64_t*>(fired.mutable_data_ptr());
  }
  wishes.kept = kept.mutable_data_ptr();
  wishes.kept_rows = kept_rows;
  cpu::run_forward(problem, wishes);
  problem.scatter(entropies, row_entropy);
  problem.scatter(lses, lse);
  if (with_clamp) problem.scatter(excesses, row_excess);
  return {row_entropy, lse, prob_sum, row_excess, fired, kept};
}

// log_scale and offset of the formula in shared_logits.h. The mean that is taken away later is small then.
template <typename A>
void entropy_terms(int64_t rows, const Buffer& entropy_grad, const Buffer& entropy, Buffer& log_scale, Buffer& offset) {
  const A* grad = reinterpret_cast<const A*>(entropy_grad.get());
  const A* values = reinterpret_cast<const A*>(entropy.get());
  A* scales = reinterpret_cast<A*>(log_scale.get());
  A* offsets = reinterpret_cast<A*>(offset.get());
  for (int64_t i = 0; i < rows; ++i) {
    scales[i] = -grad[i];
    offsets[i] = -grad[i] * values[i];
  }
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
    STD_TORCH_CHECK(
        kept.is_contiguous() && kept.scalar_type() == acc_type(input.scalar_type()),
        "fusefeat: kept must be as the forward left it");
  }

  const bool with_dots = grad_prob_sum.has_value() || grad_row_entropy.has_value();
  const bool softmax = with_dots || grad_lse.has_value();
  const Buffer entropy_grads = problem.gather(grad_row_entropy, kNone, margin);
  Buffer lse_grads = problem.gather(grad_lse, kNone, margin);
  const Buffer entropies = problem.gather(row_entropy, 0, 1), lses = problem.gather(lse, 0, 1);
  const Buffer prob_scale = problem.gather(row_weight, 1, margin);
  const Buffer excess_grads = problem.gather(grad_row_excess, kNone, margin);
  const Buffer prob_grads = grad_prob_sum.has_value() ? problem.feature_values(*grad_prob_sum) : Buffer(0);
  Buffer log_scale = problem.gather(std::nullopt, 0, 1), offset = problem.gather(std::nullopt, 0, 1);
  Buffer row_dots = problem.gather(std::nullopt, 0, 1);
  (problem.is_double ? entropy_terms<double> : entropy_terms<float>)(problem.logits.rows, entropy_grads, entropies,
                                                                     log_scale, offset);

  const SharedGradients grads(problem, context, input, weight, bias, needs);
  Tensor grad_row_weight = new_gradient(input, row_weight, needs[4]);
  BackwardWishes wishes;
  wishes.kind = softmax ? cpu::Gradient::penalty : cpu::Gradient::clamp;
  wishes.lse = &lses;
  wishes.log_scale = &log_scale;
  wishes.prob_scale = &prob_scale;
  wishes.offset = with_dots ? &offset : &lse_grads;
  wishes.lse_grad = &lse_grads;
  wishes.grad_prob_sum = prob_grads.get();
  if (grad_row_excess.has_value() || !softmax) wishes.excess_grad = &excess_grads;
  if (with_dots) wishes.row_dot = &row_dots;
  wishes.kept = kept.const_data_ptr();
  wishes.kept_rows = problem.kept_rows(keep_rows);
  grads.wish(wishes, context, bias, needs);
  cpu::run_backward(problem, wishes);
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
  Buffer offset = problem.gather(std::nullopt, 0, 1), row_dots = problem.gather(std::nullopt, 0, 1);
  BackwardWishes wishes;
  wishes.kind = cpu::Gradient::assignment;
  wishes.prob_scale = &scale;
  wishes.offset = &offset;
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
