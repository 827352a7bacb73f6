// Launches of attention_pool and softmax_pool on raw pointers.
#pragma once

#include "attention_pool_backward.cuh"
#include "attention_pool_forward.cuh"
#include "attention_pool_steps.cuh"

namespace fusefeat::cuda {

template <typename T, Access kAccess, bool kAttention>
void launch_forward(const ForwardArgs& args, cudaStream_t stream) {
  using Traits = PoolTraits<T, kAccess>;
  using A = typename Traits::A;
  const PoolPlan& plan = args.plan;
  const dim3 grid(plan.blocks * plan.query_blocks, plan.slices);
  LAUNCH(
      (pool_forward<Traits, kAttention>), grid, plan.threads, shared_bytes<Traits>(plan, kAttention, false), stream,
      args);
  if (plan.blocks > 1) {
    const int64_t tiles = column_tiles(args.channels);
    LAUNCH((combine_blocks<A>), plan.blocks * args.queries * tiles, kColumnWarps * kWarp, 0, stream, args);
  }
}

template <typename T, Access kAccess, bool kAttention>
void launch_backward(const BackwardArgs& args, cudaStream_t stream) {
  using Traits = PoolTraits<T, kAccess>;
  const dim3 grid(args.plan.blocks, args.plan.slices);
  const size_t shared = shared_bytes<Traits>(args.plan, kAttention, true);
  LAUNCH((pool_backward<Traits, kAttention>), grid, args.plan.threads, shared, stream, args);
}

template <typename A>
void launch_refuse_bad_offsets(const ForwardArgs& args, cudaStream_t stream) {
  const int64_t rows = args.bags.count * args.queries;
  LAUNCH(
      (refuse_bad_offsets<A>), 1, kColumnWarps * kWarp, 0, stream, args.bags, static_cast<A*>(args.out),
      rows * args.channels, args.lse, rows);
}

template <typename T>
void launch_weights(const WeightArgs& args, cudaStream_t stream) {
  LAUNCH((pool_weights<T>), divide_up(args.bags.tokens, kRowThreads), kRowThreads, 0, stream, args);
}

template <typename T>
void launch_row_dots(const RowDotArgs& args, cudaStream_t stream) {
  LAUNCH((row_dots<T>), divide_up(args.bags.tokens, kRowThreads / kWarp), kRowThreads, 0, stream, args);
}

template <typename A>
void launch_delta(
    const A* grad_out, const A* out, const A* weighted, A* delta, int64_t rows, int64_t channels, cudaStream_t stream) {
  LAUNCH(
      (pool_delta<A>), divide_up(rows, kRowThreads / kWarp), kRowThreads, 0, stream, grad_out, out, weighted, delta,
      rows, channels);
}

template <typename T>
void launch_query_grads(const QueryGradArgs& args, cudaStream_t stream) {
  const int64_t tiles = column_tiles(args.channels);
  LAUNCH((sum_query_grads<T>), args.queries * tiles, kColumnWarps * kWarp, 0, stream, args);
}

}  // namespace fusefeat::cuda
