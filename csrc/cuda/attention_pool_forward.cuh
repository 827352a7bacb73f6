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
  void* lse = nullptr;          // [bags, queries], unused by a plain sum
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
          store_channels<Traits::kPack>(slots.row(slot, query0 + k) + map.channel(p), sum[k] + p * Traits::kPack);
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
      const A* row = slots.row(slot, query0 + k);
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
      const ForwardArgs& args, int64_t bag, int64_t query0, const ChannelMap<Traits>& map, bool first_thread) {
#pragma unroll
    for (int k = 0; k < Traits::kQueries; ++k) {
      if (query0 + k >= args.queries) break;
      const int64_t row = bag * args.queries + query0 + k;
      if (!args.plain_sum) {
        if (first_thread && blockIdx.y == 0) {
          static_cast<A*>(args.lse)[row] = total[k] == A(0) ? neg_inf<A>() : peak[k] + log_of(total[k]);
        }
        const A inverse = total[k] == A(0) ? A(0) : A(1) / total[k];
#pragma unroll
        for (int c = 0; c < Traits::kChannels; ++c) sum[k][c] *= inverse;
      }
#pragma unroll
      for (int p = 0; p < Traits::kPacks; ++p) {
        if (!map.has(p)) continue;
        store_channels<Traits::kPack>(
            static_cast<A*>(args.out) + row * args.channels + map.channel(p), sum[k] + p * Traits::kPack);
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
        if (lane == 0 && blockIdx.y == 0 && !args.plain_sum) static_cast<A*>(args.lse)[row0 + k] = neg_inf<A>();
        A* out = static_cast<A*>(args.out) + (row0 + k) * args.channels;
        const int64_t begin = static_cast<int64_t>(blockIdx.y) * Traits::kMaxChannels;
        for (int64_t c = begin + lane; c < args.channels && c < begin + Traits::kMaxChannels; c += kWarp) out[c] = 0;
      }
    }
  }
}

