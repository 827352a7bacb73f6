// The small kernels around the two passes over the tokens.
#pragma once

#include "attention_pool_forward.cuh"

namespace fusefeat::cuda {

// Blocks of the kernels that add up many rows: lanes hold columns, warps take rows in turn.
constexpr int kColumnWarps = 16;

__host__ __device__ inline int64_t column_tiles(int64_t channels) {
  return channels > 0 ? divide_up(channels, kWarp) : 1;
}

// Sums one value per warp in warp order; the first warp gets the result.
template <typename A>
__device__ __forceinline__ A sum_of_warps(A value, A* shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();
  shared[warp * kWarp + lane] = value;
  __syncthreads();
  A sum = 0;
  if (warp == 0) {
    for (int w = 0; w < kColumnWarps; ++w) sum += shared[w * kWarp + lane];
  }
  return sum;
}

// Finishes the bags that cross blocks: one block per (token block, query, 32 channels).
template <typename A>
__global__ void __launch_bounds__(kColumnWarps* kWarp, 1) combine_blocks(const ForwardArgs args) {
  SHARED_ARRAY(A, shared, kColumnWarps * kWarp);
  const int64_t tiles = column_tiles(args.channels);
  const int64_t tile = blockIdx.x % tiles, query = blockIdx.x / tiles % args.queries;
  const int64_t block = blockIdx.x / tiles / args.queries;
  const int64_t bag = args.crossing[block];
  if (bag < 0) return;
  const int64_t bag_end = args.bags.end(bag);
  const int64_t parts = (bag_end > 0 ? bag_end - 1 : 0) / args.plan.block_tokens - block + 1;
  const SlotArray<A> slots{
      static_cast<A*>(args.slot_stats), static_cast<A*>(args.slot_sums), args.queries, args.plan.padded_channels};
  const auto slot_of = [&](int64_t part) { return (block + part) * kSlots + (part == 0 ? kTail : kHead); };
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  A peak = neg_inf<A>();
  for (int64_t part = threadIdx.x; part < parts; part += blockDim.x) {
    const A* stat = slots.stat(slot_of(part), query);
    if (stat[1] != A(0)) peak = greater_of(peak, stat[0]);
  }
  shared[threadIdx.x] = peak;
  __syncthreads();
  for (int i = 0; i < kColumnWarps; ++i) peak = greater_of(peak, shared[i * kWarp + lane]);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    peak = greater_of(peak, __shfl_xor_sync(kAllLanes, peak, offset));
  }

  const int64_t channel = tile * kWarp + lane;
  A total = 0, sum = 0;
#pragma unroll 4
  for (int64_t part = warp; part < parts; part += kColumnWarps) {
    const A* stat = slots.stat(slot_of(part), query);
    const A part_total = stat[1];
    if (part_total == A(0)) continue;
    const A factor = rescale(stat[0], peak);
    total += factor * part_total;
    if (channel < args.channels) sum += factor * slots.row(slot_of(part), query)[channel];
  }
  total = sum_of_warps(total, shared);
  sum = sum_of_warps(sum, shared);
  if (warp != 0) return;
  const int64_t row = bag * args.queries + query;
  if (!args.plain_sum) {
    if (tile == 0 && lane == 0) args.lse[row] = log_sum(peak, total);
    sum = total == A(0) ? A(0) : sum / total;
  }
  if (channel < args.channels) static_cast<A*>(args.out)[row * args.channels + channel] = sum;
}

constexpr int kRowThreads = 256;

struct WeightArgs {
  Bags bags;
  int64_t queries = 1;
  Mask mask;
  ScoreRows scores;
  const double* lse = nullptr;  // [bags, queries]
  void* weights = nullptr;      // [tokens, queries]; may be the scores
};

// exp(score - lse), or 0 for a token that is masked, of no bag, or has a score of -inf.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 1) pool_weights(const WeightArgs args) {
  using A = AccOf<T>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  const int64_t last_token = args.bags.tokens - 1;
  // The warp's first and last token bound the search of each lane.
  const int64_t warp_first = token - threadIdx.x % kWarp;
  int64_t low = args.bags.ended_by(warp_first < last_token ? warp_first : last_token);
  int64_t high = args.bags.ended_by(warp_first + kWarp - 1 < last_token ? warp_first + kWarp - 1 : last_token);
  if (token > last_token) return;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (args.bags.end(middle) <= token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const bool in_bag = low < args.bags.count && args.bags.start(low) <= token;
  const bool keep = in_bag && args.mask.keeps(args.bags, low, token);
  for (int64_t k = 0; k < args.queries; ++k) {
    A weight = 0;
    if (keep) {
      const int64_t at = args.scores.layout.row(args.bags, low, token) + k * args.scores.layout.inner;
      const A score = load_either<T>(args.scores.data, at, args.scores.in_acc);
      if (score != neg_inf<A>()) weight = weight_of(score, args.lse[low * args.queries + k]);
    }
    static_cast<A*>(args.weights)[token * args.queries + k] = weight;
  }
}

