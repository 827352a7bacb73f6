// Backward of both pools: one pass over the tokens, which writes the tokens' gradient and, per
// block, the query's. With p the softmax weight and g the gradient of the bag's output:
//   dp = <g, x> + grad_weight,  ds = p (dp - delta),  grad_x = sum_k p g + ds scale query.
#pragma once

#include "attention_pool_plan.cuh"

namespace fusefeat::cuda {

struct BackwardArgs {
  Bags bags;
  PoolPlan plan;
  int64_t channels = 0, queries = 1;
  TokenRows tokens;
  Mask mask;
  QueryRows query;  // attention pool
  double scale = 1;
  ScoreRows scores;                    // softmax pool
  const void* grad_out = nullptr;      // [bags, queries, channels]
  const void* lse = nullptr;           // [bags, queries]
  const void* delta = nullptr;         // [bags, queries]
  ScoreRows grad_weights;              // null data: none came in
  const void* given_scores = nullptr;  // [tokens, queries]; set, with given_dots, when rows are sliced
  const void* given_dots = nullptr;    // [tokens, queries]: <g, x>
  void* grad_tokens = nullptr;         // [tokens, channels], or null
  void* grad_scores = nullptr;         // [tokens, queries], or null
  bool grad_scores_in_acc = false;
  void* grad_query = nullptr;  // [blocks, queries, padded_channels], or null; queries <= kQueries
};

template <typename Traits, bool kAttention>
__global__ void __launch_bounds__(Traits::kMaxThreads) pool_backward(const BackwardArgs args) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  constexpr int kQueries = Traits::kQueries, kRows = Traits::kBackwardRows, kChannels = Traits::kChannels;
  constexpr bool kLoops = Traits::kAccess != Access::kOne;  // over the queries
  constexpr int kPack = Traits::kPack, kPacks = Traits::kPacks;
  DYNAMIC_SHARED(A, shared);

  const PoolPlan& plan = args.plan;
  const int64_t queries = kLoops ? args.queries : 1;
  const Bags& bags = args.bags;
  const Team team(plan.team);
  const ChannelMap<Traits> map(team, args.channels);
  const int worker = plan.workers > 1 ? threadIdx.x / kWarp : 0;
  const int64_t begin_token = blockIdx.x * plan.block_tokens + worker * plan.worker_tokens;
  const int64_t first = begin_token < bags.tokens ? begin_token : bags.tokens;
  const int64_t last = begin_token + plan.worker_tokens < bags.tokens ? begin_token + plan.worker_tokens : bags.tokens;
  const bool writes_scores = args.grad_scores != nullptr && team.lane == 0 && blockIdx.y == 0;
  const bool wants_dots = kAttention || args.grad_scores != nullptr;

  const auto store_token = [&](int64_t token, const A* gradient) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!map.has(p)) continue;
      Pack<T, kPack> pack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) pack.at[i] = static_cast<T>(gradient[p * kPack + i]);
      store_pack(static_cast<T*>(args.grad_tokens) + token * args.channels + map.channel(p), pack);
    }
  };

  // With one query, its row and the bag's gradient stay in registers; with many they are read
  // again, from cache, for every few tokens.
  A query[kChannels], gradient[kChannels];
  const auto load_gradient = [&](int64_t row) {
    load_channels<Traits>(gradient, static_cast<const A*>(args.grad_out), row, map);
  };
  A query_grad[kQueries][kChannels];
