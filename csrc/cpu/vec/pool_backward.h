// Backward of the pools. Scores are computed again by the forward's arithmetic, so one read of the
// rows gives every gradient: with p = exp(score - lse) and ds = p (<grad_out, x - out> + grad_weight - delta),
// grad_x = sum_k p_k grad_out_k + scale ds_k query_k and grad_query_k = scale sum_t ds_k x.
// The product of the difference, rather than the difference of products, keeps its accuracy where one token has
// nearly all the weight and both products are nearly the same.
#pragma once

#include "pool_block.h"

namespace fusefeat {
namespace {

using cpu::BackwardArgs;
using cpu::SplitBag;

template <typename T>
struct BackwardScratch {
  using A = typename AccOf<T>::type;

  Arena arena;
  Block<T> block;
  // [2 * queries][ld]: scores and <grad_out, x>, which become the coefficients ds * scale and p.
  A* products;
  const A** vectors;  // the rows of the query, then those of grad_out, in the order of the products
  const A** centres;  // the rows of out, at the places of grad_out's
  const A** kept_vectors;
  A* kept_coefficients;
  uint8_t* kept;  // [queries][ld], only when queries drop different tokens
  T** grad_rows;
  A* grad_out;  // [queries][channels] when its channels are not contiguous
  A *delta, *ones;
  PairProducts<T> pairs;  // of the rows of the query and of grad_out