// Sum of a * b over `count` values, by a warp.
template <typename A, typename Product>
__device__ __forceinline__ A warp_sum(int64_t count, Product product) {
  A sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += product(i);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

struct RowDotArgs {
  Bags bags;
  int64_t channels = 0, queries = 1;
  TokenRows tokens;
  Mask mask;
  QueryRows rows;
  bool per_bag = false;  // rows are [bags, queries, channels]
  double scale = 1;
  void* out = nullptr;  // [tokens, queries]
};

// scale * <token, row> for rows of channels too long for one team; a warp per token.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 1) row_dots(const RowDotArgs args) {
  using A = AccOf<T>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (token >= args.bags.tokens) return;
  const int64_t bag = args.bags.ended_by(token);
  const bool in_bag = bag < args.bags.count && args.bags.start(bag) <= token;
  const bool keep = in_bag && args.mask.keeps(args.bags, bag, token);
  const T* x = static_cast<const T*>(args.tokens.data) + (keep ? args.tokens.layout.row(args.bags, bag, token) : 0);
  for (int64_t k = 0; k < args.queries; ++k) {
    const int64_t row = ((args.per_bag ? bag * args.queries : 0) + k) * args.channels;
    const A dot = warp_sum<A>(keep ? args.channels : 0, [&](int64_t c) {
      return static_cast<A>(x[c * args.tokens.layout.inner]) *
             load_either<T>(args.rows.data, row + c, args.rows.in_acc);
    });
    if (threadIdx.x % kWarp == 0) {
      static_cast<A*>(args.out)[token * args.queries + k] = dot * static_cast<A>(args.scale);
    }
  }
}

// The backward's constant per bag and query: <grad_out, out> + sum of weight * grad_weight, the
// latter given. A warp per row.
template <typename A>
__global__ void __launch_bounds__(kRowThreads, 1)
    pool_delta(const A* grad_out, const A* out, const A* weighted, A* delta, int64_t rows, int64_t channels) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const A sum =
      warp_sum<A>(channels, [&](int64_t c) { return grad_out[row * channels + c] * out[row * channels + c]; });
  if (threadIdx.x % kWarp == 0) delta[row] = sum + (weighted == nullptr ? A(0) : weighted[row]);
}

// Offsets that fall, or lie outside of the tokens, give every bag NaN: reads stay in bounds anyway, but a bag that
// overlaps others would get a part of its tokens and look right. One block.
template <typename A>
__global__ void __launch_bounds__(kColumnWarps* kWarp, 1)
    refuse_bad_offsets(const Bags bags, A* out, int64_t out_count, double* lse, int64_t lse_count) {
  SHARED_ARRAY(unsigned, bad_lanes, kColumnWarps);
  bool bad = false;
  for (int64_t i = threadIdx.x; i <= bags.count; i += blockDim.x) {
    const int64_t value = bags.raw_offset(i);
    bad = bad || value < (i == 0 ? 0 : bags.raw_offset(i - 1)) || value > bags.tokens;
  }
  const unsigned lanes = __ballot_sync(kAllLanes, bad);
  if (threadIdx.x % kWarp == 0) bad_lanes[threadIdx.x / kWarp] = lanes;
  __syncthreads();
  unsigned any = 0;
  for (int warp = 0; warp < kColumnWarps; ++warp) any |= bad_lanes[warp];
  if (any == 0) return;
  for (int64_t i = threadIdx.x; i < out_count; i += blockDim.x) out[i] = static_cast<A>(NAN);
  for (int64_t i = threadIdx.x; i < lse_count; i += blockDim.x) lse[i] = static_cast<double>(NAN);
}

struct QueryGradArgs {
  const void* parts = nullptr;  // [count, queries, row_channels] of the accumulation type
  int64_t count = 0, queries = 0, channels = 0, row_channels = 0;
  double scale = 1;
  void* out = nullptr;  // [queries, channels]
  bool out_in_acc = false;
};

// The query's gradient from those of the token blocks: a block per (query, 32 channels).
template <typename T>
__global__ void __launch_bounds__(kColumnWarps* kWarp, 1) sum_query_grads(const QueryGradArgs args) {
  using A = AccOf<T>;
  SHARED_ARRAY(A, shared, kColumnWarps * kWarp);
  const int64_t tiles = column_tiles(args.channels);
  const int64_t query = blockIdx.x / tiles, channel = blockIdx.x % tiles * kWarp + threadIdx.x % kWarp;
  const A* column = static_cast<const A*>(args.parts) + query * args.row_channels + channel;
  A sum = 0;
  if (channel < args.channels) {
#pragma unroll 4
    for (int64_t part = threadIdx.x / kWarp; part < args.count; part += kColumnWarps) {
      sum += column[part * args.queries * args.row_channels];
    }
  }
  sum = sum_of_warps(sum, shared) * static_cast<A>(args.scale);
  if (threadIdx.x < kWarp && channel < args.channels) {
    store_either<T>(args.out, query * args.channels + channel, sum, args.out_in_acc);
  }
}

}  // namespace fusefeat::cuda
