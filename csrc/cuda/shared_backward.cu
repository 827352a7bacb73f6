// The backward of the shared-logits operators, chunk by chunk: logits again (unless kept), their gradient in their
// place, and from it the gradients of rows, weight and bias.
#include "shared_columns.cuh"
#include "shared_outputs.cuh"
#include "shared_problem.h"

namespace fusefeat::cuda {
namespace {

// Partial sums of a product; half of it where logits are kept.
constexpr int64_t kPartBytes = 16 << 20;

// A gradient that is summed over chunks: in place when it is in acc, else in scratch when there are several.
class ChunkedSum {
 public:
  ChunkedSum(const SharedProblem& problem, const Tensor* out, bool several) {
    if (out == nullptr) return;
    sum_.out = out->mutable_data_ptr();
    sum_.type = scalar_of(out->scalar_type());
    sum_.sum = sum_.out;
    if (!several || out->scalar_type() == problem.acc()) return;
    scratch_ = problem.scratch(out->numel());
    sum_.sum = scratch_.mutable_data_ptr();
  }

  RunningSum at(bool first, bool last) const {
    RunningSum sum = sum_;
    sum.first = first;
    sum.last = last;
    return sum;
  }

 private:
  RunningSum sum_;
  Tensor scratch_;
};

template <typename A>
class Backward {
 public:
  Backward(const SharedProblem& problem, const BackwardWishes& wishes)
      : problem_(problem),
        wishes_(wishes),
        several_(problem.chunk(0, wishes.kept_rows).rows < problem.sizes.rows()),
        weight_sum_(problem, wishes.grad_weight, several_),
        bias_sum_(problem, wishes.grad_bias, several_) {
    const int64_t rows = problem.chunk_rows(wishes.kept_rows);
    dz_ = problem.scratch(rows * problem.stride());
    terms_ = problem.scratch_bytes(rows * static_cast<int64_t>(sizeof(RowTerms<A>)));
  }

  void run(const Chunk& chunk) {
    A* dz = static_cast<A*>(dz_.mutable_data_ptr());
    z_ = dz;
    stride_ = problem_.stride();
    if (chunk.begin < wishes_.kept_rows) {
      z_ = static_cast<const A*>(wishes_.kept->const_data_ptr()) + chunk.begin * chunk.features;
      stride_ = chunk.features;
    } else if (wishes_.kind != Gradient::assignment) {
      launch_logits(problem_.products, problem_.logits(chunk, dz, stride_), problem_.stream());
    }
    row_pass(chunk);
    const Tensor* row_gradients[] = {wishes_.grad_context, wishes_.grad_input};
    const int64_t context_rows = problem_.sizes.context_rows;
    const bool with_rows = (row_gradients[0] != nullptr && chunk.begin < context_rows) ||
                           (row_gradients[1] != nullptr && chunk.begin + chunk.rows > context_rows);
    if (!with_rows && wishes_.grad_weight == nullptr && wishes_.grad_bias == nullptr) return;
    column_pass(chunk, dz);
    RowMatrix gradient;
    gradient.tail = {dz, problem_.stride(), 1, problem_.is_double ? Scalar::f64 : Scalar::f32};
    gradient.rows = chunk.rows;
    gradient.cols = chunk.features;
    if (with_rows) row_gradient(chunk, gradient);
    if (wishes_.grad_weight != nullptr) weight_gradient(chunk, gradient);
  }

 private:
  static const A* data_of(const OptionalTensor& tensor) {
    return static_cast<const A*>(SharedProblem::pointer(tensor));
  }

  bool first(const Chunk& chunk) const { return chunk.begin == 0; }
  bool last(const Chunk& chunk) const { return chunk.begin + chunk.rows == problem_.sizes.rows(); }

  // Sums over features of probability times incoming gradient, and with them each row's terms of dz.
  void row_pass(const Chunk& chunk) {
    RowDotsArgs<A> dots;
    dots.chunk = chunk;
    dots.plan = plan_rows(chunk);
    dots.kind = wishes_.kind;
    dots.z = z_;
    dots.stride = stride_;
    dots.lse = data_of(wishes_.lse);
    dots.grad_columns = data_of(wishes_.grad_prob_sum);
    if (wishes_.kind == Gradient::assignment) {
      dots.grad = matrix_of(*wishes_.grad);
      dots.assignment = matrix_of(*wishes_.assignment);
    }
    const bool with_dots = wishes_.kind == Gradient::assignment || dots.grad_columns != nullptr;
    const Tensor segments = problem_.scratch(with_dots ? chunk.rows * dots.plan.segments : 0);
    dots.segments = static_cast<A*>(segments.mutable_data_ptr());
    if (with_dots) LAUNCH((row_dots<A>), row_blocks(dots.plan, chunk), kRowThreads, 0, problem_.stream(), dots);

    RowTermsArgs<A> args;
    args.chunk = chunk;
    args.segments = with_dots ? dots.plan.segments : 0;
    args.dots = dots.segments;
    args.margin = static_cast<A>(problem_.margin);
    args.row_weight = static_cast<const A*>(problem_.row_weight());
    args.grad_entropy = data_of(wishes_.grad_row_entropy);
    args.grad_lse = data_of(wishes_.grad_lse);
    args.grad_excess = data_of(wishes_.grad_row_excess);
    args.entropy = data_of(wishes_.row_entropy);
    args.lse = data_of(wishes_.lse);
    args.grad_row_weight = nullptr;
    if (wishes_.grad_row_weight != nullptr) {
      args.grad_row_weight = wishes_.grad_row_weight->mutable_data_ptr();
      args.grad_row_weight_type = scalar_of(wishes_.grad_row_weight->scalar_type());
    }
    args.terms = static_cast<RowTerms<A>*>(terms_.mutable_data_ptr());
    LAUNCH((combine_terms<A>), blocks_for(chunk.rows, kRowThreads), kRowThreads, 0, problem_.stream(), args);
  }

