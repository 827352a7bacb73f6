// Sums over the features of each row of a chunk: a team of threads per row and segment of features, then one thread
// per row over its segments, in order.
#pragma once

#include "shared_elements.cuh"

namespace fusefeat::cuda {

constexpr int kRowThreads = 256;

// How the rows of a chunk are shared out.
struct RowPlan {
  int lanes = kWarp;  // threads per row: a warp, or the block
  int64_t segments = 1, length = 0;

  int64_t rows_per_block() const { return kRowThreads / lanes; }
};

inline RowPlan plan_rows(const Chunk& chunk) {
  constexpr int64_t blocks = 528, shortest = 2048;
  RowPlan plan;
  plan.length = chunk.features;
  if (chunk.features <= shortest / 2) return plan;
  plan.lanes = kRowThreads;
  const int64_t most = (chunk.features + shortest - 1) / shortest, wanted = (blocks + chunk.rows - 1) / chunk.rows;
  plan.segments = most < wanted ? most : wanted;
  plan.length = (chunk.features + plan.segments - 1) / plan.segments;
  return plan;
}

inline unsigned row_blocks(const RowPlan& plan, const Chunk& chunk) {
  return static_cast<unsigned>((chunk.rows + plan.rows_per_block() - 1) / plan.rows_per_block() * plan.segments);
}

// The row and features of this thread's team.
struct RowSegment {
  Team team;
  int64_t row, segment, begin, end;

  __device__ __forceinline__ RowSegment(const RowPlan& plan, const Chunk& chunk)
      : team(plan.lanes),
        row(blockIdx.x / plan.segments * (kRowThreads / plan.lanes) + threadIdx.x / plan.lanes),
        segment(blockIdx.x % plan.segments),
        begin(segment * plan.length),
        end(begin + plan.length < chunk.features ? begin + plan.length : chunk.features) {}
};

template <typename A>
struct SegmentStatistics {
  A peak, sum, dot, excess;  // sum of e = exp(z - peak), of e (z - peak), and of max(z - margin, 0)
};

template <typename A>
struct RowStatisticsArgs {
  Chunk chunk;
  RowPlan plan;
  const A* z;
  int64_t stride;
  A margin;
  bool softmax, clamp;             // what is wanted
  SegmentStatistics<A>* segments;  // [rows][segments]
  // Of all rows, acc; null where not wanted.
  const A* row_weight;
  A *row_entropy, *row_lse, *row_excess;
  // [rows of the chunk]: P = exp(z - peak) factor, and what turns exp(z - peak) into w P.
  A *peak, *factor, *weighted_factor;
};

template <typename A>
__device__ __forceinline__ A team_peak(const Team& team, A peak, A* exchange) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    peak = greater_of(peak, __shfl_xor_sync(kAllLanes, peak, offset));
  }
  if (team.size == kWarp) return peak;
  if (team.lane % kWarp == 0) exchange[team.lane / kWarp] = peak;
  __syncthreads();
  for (int warp = 0; warp < team.size / kWarp; ++warp) peak = greater_of(peak, exchange[warp]);
  return peak;
}

template <typename A>
__global__ void __launch_bounds__(kRowThreads) row_statistics(const RowStatisticsArgs<A> args) {
  SHARED_ARRAY(A, peaks, kRowThreads / kWarp);
  SHARED_ARRAY(A, exchange, 2 * 3 * kRowThreads / kWarp);
  const RowSegment at(args.plan, args.chunk);
  if (at.row >= args.chunk.rows) return;
  const A* z = args.z + at.row * args.stride;
  A peak = neg_inf<A>(), sums[3] = {};
  if (args.softmax) {
    for (int64_t f = at.begin + at.team.lane; f < at.end; f += at.team.size) peak = greater_of(peak, z[f]);
    peak = team_peak(at.team, peak, peaks);
  }
  // With every feature of the segment switched off, all e are 0 whatever is subtracted.
  const A shift = peak == neg_inf<A>() ? A(0) : peak;
  for (int64_t f = at.begin + at.team.lane; f < at.end; f += at.team.size) {
    const A value = z[f];
    if (args.softmax) {
      const A d = bounded_below(value - shift), e = exp_of(d);
      sums[0] += e;
      sums[1] += e * d;
    }
    if (args.clamp) sums[2] += value <= args.margin ? A(0) : value - args.margin;  // "not <=" keeps NaN
  }
  int turn = 0;
  at.team.sum(sums, exchange, turn);
  if (at.team.lane == 0) {
    args.segments[at.row * args.plan.segments + at.segment] = {peak, sums[0], sums[1], sums[2]};
  }
}

template <typename A>
__device__ __forceinline__ A log_of(A x) {
  if constexpr (std::is_same_v<A, double>) {
    return log(x);
  } else {
    return logf(x);
  }
}

