#include "shared_statistics.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "shared_gradients.h"

namespace fusefeat::cpu {
namespace {

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

// The forward tells the backward whether it rounded logits by the last bit of the first lse, as that is rounded itself:
// one that was beyond the limit may be within it without the rounding of its logits.
void tell_rounding(float* lse, bool rounded) {
  if (!std::isfinite(*lse)) return;
  uint32_t bits;
  std::memcpy(&bits, lse, sizeof bits);
  bits = (bits & ~1u) | (rounded ? 0u : 1u);
  std::memcpy(lse, &bits, sizeof bits);
}

bool was_rounded(const Buffer& lse, int64_t rows) {
  if (rows == 0 || !stand_rounding(lse, 0, rows)) return false;
  uint32_t bits;
  std::memcpy(&bits, lse.get(), sizeof bits);
  return (bits & 1u) == 0;
}

}  // namespace

bool stand_rounding(const Buffer& lse, int64_t begin, int64_t rows) {
  // They are rounded by 1/16 at most then. A softmax does not see what all logits of a row have in common, but their
  // rounding grows with it.
  constexpr float limit = 256;
  const float* values = reinterpret_cast<const float*>(lse.get()) + begin;
  return std::all_of(values, values + rows, [](float value) { return std::abs(value) <= limit; });
}

SharedStatistics shared_statistics(
    const SharedProblem& problem, const Tensor& input, const OptionalTensor& row_weight, bool with_excess,
    bool with_fired, int64_t keep_rows, ScalarType kept_type) {
  const int64_t rows = problem.sizes.rows(), features = problem.sizes.features;
  STD_TORCH_CHECK(keep_rows >= 0 && keep_rows <= rows, "fusefeat: keep_rows must be in [0, N]");
  const auto acc = acc_type(input.scalar_type());
  SharedStatistics found{
      new_tensor(input, {rows}, acc),
      new_tensor(input, {rows}, acc),
      zero_filled(input, {features}, acc),
      new_tensor(input, {with_excess ? rows : 0}, acc),
      zero_filled(input, {with_fired ? features : 0}, ScalarType::Long),
      new_tensor(
          input, keep_rows > 0 ? std::vector<int64_t>{keep_rows, features} : std::vector<int64_t>{0}, kept_type)};
  const int64_t kept_rows = problem.kept_rows(keep_rows);
  advise_huge_pages(found.kept.mutable_data_ptr(), found.kept.numel() * found.kept.element_size(), 4 << 20);
  if (kept_rows < keep_rows) torch::stable::zero_(found.kept);

  const Buffer weights = problem.gather(row_weight, 1, 1);
  Buffer entropies = problem.gather(std::nullopt, 0, 1), lses = problem.gather(std::nullopt, 0, 1);
  Buffer excesses = with_excess ? problem.gather(std::nullopt, 0, 1) : Buffer(0);
  ForwardWishes wishes;
  wishes.row_entropy = &entropies;
  wishes.lse = &lses;
  wishes.row_weight = &weights;
  wishes.prob_sum = found.prob_sum.mutable_data_ptr();
  if (with_excess) wishes.row_excess = &excesses;
  if (with_fired) wishes.fired = static_cast<int64_t*>(found.fired.mutable_data_ptr());
  wishes.kept = found.kept.mutable_data_ptr();
  wishes.kept_type = scalar_of(kept_type);
  wishes.kept_rows = kept_rows;
  wishes.kept_bytes = found.kept.numel() * static_cast<int64_t>(found.kept.element_size());
  const bool rounded = run_forward(problem, wishes);
  if (!rounded) {
    torch::stable::zero_(found.prob_sum);
    if (keep_rows > 0) torch::stable::zero_(found.kept);
    wishes.kept = nullptr;
    wishes.kept_type = problem.is_double ? Scalar::f64 : Scalar::f32;
    wishes.kept_rows = 0;
    run_forward(problem, wishes);
  }
  if (kept_type == ScalarType::Half && rows > 0) tell_rounding(reinterpret_cast<float*>(lses.get()), rounded);
  problem.scatter(entropies, found.row_entropy);
  problem.scatter(lses, found.lse);
  if (with_excess) problem.scatter(excesses, found.row_excess);
  return found;
}

void shared_statistics_backward(
    const SharedProblem& problem, StatisticsGradients incoming, const Tensor& input, const OptionalTensor& row_weight,
    const Tensor& row_entropy, const Tensor& lse, const Tensor& kept, Buffer& row_dots, BackwardWishes& wishes) {
  const int64_t rows = problem.sizes.rows();
  check_shared_tensor(input, row_entropy, {rows}, "row_entropy");
  check_shared_tensor(input, lse, {rows}, "lse");
  const int64_t keep_rows = kept.dim() == 2 ? kept.size(0) : 0;
  if (keep_rows > 0) {
    check_shape(kept, {std::min(keep_rows, rows), problem.sizes.features}, "kept");
    const auto type = kept.scalar_type();
    STD_TORCH_CHECK(
        kept.is_contiguous() && (type == acc_type(input.scalar_type()) ||
                                 (type == ScalarType::Half && input.scalar_type() == ScalarType::BFloat16)),
        "fusefeat: kept must be as the forward left it");
  }
  const bool with_dots = incoming.prob_sum.has_value() || incoming.row_entropy.has_value();
  const bool softmax = with_dots || incoming.lse.has_value();
  const auto zeros = [&] { return problem.gather(std::nullopt, 0, 1); };
  const auto or_zeros = [&](std::optional<Buffer>& given) { return given.has_value() ? std::move(*given) : zeros(); };
  const Buffer entropies = problem.gather(row_entropy, 0, 1);
  const Buffer lses = problem.gather(lse, 0, 1);
  const Buffer prob_scale = problem.gather(row_weight, 1, problem.logits.margin);
  Buffer lse_grads = or_zeros(incoming.lse), log_scale = zeros(), offset = zeros();
  if (incoming.row_entropy.has_value()) {
    (problem.is_double ? entropy_terms<double> : entropy_terms<float>)(problem.logits.rows, *incoming.row_entropy,
                                                                       entropies, log_scale, offset);
  }
  const bool with_excess = incoming.row_excess.has_value() || !softmax;
  const Buffer excess_grads = with_excess ? or_zeros(incoming.row_excess) : Buffer(0);
  wishes.kind = softmax ? Gradient::penalty : Gradient::clamp;
  wishes.lse = &lses;
  wishes.log_scale = &log_scale;
  wishes.prob_scale = &prob_scale;
  wishes.offset = with_dots ? &offset : &lse_grads;
  wishes.grad_prob_sum = incoming.prob_sum.has_value() ? incoming.prob_sum->get() : nullptr;
  if (with_excess) wishes.excess_grad = &excess_grads;
  if (with_dots) {
    wishes.mean = &lse_grads;
    wishes.row_dot = &row_dots;
  }
  wishes.kept_bytes = kept.numel() * static_cast<int64_t>(kept.element_size());
  const bool half = kept.scalar_type() == ScalarType::Half && input.scalar_type() == ScalarType::BFloat16;
  if (!half || was_rounded(lses, problem.logits.rows)) {
    wishes.kept = kept.const_data_ptr();
    wishes.kept_type = scalar_of(kept.scalar_type());
    wishes.kept_rows = problem.kept_rows(keep_rows);
  }
  run_backward(problem, wishes);
}

}  // namespace fusefeat::cpu
