// shared_loss and clamped_loss on the CPU: penalty and regulariser of unweighted rows as finished scalars, one call
// forward and one backward. At small sizes dozens of operators on F numbers would cost more than the kernels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>

#include "shared_gradients.h"
#include "shared_statistics.h"

namespace fusefeat {
namespace {

using cpu::BackwardWishes;
using cpu::Buffer;
using cpu::SharedGradients;
using cpu::SharedProblem;
using std::vector;

// Calls f with a value of the accumulation type.
template <typename F>
auto with_acc(bool is_double, const F& f) {
  return is_double ? f(double{}) : f(float{});
}

double sum_of(bool is_double, const void* data, int64_t length) {
  return with_acc(is_double, [&](auto zero) {
    const auto* values = static_cast<const decltype(zero)*>(data);
    double sum = 0;
    for (int64_t i = 0; i < length; ++i) sum += static_cast<double>(values[i]);
    return sum;
  });
}

Tensor scalar(const Tensor& like, double value) {
  Tensor result = new_tensor(like, {}, acc_type(like.scalar_type()));
  with_acc(like.scalar_type() == ScalarType::Double, [&](auto zero) {
    *static_cast<decltype(zero)*>(result.mutable_data_ptr()) = static_cast<decltype(zero)>(value);
  });
  return result;
}

double value_of(const Tensor& input, const Tensor& grad, const char* name) {
  check_shape(grad, {}, name);
  STD_TORCH_CHECK(
      grad.scalar_type() == acc_type(input.scalar_type()), "fusefeat: ", name, " must be in the accumulation type");
  return sum_of(grad.scalar_type() == ScalarType::Double, grad.const_data_ptr(), 1);
}

// KL(mean assignment || uniform) from the sums over rows; 0 log 0 = 0, a NaN stays.
double divergence(bool is_double, const void* prob_sum, int64_t rows, int64_t features) {
  return with_acc(is_double, [&](auto zero) {
    const auto* sums = static_cast<const decltype(zero)*>(prob_sum);
    double sum = 0;
    for (int64_t k = 0; k < features; ++k) {
      const double p = static_cast<double>(sums[k]) / static_cast<double>(rows);
      if (!(p <= 0)) sum += p * std::log(p * static_cast<double>(features));
    }
    return sum;
  });
}

// Its gradient for the mean, times `scale`, but for a constant: the softmax does not see it.
Buffer divergence_gradient(bool is_double, const void* prob_sum, int64_t rows, int64_t features, double scale) {
  Buffer buffer(features * (is_double ? 8 : 4));
  with_acc(is_double, [&](auto zero) {
    using A = decltype(zero);
    const A* sums = static_cast<const A*>(prob_sum);
    A* to = reinterpret_cast<A*>(buffer.get());
    const double each = static_cast<double>(features) / static_cast<double>(rows);
    for (int64_t k = 0; k < features; ++k) {
      const double ratio = static_cast<double>(sums[k]) * each;
      to[k] = ratio <= 0 ? A{} : static_cast<A>(scale * std::log(ratio));
    }
  });
  return buffer;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> shared_loss(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, int64_t operand,
    double entropy_weight, double balance_weight, bool with_reg, double reg_scale, double reg_shift,
    int64_t keep_rows) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  const int64_t rows = problem.sizes.rows(), features = problem.sizes.features;
  const bool is_double = problem.is_double;
  // Logits are rounded to float16 where plain PyTorch's are to bfloat16, before anything is made of them: forward and
  // backward see the same. Not where each feature is one row's alone, whose gradients are small differences; and the
  // regulariser compares them with margin as they were.
  const bool shared = rows >= std::min<int64_t>(features, 128);
  const bool round_kept = input.scalar_type() == ScalarType::BFloat16 && !with_reg && shared;
  const auto kept_type = round_kept ? ScalarType::Half : acc_type(input.scalar_type());
  auto found = cpu::shared_statistics(problem, input, std::nullopt, with_reg, false, keep_rows, kept_type);
  double penalty = 0;
  if (rows > 0) {
    penalty = entropy_weight * sum_of(is_double, found.row_entropy.const_data_ptr(), rows) / static_cast<double>(rows);
    penalty += balance_weight * divergence(is_double, found.prob_sum.const_data_ptr(), rows, features);
  }
  Tensor reg = new_tensor(input, {0}, acc_type(input.scalar_type()));
  if (with_reg) {
    reg = scalar(input, reg_scale * sum_of(is_double, found.row_excess.const_data_ptr(), rows) + reg_shift);
  }
  return {scalar(input, penalty), reg, found.row_entropy, found.lse, found.prob_sum, found.kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shared_loss_backward(
    OptionalTensor grad_penalty, OptionalTensor grad_reg, OptionalTensor context, Tensor input, Tensor weight,
    OptionalTensor bias, double margin, int64_t operand, double entropy_weight, double balance_weight, bool with_reg,
    double reg_scale, [[maybe_unused]] double reg_shift, Tensor row_entropy, Tensor lse, Tensor prob_sum, Tensor kept,
    vector<bool> needs) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  const int64_t rows = problem.sizes.rows(), features = problem.sizes.features;
  STD_TORCH_CHECK(needs.size() == 4, "fusefeat: needs must have 4 entries");
  check_shape(prob_sum, {features}, "prob_sum");
  STD_TORCH_CHECK(
      prob_sum.is_contiguous() && prob_sum.scalar_type() == acc_type(input.scalar_type()),
      "fusefeat: prob_sum must be as the forward left it");
  cpu::StatisticsGradients incoming;
  if (rows > 0 && grad_penalty.has_value()) {
    const double each = value_of(input, *grad_penalty, "grad_penalty") / static_cast<double>(rows);
    incoming.row_entropy = problem.gather(std::nullopt, each * entropy_weight, margin);
    incoming.prob_sum =
        divergence_gradient(problem.is_double, prob_sum.const_data_ptr(), rows, features, each * balance_weight);
  }
  if (with_reg && grad_reg.has_value()) {
    incoming.row_excess = problem.gather(std::nullopt, value_of(input, *grad_reg, "grad_reg") * reg_scale, margin);
  }
  const SharedGradients grads(problem, context, input, weight, bias, needs);
  Buffer row_dots = problem.gather(std::nullopt, 0, 1);
  BackwardWishes wishes;
  grads.wish(wishes, context, bias, needs);
  cpu::shared_statistics_backward(
      problem, std::move(incoming), input, std::nullopt, row_entropy, lse, kept, row_dots, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias};
}

Tensor clamped_loss(
    OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin, int64_t operand,
    double scale, double shift) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  Buffer excesses = problem.gather(std::nullopt, 0, 1);
  cpu::ForwardWishes wishes;
  wishes.row_excess = &excesses;
  cpu::run_forward(problem, wishes);
  return scalar(input, scale * sum_of(problem.is_double, excesses.get(), problem.sizes.rows()) + shift);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> clamped_loss_backward(
    Tensor grad, OptionalTensor context, Tensor input, Tensor weight, OptionalTensor bias, double margin,
    int64_t operand, double scale, [[maybe_unused]] double shift, vector<bool> needs) {
  const SharedProblem problem(context, input, weight, bias, margin, std::nullopt, operand);
  STD_TORCH_CHECK(needs.size() == 4, "fusefeat: needs must have 4 entries");
  const SharedGradients grads(problem, context, input, weight, bias, needs);
  const Buffer excess_grads = problem.gather(std::nullopt, value_of(input, grad, "grad") * scale, margin);
  BackwardWishes wishes;
  wishes.kind = cpu::Gradient::clamp;
  wishes.excess_grad = &excess_grads;
  grads.wish(wishes, context, bias, needs);
  cpu::run_backward(problem, wishes);
  return {grads.context, grads.input, grads.weight, grads.bias};
}

}  // namespace
}  // namespace fusefeat

STABLE_TORCH_LIBRARY_IMPL(fusefeat, CPU, m) {
  m.impl("shared_loss", TORCH_BOX(&fusefeat::shared_loss));
  m.impl("shared_loss_backward", TORCH_BOX(&fusefeat::shared_loss_backward));
  m.impl("clamped_loss", TORCH_BOX(&fusefeat::clamped_loss));
  m.impl("clamped_loss_backward", TORCH_BOX(&fusefeat::clamped_loss_backward));
}
