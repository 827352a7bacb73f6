// Forward of the pools: an online softmax over blocks of rows, each row read from memory once.
#pragma once

#include "pool_block.h"

namespace fusefeat {
namespace {

using cpu::ForwardArgs;
using cpu::SplitBag;

template <typename T>
struct ForwardScratch {
  using A = typename AccOf<T>::type;

  Arena arena;
  Block<T> block;
  A* scores;          // [queries][ld], then exp(score - peak)
  A *peak, *sum;      // [queries], of the bag so far
  A* rescale;         // [queries], what a block's new peak does to the sums before it
  const A** queries;  // [queries] rows of the query
  A *base_pattern, *factor_pattern;
  PairProducts<T> pairs;

  ForwardScratch(const ForwardArgs& args, void* base)
      : arena{static_cast<char*>(base)},
        block(args, arena),
        pairs(by_pairs<T>(args), args.queries, args.channels, block.ld, false, arena) {
    const int64_t num_queries = args.queries;
    scores = arena.take<A>(num_queries * block.ld);
    peak = arena.take<A>(num_queries);
    sum = arena.take<A>(num_queries);
    rescale = arena.take<A>(num_queries);
    queries = arena.take<const A*>(num_queries);
    base_pattern = arena.take<A>(kLanes<A> * kLanes<A>);
    factor_pattern = arena.take<A>(kLanes<A> * kLanes<A>);
    if (base == nullptr || args.query == nullptr) return;
    for (int64_t k = 0; k < num_queries; ++k) queries[k] = static_cast<const A*>(args.query) + k * args.channels;
    if (!pairs.active) return;
    pairs.set_vectors(queries, 0, num_queries);
    pairs.widen_vectors(0, num_queries);
  }
};

template <typename T>
size_t forward_scratch(const ForwardArgs& args) {
  return ForwardScratch<T>(args, nullptr).arena.used;
}

// One query's scores of a block become exp(score - peak). Returns the factor for everything summed before.
// Comparisons never pick a NaN, so the peak stays a number, and a NaN score shows in the sum.
template <typename A>
inline A softmax_step(A* scores, int64_t count, A& peak, A& sum) {
  using V = VecOf<A>;
  constexpr int lanes = kLanes<A>;
  V top = splat<A>(-kInfinity<A>);
  for (int64_t i = 0; i < count; i += lanes) {
    V s = load(scores + i);
    if (i + lanes > count) {
      s = lanes_below<A>(i, count) ? s : splat<A>(-kInfinity<A>);
      store(scores + i, s);
    }
    top = s > top ? s : top;
  }
  const A block_peak = max_lanes(top);
  const A new_peak = block_peak > peak ? block_peak : peak;
  const A base = new_peak == -kInfinity<A> ? A(0) : new_peak;
  const A rescale = new_peak == peak ? A(1) : exp_one<A>(peak - base);
  V total{};
  for (int64_t i = 0; i < count; i += lanes) {
    const V p = exp_lanes<A>(load(scores + i) - base);
    store(scores + i, p);
    total += p;
  }
  peak = new_peak;
  sum = sum * rescale + sum_lanes(total);
  return rescale;
}

// Scores of the block to the weights, [tokens, queries]; those of dropped tokens are -inf.
template <typename T, typename A>
inline void store_raw_weights(
    const Block<T>& block, const A* scores, int64_t num_queries, int64_t begin, int64_t end, A* weights) {
  if (block.count < end - begin) fill(weights, (end - begin) * num_queries, -kInfinity<A>);
  for (int64_t r = 0; r < block.count; ++r) {
    A* to = weights + (block.tokens[r] - begin) * num_queries;
    for (int64_t k = 0; k < num_queries; ++k) to[k] = scores[k * block.ld + r];
  }
}

// The softmax and the weighted sum over tokens [begin, end) of one bag, into out [queries, channels] (not
// normalised) and the scratch's peak and sum.
template <typename T>
inline void forward_range(
    const ForwardArgs& args, ForwardScratch<T>& scratch, int64_t bag, TokenRange range, typename AccOf<T>::type* out) {
  using A = typename AccOf<T>::type;
  const int64_t num_queries = args.queries, channels = args.channels;
  Block<T>& block = scratch.block;
  A* scores = scratch.scores;
  fill(scratch.peak, num_queries, -kInfinity<A>);
  fill(scratch.sum, num_queries, A(0));
  bool first = true;
  for (int64_t begin = range.begin; begin < range.end; begin += block.capacity) {
    const int64_t end = begin + block.capacity < range.end ? begin + block.capacity : range.end;
    block.list(args, bag, begin, end, scores);
    A* weights =
        args.weights == nullptr ? nullptr : static_cast<A*>(args.weights) + token_index(args, bag, begin) * num_queries;
    if (block.count == 0) {
      if (weights != nullptr) fill(weights, (end - begin) * num_queries, -kInfinity<A>);
      continue;
    }
    block.ready_rows(args);
    block.with_rows([&](const auto& list) {
      if (args.query != nullptr) {
        if (!scratch.pairs.dots(list, 0, num_queries, scores, block.ld)) {
          dots<A, false>(list, scratch.queries, nullptr, num_queries, channels, scores, block.ld);
        }
        const A scale = static_cast<A>(args.scale);
        for (int64_t k = 0; k < num_queries; ++k) {
          for (int64_t r = 0; r < block.count; ++r) scores[k * block.ld + r] *= scale;
        }
      }
      if (weights != nullptr) store_raw_weights(block, scores, num_queries, begin, end, weights);
      const bool may_drop = args.query != nullptr || num_queries > 1;
      if (!may_drop || !any_dropped(scores, block.ld, num_queries, block.count)) {
        for (int64_t k = 0; k < num_queries; ++k) {
          scratch.rescale[k] = softmax_step(scores + k * block.ld, block.count, scratch.peak[k], scratch.sum[k]);
        }
        const A* rescale = first ? nullptr : scratch.rescale;
        // A few queries wait for memory anyway; with many the products are what takes the time. Given scores have no
        // query, whose gradient is the sum that cancels.
        const bool done =
            args.query != nullptr && num_queries < 4
                ? scratch.pairs.template accumulate<true>(list, scores, block.ld, rescale, num_queries, out)
                : scratch.pairs.template accumulate<false>(list, scores, block.ld, rescale, num_queries, out);
        if (!done) {
          accumulate(list, scores, block.ld, rescale, num_queries, out, channels);
        }
      } else {
        // Every query on the rows it keeps: a dropped row must not be touched, 0 * inf is NaN.
        for (int64_t k = 0; k < num_queries; ++k) {
          A* row_scores = scores + k * block.ld;
          const auto kept =
              block.kept(list, row_scores, row_scores, [&](int64_t r) { return row_scores[r] != -kInfinity<A>; });
          const A rescale = softmax_step(row_scores, kept.count, scratch.peak[k], scratch.sum[k]);
          accumulate(kept, row_scores, block.ld, first ? nullptr : &rescale, 1, out + k * channels, channels);
        }
      }
    });
    first = false;
  }
  if (first) fill(out, num_queries * channels, A(0));
}

// Raw scores of `count` tokens become exp(score - peak) / sum.
template <typename T>
inline void normalise(
    ForwardScratch<T>& scratch, typename AccOf<T>::type* weights, int64_t count, int64_t num_queries,
    const typename AccOf<T>::type* peak, const typename AccOf<T>::type* sum) {
  using A = typename AccOf<T>::type;
  using V = VecOf<A>;
  constexpr int lanes = kLanes<A>;
  const auto weight = [](V score, V base, V factor) {
    return score == -kInfinity<A> ? V{} : exp_lanes<A>(score - base) * factor;
  };
  if (num_queries < lanes) {
    // The queries' values repeat every num_queries vectors.
    A *base = scratch.base_pattern, *factor = scratch.factor_pattern;
    const int64_t period = num_queries * lanes, length = count * num_queries;
    for (int64_t i = 0; i < period && i < length + lanes; ++i) {
      base[i] = peak[i % num_queries];
      factor[i] = 1 / sum[i % num_queries];
    }
    int64_t phase = 0;
    for (int64_t i = 0; i < length; i += lanes) {
      const V b = load(base + phase), f = load(factor + phase);
      if (i + lanes <= length) {
        store(weights + i, weight(load(weights + i), b, f));
      } else {
        const int rest = static_cast<int>(length - i);
        store_part(weights + i, weight(load_part(weights + i, rest), b, f), rest);
      }
      phase = phase + lanes == period ? 0 : phase + lanes;
    }
    return;
  }
  for (int64_t t = 0; t < count; ++t) {
    A* row = weights + t * num_queries;
    for (int64_t k = 0; k < num_queries; k += lanes) {
      const int rest = num_queries - k < lanes ? static_cast<int>(num_queries - k) : lanes;
      if (rest == lanes) {
        store(row + k, weight(load(row + k), load(peak + k), 1 / load(sum + k)));
      } else {
        const V score = load_part(row + k, rest), base = load_part(peak + k, rest), total = load_part(sum + k, rest);
        store_part(row + k, weight(score, base, 1 / total), rest);
      }
    }
  }
}

// In double: a float near a large peak would leave exp(score - lse) with an error of the peak's rounding.
template <typename A>
inline double log_sum(A peak, A sum) {
  return sum == 0 ? -kInfinity<double> : static_cast<double>(peak) + log_one(static_cast<double>(sum));
}

template <typename T>
void forward_item(const ForwardArgs& args, const PoolItem& item, void* base) {
  using A = typename AccOf<T>::type;
  ForwardScratch<T> scratch(args, base);
  const int64_t num_queries = args.queries, channels = args.channels;
  if (item.part >= 0) {
    A* out = static_cast<A*>(args.part_out) + item.part * num_queries * channels;
    forward_range(args, scratch, item.bag_begin, {item.token_begin, item.token_end}, out);
    for (int64_t k = 0; k < num_queries; ++k) {
      static_cast<A*>(args.part_peak)[item.part * num_queries + k] = scratch.peak[k];
      static_cast<A*>(args.part_sum)[item.part * num_queries + k] = scratch.sum[k];
    }
    return;
  }
  for (int64_t bag = item.bag_begin; bag < item.bag_end; ++bag) {
    const TokenRange range = bag_range(args, bag);
    A* out = static_cast<A*>(args.out) + bag * num_queries * channels;
    double* lse = args.lse + bag * num_queries;
    forward_range(args, scratch, bag, range, out);
    for (int64_t k = 0; k < num_queries; ++k) {
      lse[k] = log_sum(scratch.peak[k], scratch.sum[k]);
      if (scratch.sum[k] == 0) continue;  // nothing kept: out is 0 already
      const A factor = 1 / scratch.sum[k];
      A* row = out + k * channels;
      for (int64_t d = 0; d < channels; ++d) row[d] *= factor;
    }
    if (args.weights != nullptr) {
      A* weights = static_cast<A*>(args.weights) + token_index(args, bag, range.begin) * num_queries;
      normalise(scratch, weights, range.end - range.begin, num_queries, scratch.peak, scratch.sum);
    }
  }
}

template <typename T>
void combine_parts(
    const ForwardArgs& args, const SplitBag* splits, int64_t split, int64_t query, int64_t begin, int64_t end) {
  using A = typename AccOf<T>::type;
  const int64_t num_queries = args.queries, channels = args.channels;
  const SplitBag& bag = splits[split];
  const A* peaks = static_cast<const A*>(args.part_peak) + query;
  const A* sums = static_cast<const A*>(args.part_sum) + query;
  A peak = -kInfinity<A>;
  for (int64_t part = bag.part_begin; part < bag.part_end; ++part) {
    const A part_peak = peaks[part * num_queries];
    peak = part_peak > peak ? part_peak : peak;
  }
  const A base = peak == -kInfinity<A> ? A(0) : peak;
  A* out = static_cast<A*>(args.out) + (bag.bag * num_queries + query) * channels;
  for (int64_t d = begin; d < end; ++d) out[d] = 0;
  A sum = 0;
  for (int64_t part = bag.part_begin; part < bag.part_end; ++part) {
    const A part_sum = sums[part * num_queries];
    if (part_sum == 0) continue;
    const A factor = exp_one<A>(peaks[part * num_queries] - base);
    sum += part_sum * factor;
    const A* part_out = static_cast<const A*>(args.part_out) + (part * num_queries + query) * channels;
    for (int64_t d = begin; d < end; ++d) out[d] += part_out[d] * factor;
  }
  if (sum != 0) {
    const A factor = 1 / sum;
    for (int64_t d = begin; d < end; ++d) out[d] *= factor;
  }
  if (begin > 0) return;
  args.lse[bag.bag * num_queries + query] = log_sum(peak, sum);
  static_cast<A*>(args.split_peak)[split * num_queries + query] = peak;
  static_cast<A*>(args.split_sum)[split * num_queries + query] = sum;
}

template <typename T>
void normalise_part(const ForwardArgs& args, const PoolItem& item, void* base) {
  using A = typename AccOf<T>::type;
  ForwardScratch<T> scratch(args, base);
  const int64_t num_queries = args.queries;
  A* weights = static_cast<A*>(args.weights) + token_index(args, item.bag_begin, item.token_begin) * num_queries;
  normalise(
      scratch, weights, item.token_end - item.token_begin, num_queries,
      static_cast<const A*>(args.split_peak) + item.split * num_queries,
      static_cast<const A*>(args.split_sum) + item.split * num_queries);
}

}  // namespace
}  // namespace fusefeat
