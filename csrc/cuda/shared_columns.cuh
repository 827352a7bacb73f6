// Passes over the logits of a chunk by columns: 32 features and a range of rows per block. What is summed over rows
// is summed in order: by warp, then over the block's warps, then over the ranges.
#pragma once

#include "shared_rows.cuh"

namespace fusefeat::cuda {

constexpr int kColumnThreads = 256, kColumnGroups = kColumnThreads / kWarp;

struct ColumnPlan {
  int64_t ranges = 1, length = 0;
};

inline int64_t column_blocks(int64_t features) {
  return (features + kWarp - 1) / kWarp;
}

inline ColumnPlan plan_columns(const Chunk& chunk) {
  constexpr int64_t blocks = 1056, shortest = 64, elements = 1 << 19;
  const int64_t most = (chunk.rows + shortest - 1) / shortest;
  const int64_t wanted = blocks / column_blocks(chunk.features), fit = elements / chunk.features;
  ColumnPlan plan;
  plan.ranges = most < wanted ? most : wanted;
  if (plan.ranges > fit) plan.ranges = fit;
  if (plan.ranges < 1) plan.ranges = 1;
  plan.length = (chunk.rows + plan.ranges - 1) / plan.ranges;
  return plan;
}

struct ColumnRange {
  int64_t feature, range, begin, end;  // rows [begin, end), of which a warp takes every eighth

