// How both pools are cut into blocks, workers and teams. Everything here follows from shapes and
// dtypes, never from the device or from values, so results are the same from run to run.
#pragma once

#include <algorithm>

#include "bags.cuh"

namespace fusefeat::cuda {

// How a kernel reads tokens and queries. Rows of whole, aligned 16-byte packs take kOne or kMany,
// by the number of queries; all others, and float64, take kAny.
enum class Access { kOne, kMany, kAny };

// Running sums live in registers: channels per thread times queries per pass is kept in bounds, and
// the rows in flight are chosen so that a thread has 32 to 128 bytes under way.
template <typename Token, Access kAccess_>
struct PoolTraits {
  using T = Token;
  using A = AccOf<T>;
  static constexpr Access kAccess = kAccess_;
  static constexpr int kPack = kAccess == Access::kAny ? 1 : 16 / static_cast<int>(sizeof(T));
  static constexpr int kQueries = kAccess == Access::kMany ? 4 : 1;
  static constexpr int kChannels = kAccess == Access::kOne ? 16 : sizeof(T) == 8 ? 4 : 8;
  static constexpr int kPacks = kChannels / kPack;
  static constexpr int kRows = kAccess == Access::kOne && sizeof(T) == 2 ? 4 : 2;
  static constexpr int kBackwardRows = kAccess == Access::kMany || kRows == 4 ? 2 : 1;
  static constexpr int kThreads = kAccess == Access::kMany ? 128 : 256;     // of a block whose teams fit into a warp
  static constexpr int kMaxThreads = kAccess == Access::kMany ? 256 : 512;  // of a block that is one team
  static constexpr int kMaxChannels = kMaxThreads * kChannels;

  static_assert(kChannels % kPack == 0, "threads own whole packs");
  static_assert(kThreads % kWarp == 0 && kThreads <= kMaxThreads);
  static_assert(kAccess == Access::kAny || sizeof(T) <= 4, "float64 has no kernels of its own for aligned rows");
};

struct PoolPlan {
  int team = 1;
  int workers = 1;  // per block: its warps, or 1 when the block is one team
  int threads = kWarp;
  int64_t worker_tokens = 1;
  int64_t block_tokens = 1;
  int64_t blocks = 1;
  unsigned query_blocks = 1;
  int64_t slices = 1;  // of the channels, when a row is too long for one team
  int64_t slice_channels = 0;
  int64_t padded_channels = 0;  // whole packs: partial sums are always stored by packs
};

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename Traits>
PoolPlan plan_pool(int64_t tokens, int64_t channels, int64_t queries) {
  PoolPlan plan;
  plan.padded_channels = divide_up(std::max<int64_t>(channels, 1), Traits::kPack) * Traits::kPack;
  plan.slices = divide_up(plan.padded_channels, Traits::kMaxChannels);
  plan.slice_channels = std::min<int64_t>(plan.padded_channels, Traits::kMaxChannels);
  while (plan.team * Traits::kChannels < plan.slice_channels) plan.team *= 2;
  const bool wide = plan.team > kWarp;
  plan.threads = wide ? plan.team : Traits::kThreads;
  plan.workers = wide ? 1 : plan.threads / kWarp;
  plan.query_blocks = static_cast<unsigned>(divide_up(queries, Traits::kQueries));

  // About 8192 warps of work when there is enough of it, but at least 4 and at most 64 steps for
  // each; more per block when there are many queries, to bound the partial sums by 1/16 of x.
  const int64_t step = Traits::kRows * (wide ? 1 : kWarp / plan.team);
  const int64_t warps = wide ? plan.team / kWarp : 1;
  const int64_t steps = std::clamp<int64_t>(divide_up(tokens * warps, 8192 * step), 4, 64);
  const int64_t bounded = divide_up(16 * queries, step * plan.workers) * 4;
  plan.worker_tokens = step * std::max(steps, bounded);
  plan.block_tokens = plan.worker_tokens * plan.workers;
  plan.blocks = std::max<int64_t>(divide_up(tokens, plan.block_tokens), 1);
  return plan;
}

// Shared memory of both passes, in elements of the accumulation type. Forward: slots of the
// workers' partial states and the bags they belong to. Backward: the workers' sums for the query.
// Blocks of one team have the exchange of Team::sum instead. Then come the shared queries.
template <typename Traits>
struct SharedLayout {
  using A = typename Traits::A;
  int bags = 0, stats = 0, sums = 0, exchange = 0, query = 0, size = 0;

  __host__ __device__ SharedLayout(const PoolPlan& plan, bool attention, bool backward) {
    constexpr int kStep = 16 / sizeof(A);
    const int channels = plan.padded_channels;
    const auto take = [&](int count) {
      const int at = size;
      size += (count + kStep - 1) / kStep * kStep;
      return at;
    };
    if (plan.workers == 1) {
      exchange =
          take(2 * (plan.team / kWarp) * (backward ? 2 * Traits::kBackwardRows : Traits::kRows) * Traits::kQueries);
    } else if (backward) {
      sums = take(plan.workers * channels);
    } else {
      bags = take(2 * plan.workers * static_cast<int>(sizeof(int64_t) / sizeof(A)));
      stats = take(2 * plan.workers * Traits::kQueries * 2);
      sums = take(2 * plan.workers * Traits::kQueries * channels);
    }
    if (attention && !(backward && Traits::kAccess != Access::kOne)) {
      query = take(Traits::kQueries * plan.team * Traits::kChannels);
    }
  }
};

template <typename Traits>
size_t shared_bytes(const PoolPlan& plan, bool attention, bool backward) {
  return SharedLayout<Traits>(plan, attention, backward).size * sizeof(typename Traits::A);
}

struct TokenRows {
  const void* data = nullptr;
  TokenLayout layout;
  int64_t query = 0;  // added per query: lets one launch sum another tensor for each query
};

struct QueryRows {
  const void* data = nullptr;  // [queries, channels], contiguous
  bool in_acc = false;
};

// Scores, or gradients of weights, per token and query (inner).
struct ScoreRows {
  const void* data = nullptr;
  TokenLayout layout;
  bool in_acc = false;
};

// The channels of this thread, within the block's slice of them. A thread's packs lie a team's
// width apart, so that a team reads consecutive bytes.
template <typename Traits>
struct ChannelMap {
  int first, stride, count;
  int64_t base;  // of the slice

