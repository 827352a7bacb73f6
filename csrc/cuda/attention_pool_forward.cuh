// Forward of both pools: one pass over the tokens with an online softmax.
//
// A worker (a warp, or a block that is one team) owns a fixed range of tokens and walks the bags
// in it. A bag inside the range is finished there. A bag that crosses ranges leaves its partial
// state in a slot: the head slot when it began before the range, the tail slot when it begins
// inside and goes on. Slots of a block's workers are merged in shared memory, slots of blocks by
// combine_blocks, both in token order.
#pragma once

#include "attention_pool_plan.cuh"

namespace fusefeat::cuda {

enum SlotKind : int { kHead = 0, kTail = 1, kSlots = 2 };

struct ForwardArgs {
  Bags bags;
  PoolPlan plan;
  int64_t channels = 0, queries = 1;
  TokenRows tokens;
  Mask mask;
  QueryRows query;              // attention pool
  double scale = 1;             // attention pool
  void* keep_scores = nullptr;  // attention pool: [tokens, queries], null when nobody wants them
  ScoreRows scores;             // softmax pool
  bool plain_sum = false;       // softmax pool: scores are the weights themselves, and 0 drops a token
  void* out = nullptr;          // [bags, queries, channels]
  double* lse = nullptr;        // [bags, queries], unused by a plain sum
  void* slot_stats = nullptr;   // [blocks, kSlots, queries, 2]: peak, total
  void* slot_sums = nullptr;    // [blocks, kSlots, queries, padded_channels]
  int64_t* crossing = nullptr;  // [blocks]: the bag that begins in a block and goes on, or -1
};

// Partial states, in shared or in global memory.
template <typename A>
struct SlotArray {
  A* stats;
  A* sums;
  int64_t queries, channels;

  __device__ __forceinline__ A* stat(int64_t slot, int64_t query) const { return stats + (slot * queries + query) * 2; }
  __device__ __forceinline__ A* row(int64_t slot, int64_t query) const {
    return sums + (slot * queries + query) * channels;
  }
};

// The softmax over the tokens seen so far, for some queries and this thread's channels.
template <typename Traits>
struct PoolState {
  using A = typename Traits::A;
  A peak[Traits::kQueries], total[Traits::kQueries], sum[Traits::kQueries][Traits::kChannels];

  // A plain sum has no peak to follow, any fixed one will do; its total only says "not empty".
  __device__ __forceinline__ void reset(bool plain_sum) {
#pragma unroll
    for (int k = 0; k < Traits::kQueries; ++k) {
      peak[k] = plain_sum ? A(0) : neg_inf<A>();
      total[k] = plain_sum ? A(1) : A(0);
#pragma unroll
      for (int c = 0; c < Traits::kChannels; ++c) sum[k][c] = 0;
    }
  }

  __device__ __forceinline__ void raise_peak(int k, A next) {
    if (next == peak[k]) return;
    const A factor = rescale(peak[k], next);
    peak[k] = next;
    total[k] *= factor;
#pragma unroll
    for (int c = 0; c < Traits::kChannels; ++c) sum[k][c] *= factor;
  }

  // Merges the states of a warp's teams; only the first team's result is used.
  __device__ __forceinline__ void merge_teams(const Team& team) {
    for (int offset = team.size; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int k = 0; k < Traits::kQueries; ++k) {
        const A other_peak = __shfl_xor_sync(kAllLanes, peak[k], offset);
        const A next = greater_of(peak[k], other_peak);
        const A mine = rescale(peak[k], next), theirs = rescale(other_peak, next);
        peak[k] = next;
        total[k] = mine * total[k] + theirs * __shfl_xor_sync(kAllLanes, total[k], offset);
#pragma unroll
        for (int c = 0; c < Traits::kChannels; ++c) {
          sum[k][c] = mine * sum[k][c] + theirs * __shfl_xor_sync(kAllLanes, sum[k][c], offset);
        }
      }
    }
  }