template <typename A>
__global__ void __launch_bounds__(kRowThreads) combine_statistics(const RowStatisticsArgs<A> args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= args.chunk.rows) return;
  const int64_t to = args.chunk.begin + row;
  const bool used = is_used<A>(args.row_weight, to);
  const SegmentStatistics<A>* segments = args.segments + row * args.plan.segments;
  A peak = neg_inf<A>(), sum = 0, dot = 0, excess = 0;
  for (int64_t i = 0; i < args.plan.segments; ++i) peak = greater_of(peak, segments[i].peak);
  for (int64_t i = 0; i < args.plan.segments; ++i) {
    const SegmentStatistics<A> segment = segments[i];
    const A shift = segment.peak == neg_inf<A>() ? A(0) : segment.peak - peak, scale = exp_of(shift);
    sum += scale * segment.sum;
    dot += scale * (segment.dot + segment.sum * shift);
    excess += segment.excess;
  }
  if (args.row_excess != nullptr) args.row_excess[to] = used ? excess : A(0);
  if (!args.softmax) return;
  // peak - peak is 0, or NaN when the peak is infinite.
  const A log_sum = log_of(sum) + (peak - peak);
  if (args.row_entropy != nullptr) args.row_entropy[to] = used ? log_sum - dot / sum : A(0);
  if (args.row_lse != nullptr) args.row_lse[to] = used ? peak + log_sum : A(0);
  args.peak[row] = peak;
  args.factor[row] = 1 / sum;
  args.weighted_factor[row] = (args.row_weight == nullptr ? A(1) : args.row_weight[to]) / sum;
}

// dz = P (log_scale log P + offset + prob_scale grad_prob_sum) + excess where z > margin, with log P = z - lse, each
// times margin: logits are margin times what the products gave.
template <typename A>
struct RowTerms {
  A lse, log_scale, offset, prob_scale, excess;
  int used;
};

template <typename A>
struct RowDotsArgs {
  Chunk chunk;
  RowPlan plan;
  Gradient kind;
  const A* z;
  int64_t stride;
  const A* lse;           // of all rows
  const A* grad_columns;  // grad_prob_sum, acc [F]
  Matrix grad, assignment;
  A* segments;  // [rows][segments]
};

// sum_f P g, of logits or of a given assignment and gradient matrix.
template <typename A>
__global__ void __launch_bounds__(kRowThreads) row_dots(const RowDotsArgs<A> args) {
  SHARED_ARRAY(A, exchange, 2 * kRowThreads / kWarp);
  const RowSegment at(args.plan, args.chunk);
  if (at.row >= args.chunk.rows) return;
  const int64_t row = args.chunk.begin + at.row;
  A sums[1] = {};
  if (args.kind == Gradient::assignment) {
    for (int64_t f = at.begin + at.team.lane; f < at.end; f += at.team.size) {
      const A p = load_element<A>(args.assignment, row, f);
      sums[0] += p == A(0) ? A(0) : p * load_element<A>(args.grad, row, f);
    }
  } else {
    const A* z = args.z + at.row * args.stride;
    const A lse = args.lse[row];
    for (int64_t f = at.begin + at.team.lane; f < at.end; f += at.team.size) {
      const A p = exp_of(z[f] - lse);
      sums[0] += p == A(0) ? A(0) : p * args.grad_columns[f];
    }
  }
  int turn = 0;
  at.team.sum(sums, exchange, turn);
  if (at.team.lane == 0) args.segments[at.row * args.plan.segments + at.segment] = sums[0];
}

template <typename A>
struct RowTermsArgs {
  Chunk chunk;
  int64_t segments;  // 0: no dots
  const A* dots;
  A margin;
  // Of all rows; null where there are none.
  const A *row_weight, *grad_entropy, *grad_lse, *grad_excess, *entropy, *lse;
  void* grad_row_weight;
  Scalar grad_row_weight_type;
  RowTerms<A>* terms;
};

template <typename A>
__global__ void __launch_bounds__(kRowThreads) combine_terms(const RowTermsArgs<A> args) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= args.chunk.rows) return;
  const int64_t row = args.chunk.begin + at;
  const auto value = [&](const A* values, A otherwise) { return values == nullptr ? otherwise : values[row]; };
  const bool used = is_used<A>(args.row_weight, row);
  A dot = 0;
  for (int64_t i = 0; i < args.segments; ++i) dot += args.dots[at * args.segments + i];
  if (args.grad_row_weight != nullptr) {
    store_any(args.grad_row_weight, args.grad_row_weight_type, row, used ? dot : A(0));
  }
  const A entropy_grad = args.margin * value(args.grad_entropy, 0);
  RowTerms<A> terms;
  terms.used = used;
  terms.lse = value(args.lse, 0);
  terms.log_scale = -entropy_grad;
  terms.prob_scale = args.margin * value(args.row_weight, 1);
  terms.offset = args.margin * value(args.grad_lse, 0) - entropy_grad * value(args.entropy, 0) - terms.prob_scale * dot;
  terms.excess = args.margin * value(args.grad_excess, 0);
  args.terms[at] = terms;
}

}  // namespace fusefeat::cuda