// kAttention: scores are scale * <token, query>; otherwise they are read.
template <typename Traits, bool kAttention>
__global__ void __launch_bounds__(Traits::kMaxThreads) pool_forward(const ForwardArgs args) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  constexpr int kQueries = Traits::kQueries, kRows = Traits::kRows;
  DYNAMIC_SHARED(A, shared);

  const PoolPlan& plan = args.plan;
  const Bags& bags = args.bags;
  const Team team(plan.team);
  const ChannelMap<Traits> map(team, args.channels);
  // Queries vary fastest: blocks that read the same tokens run together and find them in cache.
  const int64_t block = blockIdx.x / plan.query_blocks;
  const int64_t query0 = blockIdx.x % plan.query_blocks * kQueries;
  const int worker = plan.workers > 1 ? threadIdx.x / kWarp : 0;
  const bool first_thread = team.row == 0 && team.lane == 0;
  const auto limit = [&](int64_t token) { return token < bags.tokens ? token : bags.tokens; };
  const int64_t block_first = block * plan.block_tokens;
  const int64_t block_last = limit(block_first + plan.block_tokens);
  const auto worker_first = [&](int w) { return limit(block_first + w * plan.worker_tokens); };
  const int64_t first = worker_first(worker), last = worker_first(worker + 1);

  write_empty_bags<Traits>(args, block, query0);

  const SlotArray<A> block_slots{
      static_cast<A*>(args.slot_stats), static_cast<A*>(args.slot_sums), args.queries, plan.padded_channels};
  const SlotArray<A> worker_slots{
      shared, shared + plan.workers * kSlots * kQueries * 2, kQueries, plan.padded_channels};
  if (threadIdx.x == 0 && query0 == 0 && blockIdx.y == 0) args.crossing[block] = -1;
  if (first_thread) {
    for (int slot = 0; slot < kSlots; ++slot) {
      for (int k = 0; k < kQueries; ++k) {
        if (plan.workers > 1) worker_slots.stat(worker * kSlots + slot, k)[1] = 0;
        if (worker == 0 && blockIdx.y == 0 && query0 + k < args.queries) {
          block_slots.stat(block * kSlots + slot, query0 + k)[1] = 0;
        }
      }
    }
  }

  A query[kQueries][Traits::kChannels];
  if constexpr (kAttention) {
#pragma unroll
    for (int k = 0; k < kQueries; ++k) {
      // A query past the last one repeats it: its results are not stored.
      const int64_t row = query0 + k < args.queries ? query0 + k : args.queries - 1;
      load_query<Traits>(query[k], args.query, row, map);
    }
  }

  PoolState<Traits> state;
  int turn = 0;
  int64_t head_end = -1, tail_bag = -1, tail_end = -1;

  bags.walk(
      first, last,
      [&](int64_t bag, int64_t begin, int64_t stop) {
        state.reset(args.plain_sum);
        const int step = kRows * team.count;
        for (int64_t base = begin; base < stop; base += step) {
          bool keep[kRows];
          Pack<T, Traits::kPack> packs[kRows][Traits::kPacks];
          A score[kRows * kQueries];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int64_t token = base + r * team.count + team.row;
            keep[r] = token < stop && args.mask.keeps(bags, bag, token);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int64_t token = base + r * team.count + team.row;
            int64_t row = args.tokens.layout.row(bags, bag, token);
            if constexpr (!kAttention && kQueries == 1) row += query0 * args.tokens.query;
            load_token<Traits>(packs[r], args.tokens, row, keep[r], map);
            if constexpr (!kAttention) {
              const int64_t at = args.scores.layout.row(bags, bag, token) + query0 * args.scores.layout.inner;
#pragma unroll
              for (int k = 0; k < kQueries; ++k) {
                const bool wanted = keep[r] && query0 + k < args.queries;
                score[r * kQueries + k] =
                    wanted ? load_either<T>(args.scores.data, at + k * args.scores.layout.inner, args.scores.in_acc)
                           : A(0);
              }
            }
          }
          if constexpr (kAttention) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
              for (int k = 0; k < kQueries; ++k) score[r * kQueries + k] = partial_dot<Traits>(packs[r], query[k]);
            }
            team.sum(score, shared, turn);
#pragma unroll
            for (int i = 0; i < kRows * kQueries; ++i) score[i] *= static_cast<A>(args.scale);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int k = 0; k < kQueries; ++k) {
              A& s = score[r * kQueries + k];
              if (!keep[r] || (args.plain_sum && s == A(0))) s = neg_inf<A>();
              if constexpr (kAttention) {
                const int64_t token = base + r * team.count + team.row;
                if (args.keep_scores != nullptr && team.lane == 0 && token < stop && query0 + k < args.queries) {
                  static_cast<A*>(args.keep_scores)[token * args.queries + query0 + k] = s;
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
                state.sum[k][c] += weight * static_cast<A>(packs[r][c / Traits::kPack].at[c % Traits::kPack]);
              }
            }
          }
        }
        state.merge_teams(team);

        const int64_t bag_start = bags.start(bag), bag_end = bags.end(bag);
        if (bag_start >= first && bag_end <= last) {
          if (team.row == 0) state.finish(args, bag, query0, map, first_thread);
          return;
        }
        const SlotKind kind = bag_start < first ? kHead : kTail;
        if (kind == kHead) head_end = bag_end;
        if (kind == kTail) tail_bag = bag, tail_end = bag_end;
        if (team.row != 0) return;
        if (plan.workers > 1) {
          state.store(worker_slots, worker * kSlots + kind, 0, kQueries, map, first_thread);
        } else {
          state.store(block_slots, block * kSlots + kind, query0, args.queries, map, first_thread && blockIdx.y == 0);
        }
      },
      [](int64_t, int64_t) {});

  if (plan.workers > 1) {
    __syncthreads();
    // The worker in whose range a bag begins merges it; worker 0 also the bag that came in.
    const auto merge = [&](SlotKind kind, int64_t end) {
      state.reset(args.plain_sum);
      state.absorb(worker_slots, worker * kSlots + kind, 0, kQueries, map);
      for (int next = worker + 1; next < plan.workers && worker_first(next) < end; ++next) {
        state.absorb(worker_slots, next * kSlots + kHead, 0, kQueries, map);
      }
    };
    if (team.row != 0) return;
    if (worker == 0 && head_end >= 0) {
      merge(kHead, head_end);
      state.store(block_slots, block * kSlots + kHead, query0, args.queries, map, first_thread);
    }
    if (tail_bag >= 0) {
      merge(kTail, tail_end);
      if (tail_end <= block_last) {
        state.finish(args, tail_bag, query0, map, first_thread);
        tail_bag = -1;
      } else {
        state.store(block_slots, block * kSlots + kTail, query0, args.queries, map, first_thread);
      }
    }
  }
  if (tail_bag >= 0 && first_thread && query0 == 0 && blockIdx.y == 0) args.crossing[block] = tail_bag;
}

}  // namespace fusefeat::cuda