  __device__ __forceinline__ void store(
      const SlotArray<A>& slots, int64_t slot, int64_t query0, int64_t queries, const ChannelMap<Traits>& map,
      bool first_thread) const {
#pragma unroll
    for (int k = 0; k < Traits::kQueries; ++k) {
      if (query0 + k >= queries) break;
      if (first_thread) {
        slots.stat(slot, query0 + k)[0] = peak[k];
        slots.stat(slot, query0 + k)[1] = total[k];
      }
#pragma unroll
      for (int p = 0; p < Traits::kPacks; ++p) {
        if (map.has(p)) {
          store_channels<Traits::kPack>(
              slots.row(slot, query0 + k) + map.base + map.channel(p), sum[k] + p * Traits::kPack);
        }
      }
    }
  }

  // Adds a state that follows this one in token order. Plain loads: it was written by this launch.
  __device__ __forceinline__ void absorb(
      const SlotArray<A>& slots, int64_t slot, int64_t query0, int64_t queries, const ChannelMap<Traits>& map) {
#pragma unroll
    for (int k = 0; k < Traits::kQueries; ++k) {
      if (query0 + k >= queries) break;
      const A other_peak = slots.stat(slot, query0 + k)[0], other_total = slots.stat(slot, query0 + k)[1];
      if (other_total == A(0)) continue;
      raise_peak(k, greater_of(peak[k], other_peak));
      const A factor = rescale(other_peak, peak[k]);
      total[k] += factor * other_total;
      const A* row = slots.row(slot, query0 + k) + map.base;
#pragma unroll
      for (int p = 0; p < Traits::kPacks; ++p) {
        if (!map.has(p)) continue;
#pragma unroll
        for (int i = 0; i < Traits::kPack; ++i) sum[k][p * Traits::kPack + i] += factor * row[map.channel(p) + i];
      }
    }
  }

  // The bag's results: 0 and -inf when no token was kept.
  __device__ __forceinline__ void finish(
      const ForwardArgs& args, int64_t bag, int64_t query0, int64_t queries, const ChannelMap<Traits>& map,
      bool first_thread) {
#pragma unroll
    for (int k = 0; k < Traits::kQueries; ++k) {
      if (query0 + k >= queries) break;
      const int64_t row = bag * queries + query0 + k;
      if (!args.plain_sum) {
        if (first_thread && blockIdx.y == 0) {
          args.lse[row] = log_sum(peak[k], total[k]);
        }
        const A inverse = total[k] == A(0) ? A(0) : A(1) / total[k];
#pragma unroll
        for (int c = 0; c < Traits::kChannels; ++c) sum[k][c] *= inverse;
      }
#pragma unroll
      for (int p = 0; p < Traits::kPacks; ++p) {
        if (!map.has(p)) continue;
        store_channels<Traits::kPack>(
            static_cast<A*>(args.out) + row * args.channels + map.base + map.channel(p), sum[k] + p * Traits::kPack);
      }
    }
  }
};

// Empty bags of packed tokens belong to no range; blocks share them out, a warp each at a time.
template <typename Traits>
__device__ __forceinline__ void write_empty_bags(const ForwardArgs& args, int64_t block, int64_t query0) {
  using A = typename Traits::A;
  const int64_t share = divide_up(args.bags.count, args.plan.blocks);
  const int64_t first = block * share;
  const int64_t last = first + share < args.bags.count ? first + share : args.bags.count;
  const int lane = threadIdx.x % kWarp;
  for (int64_t group = first + threadIdx.x / kWarp * kWarp; group < last; group += blockDim.x / kWarp * kWarp) {
    const int64_t bag = group + lane;
    unsigned empty = __ballot_sync(kAllLanes, bag < last && args.bags.end(bag) <= args.bags.start(bag));
    for (; empty != 0; empty &= empty - 1) {
      const int64_t row0 = (group + __ffs(empty) - 1) * args.queries + query0;
      for (int k = 0; k < Traits::kQueries && query0 + k < args.queries; ++k) {
        if (lane == 0 && blockIdx.y == 0 && !args.plain_sum) args.lse[row0 + k] = neg_inf<double>();
        A* out = static_cast<A*>(args.out) + (row0 + k) * args.channels;
        const int64_t begin = static_cast<int64_t>(blockIdx.y) * Traits::kMaxChannels;
        for (int64_t c = begin + lane; c < args.channels && c < begin + Traits::kMaxChannels; c += kWarp) out[c] = 0;
      }
    }
  }
}