#pragma unroll
  for (int k = 0; k < kQueries; ++k) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) query_grad[k][c] = 0;
  }
  if constexpr (kAttention && !kLoops) load_query<Traits>(query, args.query, 0, map);
  int turn = 0;

  bags.walk(
      first, last,
      [&](int64_t bag, int64_t begin, int64_t stop) {
        if constexpr (!kLoops) load_gradient(bag);
        const int step = kRows * team.count;
        for (int64_t base = begin; base < stop; base += step) {
          int64_t token[kRows];
          bool keep[kRows];
          Pack<T, kPack> packs[kRows][kPacks];
          A token_grad[kRows][kChannels];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            token[r] = base + r * team.count + team.row;
            keep[r] = token[r] < stop && args.mask.keeps(bags, bag, token[r]);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const bool read = keep[r] && (args.given_dots == nullptr ? wants_dots : args.grad_query != nullptr);
            load_token<Traits>(packs[r], args.tokens, args.tokens.layout.row(bags, bag, token[r]), read, map);
#pragma unroll
            for (int c = 0; c < kChannels; ++c) token_grad[r][c] = 0;
          }

          for (int64_t query0 = 0; query0 < queries; query0 += kQueries) {
            // First the scores and <g, x>; later p and ds * scale, for the tokens kept by a query.
            unsigned kept = 0;
            A terms[2 * kRows * kQueries];
            const auto score = [&](int r, int k) -> A& { return terms[r * kQueries + k]; };
            const auto dot = [&](int r, int k) -> A& { return terms[(kRows + r) * kQueries + k]; };
            const auto query_of = [&](int k) { return query0 + k < queries ? query0 + k : queries - 1; };
#pragma unroll
            for (int k = 0; k < kQueries; ++k) {
              if constexpr (kLoops) {
                if constexpr (kAttention) load_query<Traits>(query, args.query, query_of(k), map);
                load_gradient(bag * queries + query_of(k));
              }
#pragma unroll
              for (int r = 0; r < kRows; ++r) {
                if constexpr (kAttention) score(r, k) = partial_dot<Traits>(packs[r], query);
                dot(r, k) = partial_dot<Traits>(packs[r], gradient);
              }
            }
            if (args.given_dots == nullptr && wants_dots) {
              if constexpr (kAttention) {
                team.sum(terms, shared, turn);
              } else {
                A dots[kRows * kQueries];
#pragma unroll
                for (int i = 0; i < kRows * kQueries; ++i) dots[i] = terms[kRows * kQueries + i];
                team.sum(dots, shared, turn);
#pragma unroll
                for (int i = 0; i < kRows * kQueries; ++i) terms[kRows * kQueries + i] = dots[i];
              }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
              for (int k = 0; k < kQueries; ++k) {
                const int64_t row = bag * queries + query_of(k);
                const int64_t at = token[r] * queries + query_of(k);
                A s = neg_inf<A>();
                if (keep[r] && query0 + k < queries) {
                  if (args.given_scores != nullptr) {
                    s = static_cast<const A*>(args.given_scores)[at];
                  } else if constexpr (kAttention) {
                    s = score(r, k) * static_cast<A>(args.scale);
                  } else {
                    const int64_t place =
                        args.scores.layout.row(bags, bag, token[r]) + query_of(k) * args.scores.layout.inner;
                    s = load_either<T>(args.scores.data, place, args.scores.in_acc);
                  }
                }
                // ds is NaN where p is, and exactly 0 for a dropped token.
                A p = 0, ds = 0;
                if (s != neg_inf<A>()) {
                  kept |= 1u << (r * kQueries + k);
                  p = exp_of(s - static_cast<const A*>(args.lse)[row]);
                  if (wants_dots) {
                    A dp = args.given_dots != nullptr ? static_cast<const A*>(args.given_dots)[at] : dot(r, k);
                    if (args.grad_weights.data != nullptr) {
                      const int64_t place = args.grad_weights.layout.row(bags, bag, token[r]) +
                                            query_of(k) * args.grad_weights.layout.inner;
                      dp += static_cast<const A*>(args.grad_weights.data)[place];
                    }
                    ds = p * (dp - static_cast<const A*>(args.delta)[row]);
                  }
                  if (args.grad_query != nullptr) {
#pragma unroll
                    for (int c = 0; c < kChannels; ++c) {
                      query_grad[k][c] += ds * static_cast<A>(packs[r][c / kPack].at[c % kPack]);
                    }
                  }
                }
                if (writes_scores && token[r] < stop && query0 + k < queries) {
                  store_either<T>(args.grad_scores, at, ds, args.grad_scores_in_acc);
                }
                score(r, k) = p;
                dot(r, k) = ds * static_cast<A>(args.scale);
              }
            }
            if (args.grad_tokens != nullptr) {
#pragma unroll
              for (int k = 0; k < kQueries; ++k) {
                if constexpr (kLoops) {
                  if constexpr (kAttention) load_query<Traits>(query, args.query, query_of(k), map);
                  load_gradient(bag * queries + query_of(k));
                }
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                  if ((kept >> (r * kQueries + k) & 1) == 0) continue;
#pragma unroll
                  for (int c = 0; c < kChannels; ++c) {
                    token_grad[r][c] += score(r, k) * gradient[c];
                    if constexpr (kAttention) token_grad[r][c] += dot(r, k) * query[c];
                  }
                }
              }
            }
          }
          if (args.grad_tokens != nullptr) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              if (token[r] < stop) store_token(token[r], token_grad[r]);
            }
          }
        }
      },
      [&](int64_t begin, int64_t stop) {
        A zeros[kChannels] = {};
        for (int64_t token = begin + team.row; token < stop; token += team.count) {
          if (args.grad_tokens != nullptr) store_token(token, zeros);
          for (int64_t k = 0; writes_scores && k < queries; ++k) {
            store_either<T>(args.grad_scores, token * queries + k, A(0), args.grad_scores_in_acc);
          }
        }
      });

  if constexpr (kAttention) {
    if (args.grad_query == nullptr) return;
    for (int offset = team.size; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int k = 0; k < kQueries; ++k) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          query_grad[k][c] += __shfl_xor_sync(kAllLanes, query_grad[k][c], offset);
        }
      }
    }
    A* block_grad = static_cast<A*>(args.grad_query) + blockIdx.x * queries * plan.padded_channels;
    if (plan.workers > 1) {
      if (team.row == 0) {
#pragma unroll
        for (int k = 0; k < kQueries; ++k) {
#pragma unroll
          for (int p = 0; p < kPacks; ++p) {
            if (!map.has(p)) continue;
            store_channels<kPack>(
                shared + (worker * kQueries + k) * plan.padded_channels + map.channel(p), query_grad[k] + p * kPack);
          }
        }
      }
      __syncthreads();
      const int64_t worker_size = kQueries * plan.padded_channels;
      for (int64_t i = threadIdx.x; i < queries * plan.padded_channels; i += blockDim.x) {
        A sum = 0;
        for (int w = 0; w < plan.workers; ++w) sum += shared[w * worker_size + i];
        block_grad[i] = sum;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kQueries; ++k) {
        if (k >= queries) break;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (!map.has(p)) continue;
          store_channels<kPack>(block_grad + k * plan.padded_channels + map.channel(p), query_grad[k] + p * kPack);
        }
      }
    }
  }
}

}  // namespace fusefeat::cuda
