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
  const double* lse = nullptr;         // [bags, queries]
  const void* delta = nullptr;         // [bags, queries]
  ScoreRows grad_weights;              // null data: none came in
  const void* given_scores = nullptr;  // [tokens, queries]; set, with given_dots, when rows are sliced
  const void* given_dots = nullptr;    // [tokens, queries]: <g, x>
  void* grad_tokens = nullptr;         // [tokens, channels], or null
  void* grad_scores = nullptr;         // [tokens, queries], or null
  bool grad_scores_in_acc = false;
  void* grad_query = nullptr;  // [blocks, padded_channels] for a single query, or null
};

template <typename Traits, bool kAttention>
__global__ void __launch_bounds__(Traits::kMaxThreads, 1) pool_backward(const BackwardArgs args) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  constexpr int kQueries = Traits::kQueries, kRows = Traits::kBackwardRows, kChannels = Traits::kChannels;
  constexpr bool kSumsQuery = kAttention && kQueries == 1;
  constexpr bool kLoops = Traits::kAccess != Access::kOne;  // over the queries
  constexpr int kPack = Traits::kPack, kPacks = Traits::kPacks;
  DYNAMIC_SHARED(A, shared);

  const PoolPlan& plan = args.plan;
  const int64_t queries = kLoops ? args.queries : 1;
  const Bags& bags = args.bags;
  const Team team(plan.team);
  const ChannelMap<Traits> map(team, args.channels);
  const int worker = plan.workers > 1 ? threadIdx.x / kWarp : 0;
  const int64_t first = bags.limit(blockIdx.x * plan.block_tokens + worker * plan.worker_tokens);
  const int length = static_cast<int>(bags.limit(first + plan.worker_tokens) - first);
  const bool writes_scores = args.grad_scores != nullptr && team.lane == 0 && blockIdx.y == 0;
  const bool wants_dots = kAttention || args.grad_scores != nullptr;

  const auto store_token = [&](int64_t token, const A* gradient) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!map.has(p)) continue;
      Pack<T, kPack> pack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) pack.set(i, gradient[p * kPack + i]);
      store_pack(static_cast<T*>(args.grad_tokens) + token * args.channels + map.base + map.channel(p), pack);
    }
  };

  // With one query, its row is shared and the bag's gradient stays in registers; with many they are
  // read again, from cache, for every few tokens.
  A query[kChannels], gradient[kChannels];
  const auto load_rows = [&](int64_t bag, int64_t k) {
    if constexpr (kAttention && kLoops) load_query<Traits>(query, args.query, k * args.channels + map.base, map);
    const int64_t row = (bag * queries + k) * args.channels + map.base;
    load_channels<Traits>(gradient, static_cast<const A*>(args.grad_out) + row, map);
  };
  A query_grad[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) query_grad[c] = 0;
  const SharedLayout<Traits> layout(plan, kAttention, true);
  const SharedQuery<Traits> only_query(shared + layout.query, team);
  if constexpr (kAttention && !kLoops) {
    if (static_cast<int>(threadIdx.x) < team.size) {
      load_query<Traits>(query, args.query, map.base, map);
      only_query.store(0, query);
    }
    __syncthreads();
  }
  int turn = 0;

  bags.walk(
      first, length,
      [&](int64_t bag, int begin, int stop) {
        if constexpr (!kLoops) load_rows(bag, 0);
        const T* tokens = static_cast<const T*>(args.tokens.data) + args.tokens.layout.row(bags, bag, first) +
                          map.base * args.tokens.layout.inner;
        const auto* mask = reinterpret_cast<const unsigned char*>(args.mask.data);
        if (mask != nullptr) mask += args.mask.layout.row(bags, bag, first);
        const int64_t scores = kAttention ? 0 : args.scores.layout.row(bags, bag, first);
        const A* grad_weights = static_cast<const A*>(args.grad_weights.data);
        if (grad_weights != nullptr) grad_weights += args.grad_weights.layout.row(bags, bag, first);

        for (int base = begin + team.row; base - team.row < stop; base += kRows * team.count) {
          int keep[kRows];
          Pack<T, kPack> packs[kRows][kPacks];
          A token_grad[kRows][kChannels];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int i = base + r * team.count;
            keep[r] = i < stop;
            // Loaded as numbers, not tested one by one: the loads are to be under way together.
            if (mask != nullptr && keep[r]) keep[r] = mask[i * args.mask.layout.token];
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const bool read = keep[r] && (args.given_dots == nullptr ? wants_dots : args.grad_query != nullptr);
            const T* row = tokens + (base + r * team.count) * args.tokens.layout.token;
            load_token<Traits>(packs[r], row, args.tokens.layout.inner, read, map);
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
              if constexpr (kLoops) load_rows(bag, query_of(k));
              A dots[kRows];
              if constexpr (kAttention && !kLoops) partial_dots<Traits>(dots, packs, only_query, 0);
#pragma unroll
              for (int r = 0; r < kRows; ++r) {
                if constexpr (kAttention) score(r, k) = kLoops ? partial_dot<Traits>(packs[r], query) : dots[r];
                dot(r, k) = partial_dot<Traits>(packs[r], gradient);
              }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) forget_packs<Traits>(packs[r]);
            if (args.given_dots == nullptr && wants_dots) {
              if constexpr (kAttention) {
                team.sum(terms, shared + layout.exchange, turn);
              } else {
                A dots[kRows * kQueries];
#pragma unroll
                for (int i = 0; i < kRows * kQueries; ++i) dots[i] = terms[kRows * kQueries + i];
                team.sum(dots, shared + layout.exchange, turn);
#pragma unroll
                for (int i = 0; i < kRows * kQueries; ++i) terms[kRows * kQueries + i] = dots[i];
              }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const int i = base + r * team.count;
#pragma unroll
              for (int k = 0; k < kQueries; ++k) {
                const int64_t row = bag * queries + query_of(k);
                const int64_t at = (first + i) * queries + query_of(k);
                A s = neg_inf<A>();
                if (keep[r] && query0 + k < queries) {
                  if (args.given_scores != nullptr) {
                    s = static_cast<const A*>(args.given_scores)[at];
                  } else if constexpr (kAttention) {
                    s = score(r, k) * static_cast<A>(args.scale);
                  } else {
                    const int64_t place =
                        scores + i * args.scores.layout.token + query_of(k) * args.scores.layout.inner;
                    s = load_either<T>(args.scores.data, place, args.scores.in_acc);
                  }
                }
                // ds is NaN where p is, and exactly 0 for a dropped token.
                A p = 0, ds = 0;
                if (s != neg_inf<A>()) {
                  kept |= 1u << (r * kQueries + k);
                  p = weight_of(s, args.lse[row]);
                  if (wants_dots) {
                    A dp = args.given_dots != nullptr ? static_cast<const A*>(args.given_dots)[at] : dot(r, k);
                    if (grad_weights != nullptr) {
                      const TokenLayout& layout = args.grad_weights.layout;
                      dp += grad_weights[i * layout.token + query_of(k) * layout.inner];
                    }
                    ds = p * (dp - static_cast<const A*>(args.delta)[row]);
                  }
                  if (kSumsQuery && args.grad_query != nullptr) {
#pragma unroll
                    for (int c = 0; c < kChannels; ++c) {
                      query_grad[c] += ds * packs[r][c / kPack].get(c % kPack);
                    }
                  }
                }
                if (writes_scores && i < stop && query0 + k < queries) {
                  store_either<T>(args.grad_scores, at, ds, args.grad_scores_in_acc);
                }
                score(r, k) = p;
                dot(r, k) = ds * static_cast<A>(args.scale);
              }
            }
            if (args.grad_tokens == nullptr) continue;
#pragma unroll
            for (int k = 0; k < kQueries; ++k) {
              if constexpr (kLoops) load_rows(bag, query_of(k));
#pragma unroll
              for (int r = 0; r < kRows; ++r) {
                const int i = base + r * team.count;
                if (kept >> (r * kQueries + k) & 1) {
#pragma unroll
                  for (int c = 0; c < kChannels; ++c) {
                    token_grad[r][c] += score(r, k) * gradient[c];
                    if constexpr (kAttention && kLoops) token_grad[r][c] += dot(r, k) * query[c];
                    if constexpr (kAttention && !kLoops) token_grad[r][c] += dot(r, k) * only_query.at(0, c);
                  }
                  if (!kLoops && i < stop) store_token(first + i, token_grad[r]);
                } else if (!kLoops && i < stop) {
                  const A zeros[kChannels] = {};
                  store_token(first + i, zeros);
                }
              }
            }
          }
          if constexpr (kLoops) {
            if (args.grad_tokens == nullptr) continue;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const int i = base + r * team.count;
              if (i < stop) store_token(first + i, token_grad[r]);
            }
          }
        }
      },
      [&](int begin, int stop) {
        const A zeros[kChannels] = {};
        for (int i = begin + team.row; i < stop; i += team.count) {
          if (args.grad_tokens != nullptr) store_token(first + i, zeros);
          for (int64_t k = 0; writes_scores && k < queries; ++k) {
            store_either<T>(args.grad_scores, (first + i) * queries + k, A(0), args.grad_scores_in_acc);
          }
        }
      });

  if constexpr (kSumsQuery) {
    if (args.grad_query == nullptr) return;
    for (int offset = team.size; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) query_grad[c] += __shfl_xor_sync(kAllLanes, query_grad[c], offset);
    }
    A* block_grad = static_cast<A*>(args.grad_query) + blockIdx.x * plan.padded_channels + map.base;
    A* worker_grad = plan.workers > 1 ? shared + layout.sums + worker * plan.padded_channels : block_grad;
    if (team.row == 0) {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (map.has(p)) store_channels<kPack>(worker_grad + map.channel(p), query_grad + p * kPack);
      }
    }
    if (plan.workers == 1) return;
    __syncthreads();
    for (int c = threadIdx.x; c < plan.padded_channels; c += blockDim.x) {
      A sum = 0;
      for (int w = 0; w < plan.workers; ++w) sum += shared[layout.sums + w * plan.padded_channels + c];
      block_grad[c] = sum;
    }
  }
}

}  // namespace fusefeat::cuda