// kAttention: scores are scale * <token, query>; otherwise they are read.
template <typename Traits, bool kAttention>
__global__ void __launch_bounds__(Traits::kMaxThreads, 1) pool_forward(const ForwardArgs args) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  constexpr int kQueries = Traits::kQueries, kRows = Traits::kRows;
  DYNAMIC_SHARED(A, shared);

  const PoolPlan& plan = args.plan;
  const Bags& bags = args.bags;
  const Team team(plan.team);
  const ChannelMap<Traits> map(team, args.channels);
  // Queries vary fastest: blocks that read the same tokens run together and find them in cache.
  constexpr bool kOne = Traits::kAccess == Access::kOne;
  const int64_t queries = kOne ? 1 : args.queries;
  const int64_t block = kOne ? blockIdx.x : blockIdx.x / plan.query_blocks;
  const int64_t query0 = kOne ? 0 : static_cast<int64_t>(blockIdx.x % plan.query_blocks) * kQueries;
  const int worker = plan.workers > 1 ? threadIdx.x / kWarp : 0;
  const bool first_thread = team.row == 0 && team.lane == 0;
  const int64_t block_first = block * plan.block_tokens;
  const auto worker_first = [&](int w) { return bags.limit(block_first + w * plan.worker_tokens); };

  if (bags.offsets != nullptr || bags.tokens == 0) write_empty_bags<Traits>(args, block, query0);

  const SlotArray<A> block_slots{
      static_cast<A*>(args.slot_stats), static_cast<A*>(args.slot_sums), queries, plan.padded_channels};
  const SharedLayout<Traits> layout(plan, kAttention, false);
  const SlotArray<A> worker_slots{shared + layout.stats, shared + layout.sums, kQueries, plan.padded_channels};
  int64_t* worker_bags = reinterpret_cast<int64_t*>(shared + layout.bags) + worker * kSlots;
  if (threadIdx.x == 0 && query0 == 0 && blockIdx.y == 0) args.crossing[block] = -1;
  if (first_thread) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (plan.workers > 1) worker_bags[slot] = -1;
      for (int k = 0; k < kQueries; ++k) {
        if (plan.workers > 1) worker_slots.stat(worker * kSlots + slot, k)[1] = 0;
        if (worker == 0 && blockIdx.y == 0 && query0 + k < queries) {
          block_slots.stat(block * kSlots + slot, query0 + k)[1] = 0;
        }
      }
    }
  }

  const SharedQuery<Traits> query(shared + layout.query, team);
  if constexpr (kAttention) {
    for (int k = 0; k < kQueries && static_cast<int>(threadIdx.x) < team.size; ++k) {
      A channels[Traits::kChannels];
      // A query past the last one repeats it: its results are not stored.
      const int64_t row = query0 + k < queries ? query0 + k : queries - 1;
      load_query<Traits>(channels, args.query, row * args.channels + map.base, map);
      query.store(k, channels);
    }
    __syncthreads();
  }

  PoolState<Traits> state;
  int turn = 0;

  const int64_t first = worker_first(worker);
  bags.walk(
      first, static_cast<int>(worker_first(worker + 1) - first),
      [&](int64_t bag, int begin, int stop) {
        state.reset(args.plain_sum);
        const T* tokens = static_cast<const T*>(args.tokens.data) + args.tokens.layout.row(bags, bag, first) +
                          map.base * args.tokens.layout.inner;
        if constexpr (!kAttention && kQueries == 1) tokens += query0 * args.tokens.query;
        const auto* mask = reinterpret_cast<const unsigned char*>(args.mask.data);
        if (mask != nullptr) mask += args.mask.layout.row(bags, bag, first);
        const int64_t scores = kAttention ? 0 : args.scores.layout.row(bags, bag, first);

        for (int base = begin + team.row; base - team.row < stop; base += kRows * team.count) {
          int keep[kRows];
          Pack<T, Traits::kPack> packs[kRows][Traits::kPacks];
          A score[kRows * kQueries];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int i = base + r * team.count;
            keep[r] = i < stop;
            // Loaded as numbers, not tested one by one: the loads are to be under way together.
            if (mask != nullptr && keep[r]) keep[r] = mask[i * args.mask.layout.token];
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int i = base + r * team.count;
            load_token<Traits>(packs[r], tokens + i * args.tokens.layout.token, args.tokens.layout.inner, keep[r], map);
          }
          if constexpr (kAttention) {
#pragma unroll
            for (int k = 0; k < kQueries; ++k) {
              A dots[kRows];
              partial_dots<Traits>(dots, packs, query, k);
#pragma unroll
              for (int r = 0; r < kRows; ++r) score[r * kQueries + k] = dots[r];
            }
            team.sum(score, shared + layout.exchange, turn);
#pragma unroll
            for (int r = 0; r < kRows; ++r) forget_packs<Traits>(packs[r]);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int i = base + r * team.count;
#pragma unroll
            for (int k = 0; k < kQueries; ++k) {
              A& s = score[r * kQueries + k];
              const bool exists = query0 + k < queries;
              if constexpr (kAttention) {
                s = keep[r] ? s * static_cast<A>(args.scale) : neg_inf<A>();
                if (args.keep_scores != nullptr && team.lane == 0 && i < stop && exists) {
                  static_cast<A*>(args.keep_scores)[(first + i) * queries + query0 + k] = s;
                }
              } else {
                s = neg_inf<A>();
                if (keep[r] && exists) {
                  const int64_t at = scores + i * args.scores.layout.token + (query0 + k) * args.scores.layout.inner;
                  s = load_either<T>(args.scores.data, at, args.scores.in_acc);
                  if (args.plain_sum && s == A(0)) s = neg_inf<A>();
                }
              }
            }
          }
          if (!args.plain_sum) {
#pragma unroll
            for (int k = 0; k < kQueries; ++k) {
              A next = state.peak[k];
#pragma unroll
              for (int r = 0; r < kRows; ++r) next = greater_of(next, score[r * kQueries + k]);
              state.raise_peak(k, next);
            }
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int k = 0; k < kQueries; ++k) {
              // -inf drops the token for this query: its value, which may be NaN, is not touched.
              const A s = score[r * kQueries + k];
              if (s == neg_inf<A>()) continue;
              const A weight = args.plain_sum ? s : exp_of(s - state.peak[k]);
              if (!args.plain_sum) state.total[k] += weight;
#pragma unroll
              for (int c = 0; c < Traits::kChannels; ++c) {
                state.sum[k][c] += weight * packs[r][c / Traits::kPack].get(c % Traits::kPack);
              }
            }
          }
        }
        state.merge_teams(team);

        const bool inside = bags.start(bag) >= first;
        if (inside && bags.end(bag) <= worker_first(worker + 1)) {
          if (team.row == 0) state.finish(args, bag, query0, queries, map, first_thread);
          return;
        }
        if (team.row != 0) return;
        const SlotKind kind = inside ? kTail : kHead;
        if (plan.workers > 1) {
          if (first_thread) worker_bags[kind] = bag;
          state.store(worker_slots, worker * kSlots + kind, 0, kQueries, map, first_thread);
        } else {
          if (first_thread && inside && query0 == 0 && blockIdx.y == 0) args.crossing[block] = bag;
          state.store(block_slots, block * kSlots + kind, query0, queries, map, first_thread && blockIdx.y == 0);
        }
      },
      [](int, int) {});

  if (plan.workers == 1) return;
  __syncthreads();
  if (team.row != 0) return;
  // The worker in whose range a bag begins merges it; worker 0 also the bag that came in.
  const auto merge = [&](SlotKind kind, int64_t bag) {
    state.reset(args.plain_sum);
    state.absorb(worker_slots, worker * kSlots + kind, 0, kQueries, map);
    for (int next = worker + 1; next < plan.workers && worker_first(next) < bags.end(bag); ++next) {
      state.absorb(worker_slots, next * kSlots + kHead, 0, kQueries, map);
    }
  };
  if (worker == 0 && worker_bags[kHead] >= 0) {
    merge(kHead, worker_bags[kHead]);
    state.store(block_slots, block * kSlots + kHead, query0, queries, map, first_thread);
  }
  const int64_t bag = worker_bags[kTail];
  if (bag < 0) return;
  merge(kTail, bag);
  if (bags.end(bag) <= worker_first(plan.workers)) {
    state.finish(args, bag, query0, queries, map, first_thread);
  } else {
    state.store(block_slots, block * kSlots + kTail, query0, queries, map, first_thread);
    if (first_thread && query0 == 0) args.crossing[block] = bag;
  }
}

}  // namespace fusefeat::cuda
