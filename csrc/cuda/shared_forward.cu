// The forward of the shared-logits operators, chunk by chunk: logits, row statistics, sums over rows.
#include "shared_columns.cuh"
#include "shared_outputs.cuh"
#include "shared_problem.h"

namespace fusefeat::cuda {
namespace {

template <typename A>
A* data_of(const Tensor* tensor) {
  return tensor == nullptr ? nullptr : static_cast<A*>(tensor->mutable_data_ptr());
}

template <typename A>
class Forward {
 public:
  Forward(const SharedProblem& problem, const ForwardWishes& wishes)
      : problem_(problem), wishes_(wishes), softmax_(wishes.prob_sum != nullptr || wishes.assignment != nullptr) {
    const int64_t rows = problem.chunk_rows(wishes.kept_rows);
    z_ = problem.scratch(wishes.kept_rows < problem.sizes.rows() ? rows * problem.stride() : 0);
    if (softmax_) factors_ = problem.scratch(3 * rows);
  }

  void run(const Chunk& chunk) {
    const int64_t features = chunk.features;
    const bool kept = chunk.begin < wishes_.kept_rows;
    z_data_ = data_of<A>(kept ? wishes_.kept : &z_) + (kept ? chunk.begin * features : 0);
    stride_ = kept ? features : problem_.stride();
    launch_logits(problem_.products, problem_.logits(chunk, z_data_, stride_), problem_.stream());
    row_pass(chunk);
    if (wishes_.prob_sum != nullptr || wishes_.fired != nullptr) column_pass(chunk);
    if (wishes_.assignment == nullptr) return;
    AssignmentArgs<A> args;
    args.chunk = chunk;
    args.plan = plan_columns(chunk);
    args.z = z_data_;
    args.stride = stride_;
    args.peak = factor(0);
    args.factor = factor(1);
    args.matrix = wishes_.assignment->mutable_data_ptr();
    args.type = scalar_of(wishes_.assignment->scalar_type());
    LAUNCH(
        (write_assignment<A>), static_cast<unsigned>(column_blocks(features) * args.plan.ranges), kColumnThreads, 0,
        problem_.stream(), args);
  }

 private:
  A* factor(int i) const { return softmax_ ? data_of<A>(&factors_) + i * (factors_.numel() / 3) : nullptr; }

  void row_pass(const Chunk& chunk) {
    RowStatisticsArgs<A> args;
    args.chunk = chunk;
    args.plan = plan_rows(chunk);
    const Tensor segments = problem_.scratch(chunk.rows * args.plan.segments * 4);
    args.z = z_data_;
    args.stride = stride_;
    args.margin = static_cast<A>(problem_.margin);
    args.softmax = softmax_;
    args.clamp = wishes_.row_excess != nullptr;
    args.segments = static_cast<SegmentStatistics<A>*>(segments.mutable_data_ptr());
    args.row_weight = static_cast<const A*>(problem_.row_weight());
    args.row_entropy = data_of<A>(wishes_.row_entropy);
    args.row_lse = data_of<A>(wishes_.lse);
    args.row_excess = data_of<A>(wishes_.row_excess);
    args.peak = factor(0);
    args.factor = factor(1);
    args.weighted_factor = factor(2);
    LAUNCH((row_statistics<A>), row_blocks(args.plan, chunk), kRowThreads, 0, problem_.stream(), args);
    LAUNCH((combine_statistics<A>), blocks_for(chunk.rows, kRowThreads), kRowThreads, 0, problem_.stream(), args);
  }

  void column_pass(const Chunk& chunk) {
    const int64_t features = chunk.features;
    ColumnStatisticsArgs<A> args;
    args.chunk = chunk;
    args.plan = plan_columns(chunk);
    const bool sums_wanted = wishes_.prob_sum != nullptr, counts_wanted = wishes_.fired != nullptr;
    const Tensor sums = problem_.scratch(sums_wanted ? args.plan.ranges * features : 0);
    const Tensor counts = problem_.scratch_bytes(counts_wanted ? args.plan.ranges * features * 4 : 0);
    args.z = z_data_;
    args.stride = stride_;
    args.margin = static_cast<A>(problem_.margin);
    args.row_weight = static_cast<const A*>(problem_.row_weight());
    args.peak = factor(0);
    args.weighted_factor = factor(2);
    args.prob_sums = sums_wanted ? data_of<A>(&sums) : nullptr;
    args.fired = counts_wanted ? data_of<int32_t>(&counts) : nullptr;
    LAUNCH(
        (column_statistics<A>), static_cast<unsigned>(column_blocks(features) * args.plan.ranges), kColumnThreads, 0,
        problem_.stream(), args);
    const unsigned blocks = blocks_for(features, kColumnThreads);
    if (sums_wanted) {
      Parts parts;
      parts.count = args.plan.ranges;
      parts.sums = args.prob_sums;
      RunningOutput<A> out{{}, 1};
      out.sum.sum = wishes_.prob_sum->mutable_data_ptr();
      out.sum.first = chunk.begin == 0;
      out.sum.last = false;
      LAUNCH(
          (add_parts<A, RunningOutput<A>>), blocks, kColumnThreads, 0, problem_.stream(), parts, features, int64_t(1),
          out);
    }
    if (counts_wanted) {
      LAUNCH(
          (add_fired<int32_t>), blocks, kColumnThreads, 0, problem_.stream(), static_cast<const int32_t*>(args.fired),
          args.plan.ranges, features, data_of<int64_t>(wishes_.fired));
    }
  }

  const SharedProblem& problem_;
  const ForwardWishes& wishes_;
  bool softmax_;
  Tensor z_, factors_;
  A* z_data_ = nullptr;
  int64_t stride_ = 0;
};

}  // namespace

void run_forward(const SharedProblem& problem, const ForwardWishes& wishes) {
  with_acc(problem, [&](auto zero) {
    if (problem.sizes.rows() == 0) return;
    Forward<decltype(zero)> forward(problem, wishes);
    for (int64_t begin = 0; begin < problem.sizes.rows();) {
      const Chunk chunk = problem.chunk(begin, wishes.kept_rows);
      forward.run(chunk);
      begin += chunk.rows;
    }
  });
  check_launch("the forward of shared logits");
}

}  // namespace fusefeat::cuda