  __device__ ChannelMap(const Team& team, int64_t channels)
      : first(team.lane * Traits::kPack),
        stride(team.size * Traits::kPack),
        base(static_cast<int64_t>(blockIdx.y) * Traits::kMaxChannels) {
    const int64_t left = channels - base;
    count = left < Traits::kMaxChannels ? static_cast<int>(left) : Traits::kMaxChannels;
  }
  __device__ __forceinline__ int channel(int pack) const { return first + pack * stride; }
  __device__ __forceinline__ bool has(int pack) const { return channel(pack) < count; }
};

// This thread's channels of one row of queries or output gradients, in the accumulation type.
template <typename Traits, typename Row>
__device__ __forceinline__ void load_channels(
    typename Traits::A* channels, const Row* row, const ChannelMap<Traits>& map) {
#pragma unroll
  for (int p = 0; p < Traits::kPacks; ++p) {
    Pack<Row, Traits::kPack> pack;
    pack.clear();
    if (map.has(p)) pack = load_pack<Traits::kPack>(row + map.channel(p));
#pragma unroll
    for (int i = 0; i < Traits::kPack; ++i) {
      channels[p * Traits::kPack + i] = pack.get(i);
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void load_query(
    typename Traits::A* channels, const QueryRows& rows, int64_t at, const ChannelMap<Traits>& map) {
  if (rows.in_acc) {
    load_channels<Traits>(channels, static_cast<const typename Traits::A*>(rows.data) + at, map);
  } else {
    load_channels<Traits>(channels, static_cast<const typename Traits::T*>(rows.data) + at, map);
  }
}

// Queries that all tokens meet stay in shared memory, which saves registers: 16 bytes per thread
// after those of the thread before, so that banks do not conflict.
template <typename Traits>
struct SharedQuery {
  using A = typename Traits::A;
  static constexpr int kStep = 16 / sizeof(A);
  A* data;  // the thread's first 16 bytes
  int team;

  __device__ SharedQuery(A* shared, const Team& team_) : data(shared + team_.lane * kStep), team(team_.size) {}

  __device__ __forceinline__ A* part(int k, int c) const { return data + (k * Traits::kChannels + c) * team; }
  __device__ __forceinline__ A at(int k, int c) const { return part(k, c - c % kStep)[c % kStep]; }

  __device__ __forceinline__ void store(int k, const A* query) const {
#pragma unroll
    for (int c = 0; c < Traits::kChannels; c += kStep) store_channels<kStep>(part(k, c), query + c);
  }
};

// This thread's channels of one token, as stored; 0 when it is not to be read.
template <typename Traits>
__device__ __forceinline__ void load_token(
    Pack<typename Traits::T, Traits::kPack> (&packs)[Traits::kPacks], const typename Traits::T* row, int64_t inner,
    bool keep, const ChannelMap<Traits>& map) {
  if (Traits::kPack > 1) inner = 1;
  row += map.first * inner;
#pragma unroll
  for (int p = 0; p < Traits::kPacks; ++p) {
    packs[p].clear();
    if (keep && map.has(p)) packs[p] = load_pack<Traits::kPack>(row);
    row += map.stride * inner;
  }
}

template <typename Traits>
__device__ __forceinline__ void forget_packs(Pack<typename Traits::T, Traits::kPack> (&packs)[Traits::kPacks]) {
#pragma unroll
  for (int p = 0; p < Traits::kPacks; ++p) packs[p].forget();
}

// <token, query> over this thread's channels.
template <typename Traits>
__device__ __forceinline__ typename Traits::A partial_dot(
    const Pack<typename Traits::T, Traits::kPack> (&packs)[Traits::kPacks], const typename Traits::A* query) {
  typename Traits::A sum = 0;
#pragma unroll
  for (int c = 0; c < Traits::kChannels; ++c) sum += packs[c / Traits::kPack].get(c % Traits::kPack) * query[c];
  return sum;
}

// The same for several tokens and shared query k, in the same order of additions.
template <typename Traits, int kRows>
__device__ __forceinline__ void partial_dots(
    typename Traits::A (&sums)[kRows], const Pack<typename Traits::T, Traits::kPack> (&packs)[kRows][Traits::kPacks],
    const SharedQuery<Traits>& query, int k) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = 0;
#pragma unroll
  for (int c = 0; c < Traits::kChannels; ++c) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] += packs[r][c / Traits::kPack].get(c % Traits::kPack) * query.at(k, c);
  }
}

}  // namespace fusefeat::cuda