  void column_pass(const Chunk& chunk, A* dz) {
    LogitGradientArgs<A> args;
    args.chunk = chunk;
    args.plan = plan_columns(chunk);
    args.kind = wishes_.kind;
    args.with_excess = wishes_.grad_row_excess.has_value();
    args.z = z_;
    args.stride = stride_;
    args.margin = static_cast<A>(problem_.margin);
    args.terms = static_cast<const RowTerms<A>*>(terms_.const_data_ptr());
    args.grad_columns = data_of(wishes_.grad_prob_sum);
    if (wishes_.grad != nullptr) args.grad = matrix_of(*wishes_.grad);
    if (wishes_.assignment != nullptr) args.assignment = matrix_of(*wishes_.assignment);
    args.dz = dz;
    args.dz_stride = problem_.stride();
    const bool with_bias = wishes_.grad_bias != nullptr;
    const Tensor sums = problem_.scratch(with_bias ? args.plan.ranges * chunk.features : 0);
    args.column_sums = with_bias ? static_cast<A*>(sums.mutable_data_ptr()) : nullptr;
    LAUNCH(
        (logit_gradient<A>), static_cast<unsigned>(column_blocks(chunk.features) * args.plan.ranges), kColumnThreads, 0,
        problem_.stream(), args);
    if (!with_bias) return;
    Parts parts;
    parts.count = args.plan.ranges;
    parts.sums = args.column_sums;
    const RunningOutput<A> out{bias_sum_.at(first(chunk), last(chunk)), 1};
    LAUNCH(
        (add_parts<A, RunningOutput<A>>), blocks_for(chunk.features, kColumnThreads), kColumnThreads, 0,
        problem_.stream(), parts, chunk.features, int64_t(1), out);
  }

  int64_t part_bytes() const { return wishes_.kept_rows > 0 ? kPartBytes / 2 : kPartBytes; }

  Tensor part_sums(Parts& parts, int64_t elements) const {
    Tensor sums = problem_.scratch(parts.count == 1 ? 0 : parts.count * elements);
    parts.sums = sums.mutable_data_ptr();
    return sums;
  }

  void row_gradient(const Chunk& chunk, const RowMatrix& gradient) const {
    RowGradientArgs args;
    args.dz = gradient;
    args.weight = problem_.weight();
    if (wishes_.grad_context != nullptr) {
      args.context = wishes_.grad_context->mutable_data_ptr();
      args.context_type = scalar_of(wishes_.grad_context->scalar_type());
    }
    if (wishes_.grad_input != nullptr) {
      args.input = wishes_.grad_input->mutable_data_ptr();
      args.input_type = scalar_of(wishes_.grad_input->scalar_type());
    }
    args.context_rows = problem_.sizes.context_rows;
    args.first = chunk.begin;
    args.row_weight = problem_.row_weight();
    const int64_t channels = problem_.sizes.channels;
    args.parts = plan_parts(problem_.products, chunk.rows, channels, chunk.features, part_bytes());
    const Tensor sums = part_sums(args.parts, chunk.rows * channels);
    launch_row_gradient(problem_.products, args, problem_.stream());
  }

  void weight_gradient(const Chunk& chunk, const RowMatrix& gradient) const {
    WeightGradientArgs args;
    args.dz = gradient;
    args.rows = problem_.rows(chunk.begin, chunk.rows);
    args.out = weight_sum_.at(first(chunk), last(chunk));
    const int64_t channels = problem_.sizes.channels;
    args.parts = plan_parts(problem_.products, chunk.features, channels, chunk.rows, part_bytes());
    const Tensor sums = part_sums(args.parts, chunk.features * channels);
    launch_weight_gradient(problem_.products, args, problem_.stream());
  }

  const SharedProblem& problem_;
  const BackwardWishes& wishes_;
  bool several_;
  ChunkedSum weight_sum_, bias_sum_;
  Tensor dz_, terms_;
  const A* z_ = nullptr;
  int64_t stride_ = 0;
};

}  // namespace

void run_backward(const SharedProblem& problem, const BackwardWishes& wishes) {
  const int64_t rows = problem.sizes.rows();
  if (rows == 0) {
    if (wishes.grad_weight != nullptr) zero(*wishes.grad_weight);
    if (wishes.grad_bias != nullptr) zero(*wishes.grad_bias);
    return;
  }
  with_acc(problem, [&](auto zero) {
    Backward<decltype(zero)> backward(problem, wishes);
    for (int64_t begin = 0; begin < rows;) {
      const Chunk chunk = problem.chunk(begin, wishes.kept_rows);
      backward.run(chunk);
      begin += chunk.rows;
    }
  });
  check_launch("the backward of shared logits");
}

}  // namespace fusefeat::cuda