  __device__ __forceinline__ ColumnRange(const ColumnPlan& plan, const Chunk& chunk)
      : feature(blockIdx.x / plan.ranges * kWarp + threadIdx.x % kWarp),
        range(blockIdx.x % plan.ranges),
        begin(range * plan.length),
        end(begin + plan.length < chunk.rows ? begin + plan.length : chunk.rows) {}
};

// The sum over the block's warps, for each lane; of use to warp 0.
template <typename V>
__device__ __forceinline__ V sum_of_column(V value, V* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  V sum = 0;
  if (threadIdx.x < kWarp) {
#pragma unroll
    for (int warp = 0; warp < kColumnGroups; ++warp) sum += shared[warp * kWarp + threadIdx.x];
  }
  return sum;
}

template <typename A>
struct ColumnStatisticsArgs {
  Chunk chunk;
  ColumnPlan plan;
  const A* z;
  int64_t stride;
  A margin;
  const A* row_weight;              // of all rows
  const A *peak, *weighted_factor;  // of the chunk's
  A* prob_sums;                     // [ranges][F], or null
  int32_t* fired;                   // likewise
};

template <typename A>
__global__ void __launch_bounds__(kColumnThreads) column_statistics(const ColumnStatisticsArgs<A> args) {
  SHARED_ARRAY(A, shared, kColumnThreads);
  SHARED_ARRAY(int32_t, shared_counts, kColumnThreads);
  const ColumnRange at(args.plan, args.chunk);
  const bool inside = at.feature < args.chunk.features;
  A sum = 0;
  int32_t count = 0;
#pragma unroll 4
  for (int64_t row = at.begin + threadIdx.x / kWarp; row < at.end; row += kColumnGroups) {
    if (!inside || !is_used<A>(args.row_weight, args.chunk.begin + row)) continue;
    const A z = args.z[row * args.stride + at.feature];
    if (args.prob_sums != nullptr) sum += exp_of(z - args.peak[row]) * args.weighted_factor[row];
    count += z > args.margin;
  }
  const int64_t to = at.range * args.chunk.features + at.feature;
  if (args.prob_sums != nullptr) {
    sum = sum_of_column(sum, shared);
    if (inside && threadIdx.x < kWarp) args.prob_sums[to] = sum;
  }
  if (args.fired != nullptr) {
    count = sum_of_column(count, shared_counts);
    if (inside && threadIdx.x < kWarp) args.fired[to] = count;
  }
}

// Adds the ranges' counts to those of earlier chunks.
template <typename Count>
__global__ void __launch_bounds__(kColumnThreads)
    add_fired(const Count* counts, int64_t ranges, int64_t features, int64_t* fired) {
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (feature >= features) return;
  int64_t count = 0;
  for (int64_t range = 0; range < ranges; ++range) count += counts[range * features + feature];
  fired[feature] += count;
}

template <typename A>
struct AssignmentArgs {
  Chunk chunk;
  ColumnPlan plan;
  const A* z;
  int64_t stride;
  const A *peak, *factor;
  void* matrix;  // [N, F]
  Scalar type;
};

template <typename A>
__global__ void __launch_bounds__(kColumnThreads) write_assignment(const AssignmentArgs<A> args) {
  const ColumnRange at(args.plan, args.chunk);
  if (at.feature >= args.chunk.features) return;
#pragma unroll 1
  for (int64_t row = at.begin + threadIdx.x / kWarp; row < at.end; row += kColumnGroups) {
    const A p = exp_of(args.z[row * args.stride + at.feature] - args.peak[row]) * args.factor[row];
    store_any(args.matrix, args.type, (args.chunk.begin + row) * args.chunk.features + at.feature, p);
  }
}

template <typename A>
struct LogitGradientArgs {
  Chunk chunk;
  ColumnPlan plan;
  Gradient kind;
  bool with_excess;
  const A* z;  // of the chunk; dz may take its place
  int64_t stride;
  A margin;
  const RowTerms<A>* terms;  // of the chunk
  const A* grad_columns;     // acc [F], or null
  Matrix grad, assignment;   // of all rows
  A* dz;
  int64_t dz_stride;  // columns from F to it are set to 0
  A* column_sums;     // [ranges][F], or null
};

template <typename A>
__device__ __forceinline__ A logit_gradient_of(
    const LogitGradientArgs<A>& args, const RowTerms<A>& terms, int64_t row, int64_t feature, A column_grad) {
  if (args.kind == Gradient::assignment) {
    const A p = load_element<A>(args.assignment, args.chunk.begin + row, feature);
    const A grad = load_element<A>(args.grad, args.chunk.begin + row, feature);
    return p == A(0) ? A(0) : p * (terms.prob_scale * grad + terms.offset);
  }
  const A z = args.z[row * args.stride + feature];
  if (args.kind == Gradient::activation) {
    return z > args.margin ? args.margin * load_element<A>(args.grad, args.chunk.begin + row, feature) : A(0);
  }
  A dz = 0;
  if (args.kind == Gradient::penalty) {
    const A log_p = bounded_below(z - terms.lse), p = exp_of(log_p);
    dz = p == A(0) ? A(0) : p * (terms.prob_scale * column_grad + (terms.log_scale * log_p + terms.offset));
  }
  if (args.with_excess && z > args.margin) dz += terms.excess;
  return dz;
}

template <typename A>
__global__ void __launch_bounds__(kColumnThreads) logit_gradient(const LogitGradientArgs<A> args) {
  SHARED_ARRAY(A, shared, kColumnThreads);
  const ColumnRange at(args.plan, args.chunk);
  const bool inside = at.feature < args.chunk.features;
  const A column_grad = inside && args.grad_columns != nullptr ? args.grad_columns[at.feature] : A(0);
  A sum = 0;
#pragma unroll 2
  for (int64_t row = at.begin + threadIdx.x / kWarp; row < at.end; row += kColumnGroups) {
    if (at.feature >= args.dz_stride) break;
    const RowTerms<A> terms = args.terms[row];
    A dz = 0;
    if (inside && terms.used) dz = logit_gradient_of(args, terms, row, at.feature, column_grad);
    args.dz[row * args.dz_stride + at.feature] = dz;
    sum += dz;
  }
  if (args.column_sums == nullptr) return;
  sum = sum_of_column(sum, shared);
  if (inside && threadIdx.x < kWarp) args.column_sums[at.range * args.chunk.features + at.feature] = sum;
}

}  // namespace fusefeat::cuda