  BackwardScratch(const BackwardArgs& args, void* base)
      : arena{static_cast<char*>(base)},
        block(args, arena),
        pairs(by_pairs<T>(args), 2 * args.queries, args.channels, block.ld, true, arena) {
    const int64_t num_queries = args.queries;
    products = arena.take<A>(2 * num_queries * block.ld);
    vectors = arena.take<const A*>(2 * num_queries);
    centres = arena.take<const A*>(2 * num_queries);
    kept_vectors = arena.take<const A*>(2 * num_queries);
    kept_coefficients = arena.take<A>(2 * num_queries + block.capacity);
    kept = arena.take<uint8_t>(num_queries * block.ld);
    grad_rows = arena.take<T*>(block.capacity);
    grad_out = arena.take<A>(args.grad_out_strides.inner == 1 ? 0 : num_queries * args.channels);
    delta = arena.take<A>(num_queries);
    ones = arena.take<A>(num_queries);
    if (base == nullptr) return;
    fill(ones, num_queries, A(1));
    if (args.query == nullptr) return;
    for (int64_t k = 0; k < num_queries; ++k) vectors[k] = static_cast<const A*>(args.query) + k * args.channels;
    if (pairs.active) pairs.set_vectors(vectors, 0, num_queries);
  }
};

template <typename T>
size_t backward_scratch(const BackwardArgs& args) {
  return BackwardScratch<T>(args, nullptr).arena.used;
}

template <typename A>
inline A grad_weight_at(const BackwardArgs& args, int64_t bag, int64_t token, int64_t query) {
  const cpu::Strides& strides = args.grad_weights_strides;
  return static_cast<const A*>(args.grad_weights)[bag * strides.bag + token * strides.token + query * strides.inner];
}

// Sum over tokens of weight times incoming gradient; where the weight is 0 the gradient does not count.
template <typename A>
inline A weight_dot(const BackwardArgs& args, int64_t bag, TokenRange range, int64_t query) {
  const A* weights = static_cast<const A*>(args.weights);
  double sum = 0;
  for (int64_t t = range.begin; t < range.end; ++t) {
    const A weight = weights[token_index(args, bag, t) * args.queries + query];
    if (weight != 0) sum += static_cast<double>(weight) * grad_weight_at<A>(args, bag, t, query);
  }
  return static_cast<A>(sum);
}

template <typename T>
void weight_dots_part(const BackwardArgs& args, const PoolItem& item) {
  using A = typename AccOf<T>::type;
  for (int64_t k = 0; k < args.queries; ++k) {
    static_cast<A*>(args.part_weight_dots)[item.part * args.queries + k] =
        weight_dot<A>(args, item.bag_begin, {item.token_begin, item.token_end}, k);
  }
}

template <typename T>
void weight_dots_sum(const BackwardArgs& args, const SplitBag* splits, int64_t split) {
  using A = typename AccOf<T>::type;
  for (int64_t k = 0; k < args.queries; ++k) {
    double sum = 0;
    for (int64_t part = splits[split].part_begin; part < splits[split].part_end; ++part) {
      sum += static_cast<const A*>(args.part_weight_dots)[part * args.queries + k];
    }
    static_cast<A*>(args.split_weight_dots)[split * args.queries + k] = static_cast<A>(sum);
  }
}

// Rows of grad_out and of out, and delta = sum_t weight * grad_weight, for one bag.
template <typename T>
inline void start_bag(const BackwardArgs& args, BackwardScratch<T>& scratch, const PoolItem& item, int64_t bag) {
  using A = typename AccOf<T>::type;
  const int64_t num_queries = args.queries, channels = args.channels;
  for (int64_t k = 0; k < num_queries; ++k) {
    const cpu::Strides& strides = args.grad_out_strides;
    const A* grad_out = static_cast<const A*>(args.grad_out) + bag * strides.bag + k * strides.token;
    if (strides.inner != 1) {
      A* row = scratch.grad_out + k * channels;
      gather<A>(grad_out, strides.inner, channels, row);
      grad_out = row;
    }
    scratch.vectors[num_queries + k] = grad_out;
    scratch.centres[num_queries + k] = static_cast<const A*>(args.out) + (bag * num_queries + k) * channels;
    scratch.delta[k] = args.grad_weights == nullptr ? A(0)
                       : item.part < 0 ? weight_dot<A>(args, bag, bag_range(args, bag), k)
                                       : static_cast<const A*>(args.split_weight_dots)[item.split * num_queries + k];
  }
  if (!by_pairs<T>(args)) return;
  if (!scratch.pairs.set_vectors(scratch.vectors, num_queries, num_queries)) return;
  const int64_t first = args.query != nullptr ? 0 : num_queries;
  scratch.pairs.pair_vectors(first, 2 * num_queries - first);
  scratch.pairs.widen_vectors(first, 2 * num_queries - first);
  for (int64_t k = num_queries; k < 2 * num_queries; ++k) {
    scratch.delta[k - num_queries] += dot(scratch.vectors[k], scratch.centres[k], channels);
  }
}

// Products become coefficients; a dropped score has both 0.
template <typename A>
inline void coefficients(A* scores, A* dots, int64_t count, double lse, A delta, A scale) {
  using V = VecOf<A>;
  // The difference of near numbers is exact, and the rest of lse follows.
  const A high = static_cast<A>(lse), low = static_cast<A>(lse - static_cast<double>(high));
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const V score = load(scores + i);
    const V p = score == -kInfinity<A> ? V{} : exp_lanes<A>(score - high - low);
    const V ds = p * (load(dots + i) - delta) * scale;
    store(scores + i, score == -kInfinity<A> ? V{} : ds);
    store(dots + i, p);
  }
}

template <typename T, typename S, typename A>
inline void store_grad_scores(
    const Block<T>& block, const A* grads, int64_t num_queries, int64_t begin, int64_t end, S* to) {
  if (block.count < end - begin) __builtin_memset(to, 0, static_cast<size_t>((end - begin) * num_queries) * sizeof(S));
  for (int64_t r = 0; r < block.count; ++r) {
    S* row = to + (block.tokens[r] - begin) * num_queries;
    for (int64_t k = 0; k < num_queries; ++k) from_acc(grads[k * block.ld + r], row + k);
  }
}

// grad_x rows of a block, those of dropped tokens included.
template <typename T>
inline void store_grad_x(
    const BackwardArgs& args, BackwardScratch<T>& scratch, int64_t bag, int64_t begin, int64_t end, bool dropped) {
  using A = typename AccOf<T>::type;
  const Block<T>& block = scratch.block;
  const int64_t num_queries = args.queries, channels = args.channels;
  T* grad_x = static_cast<T*>(args.grad_x) + token_index(args, bag, begin) * channels;
  int64_t next = begin;
  const auto zero_until = [&](int64_t token) {
    if (next < token) {
      __builtin_memset(
          static_cast<void*>(grad_x + (next - begin) * channels), 0,
          static_cast<size_t>((token - next) * channels) * sizeof(T));
    }
    next = token + 1;
  };
  for (int64_t r = 0; r < block.count; ++r) {
    scratch.grad_rows[r] = grad_x + (block.tokens[r] - begin) * channels;
    zero_until(block.tokens[r]);
  }
  zero_until(end);
  if (block.count == 0) return;
  const int64_t first_vector = args.query != nullptr ? 0 : num_queries;
  if (!dropped) {
    const A* products = scratch.products + first_vector * block.ld;
    const int64_t num_vectors = 2 * num_queries - first_vector;
    if (scratch.pairs.combine(scratch.grad_rows, block.count, products, block.ld, num_vectors, args.stream_grad_x)) {
      return;
    }
    combine<A>(
        scratch.grad_rows, block.count, products, block.ld, scratch.vectors + first_vector, num_vectors, channels,
        args.stream_grad_x);
    return;
  }
  for (int64_t r = 0; r < block.count; ++r) {
    int64_t count = 0;
    for (int64_t j = first_vector; j < 2 * num_queries; ++j) {
      if (!scratch.kept[j % num_queries * block.ld + r]) continue;
      scratch.kept_vectors[count] = scratch.vectors[j];
      scratch.kept_coefficients[count++] = scratch.products[j * block.ld + r];
    }
    combine<A>(scratch.grad_rows + r, 1, scratch.kept_coefficients, 1, scratch.kept_vectors, count, channels, false);
  }
}

// grad_query += sum_r ds * scale * row, over one block.
template <typename T, typename Row>
inline void add_grad_query(
    BackwardScratch<T>& scratch, const RowList<Row>& list, int64_t num_queries, int64_t channels, bool first,
    bool dropped, typename AccOf<T>::type* grad_query) {
  using A = typename AccOf<T>::type;
  const Block<T>& block = scratch.block;
  const A* ones = first ? nullptr : scratch.ones;
  if (!dropped) {
    if (!scratch.pairs.template accumulate<true>(list, scratch.products, block.ld, ones, num_queries, grad_query)) {
      accumulate(list, scratch.products, block.ld, ones, num_queries, grad_query, channels);
    }
    return;
  }
  for (int64_t k = 0; k < num_queries; ++k) {
    A* values = scratch.kept_coefficients;
    const auto kept = block.kept(
        list, scratch.products + k * block.ld, values, [&](int64_t r) { return scratch.kept[k * block.ld + r] != 0; });
    accumulate(kept, values, block.ld, ones, 1, grad_query + k * channels, channels);
  }
}

template <typename T>
inline void backward_range(
    const BackwardArgs& args, BackwardScratch<T>& scratch, int64_t bag, TokenRange range,
    typename AccOf<T>::type* grad_query, bool& first) {
  using A = typename AccOf<T>::type;
  const int64_t num_queries = args.queries, channels = args.channels;
  Block<T>& block = scratch.block;
  const double* lse = args.lse + bag * num_queries;
  A *scores = scratch.products, *grad_dots = scratch.products + num_queries * block.ld;
  const bool attention = args.query != nullptr;
  const bool needs_dots = attention || args.grad_scores != nullptr;
  bool empty_query = false;
  for (int64_t k = 0; k < num_queries; ++k) empty_query |= lse[k] == -kInfinity<double>;

  for (int64_t begin = range.begin; begin < range.end; begin += block.capacity) {
    const int64_t end = begin + block.capacity < range.end ? begin + block.capacity : range.end;
    block.list(args, bag, begin, end, scores);
    bool dropped = false;
    if (block.count > 0) {
      if (needs_dots) block.ready_rows(args);
      block.with_rows([&](const auto& list) {
        const int64_t first_vector = attention ? 0 : num_queries;
        const bool paired = needs_dots && scratch.pairs.dots(
                                              list, first_vector, 2 * num_queries - first_vector,
                                              scratch.products + first_vector * block.ld, block.ld);
        if (!paired && attention && num_queries == 1) {
          dots_of_pair<A>(list, scratch.vectors, scratch.centres, channels, scores, block.ld);
        } else if (!paired && needs_dots) {
          if (attention) dots<A, false>(list, scratch.vectors, nullptr, num_queries, channels, scores, block.ld);
          dots<A, true>(
              list, scratch.vectors + num_queries, scratch.centres + num_queries, num_queries, channels, grad_dots,
              block.ld);
        }
        if (attention) {
          const A scale = static_cast<A>(args.scale);
          for (int64_t k = 0; k < num_queries; ++k) {
            for (int64_t r = 0; r < block.count; ++r) scores[k * block.ld + r] *= scale;
          }
        }
        if (empty_query) {
          for (int64_t k = 0; k < num_queries; ++k) {
            if (lse[k] == -kInfinity<double>) fill(scores + k * block.ld, block.count, -kInfinity<A>);
          }
        }
        const bool may_drop = attention || num_queries > 1 || empty_query;
        dropped = may_drop && any_dropped(scores, block.ld, num_queries, block.count);
        if (dropped) {
          for (int64_t k = 0; k < num_queries; ++k) {
            for (int64_t r = 0; r < block.count; ++r) {
              scratch.kept[k * block.ld + r] = scores[k * block.ld + r] != -kInfinity<A>;
            }
          }
        }
        for (int64_t k = 0; k < num_queries; ++k) {
          A* query_dots = grad_dots + k * block.ld;
          if (args.grad_weights != nullptr && needs_dots) {
            for (int64_t r = 0; r < block.count; ++r) {
              query_dots[r] += grad_weight_at<A>(args, bag, block.tokens[r], k);
            }
          }
          coefficients(
              scores + k * block.ld, query_dots, block.count, lse[k], scratch.delta[k],
              attention ? static_cast<A>(args.scale) : A(1));
        }
        if (grad_query != nullptr) {
          add_grad_query(scratch, list, num_queries, channels, first, dropped, grad_query);
          first = false;
        }
      });
    }
    if (args.grad_x != nullptr) store_grad_x(args, scratch, bag, begin, end, dropped);
    if (args.grad_scores != nullptr) {
      const int64_t at = token_index(args, bag, begin) * num_queries;
      if (args.scores_are_acc) {
        store_grad_scores(block, scores, num_queries, begin, end, static_cast<A*>(args.grad_scores) + at);
      } else {
        store_grad_scores(block, scores, num_queries, begin, end, static_cast<T*>(args.grad_scores) + at);
      }
    }
  }
}

template <typename T>
void backward_item(const BackwardArgs& args, const PoolItem& item, int64_t index, void* base) {
  using A = typename AccOf<T>::type;
  BackwardScratch<T> scratch(args, base);
  const int64_t length = args.queries * args.channels;
  A* grad_query = args.grad_query_parts == nullptr ? nullptr : static_cast<A*>(args.grad_query_parts) + index * length;
  bool first = true;
  for (int64_t bag = item.bag_begin; bag < item.bag_end; ++bag) {
    start_bag(args, scratch, item, bag);
    backward_range(args, scratch, bag, item_range(args, item, bag), grad_query, first);
  }
  if (grad_query != nullptr && first) fill(grad_query, length, A(0));
  if (args.stream_grad_x) stream_fence();
}

template <typename T>
void sum_query(
    const void* parts, int64_t items, int64_t length, int64_t begin, int64_t end, bool as_acc, void* grad_query) {
  using A = typename AccOf<T>::type;
  using V = VecOf<A>;
  constexpr int64_t group = 32;  // summed on their own first, for less rounding
  for (int64_t d = begin; d < end; d += kLanes<A>) {
    const int rest = static_cast<int>(end - d < kLanes<A> ? end - d : kLanes<A>);
    V total{};
    for (int64_t i = 0; i < items; i += group) {
      V sum{};
      for (int64_t item = i; item < items && item < i + group; ++item) {
        sum += load_part(static_cast<const A*>(parts) + item * length + d, rest);
      }
      total += sum;
    }
    if (as_acc) {
      store_part(static_cast<A*>(grad_query) + d, total, rest);
    } else {
      store_part(static_cast<T*>(grad_query) + d, total, rest);
    }
  }
}

}  // namespace
}  // namespace fusefeat
