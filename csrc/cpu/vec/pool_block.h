// What forward and backward of the pools share: where tokens, scores and bags lie, and the block of
// token rows that both work through.
#pragma once

#include "../attention_pool.h"
#include "pair_products.h"

namespace fusefeat {
namespace {

using cpu::PoolArgs;
using cpu::PoolItem;

// The token types by what they are loaded as.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// Hands out aligned arrays of one allocation; from a null base it only counts the bytes.
struct Arena {
  char* base;
  size_t used = 0;

  template <typename E>
  E* take(int64_t count) {
    E* result = base == nullptr ? nullptr : reinterpret_cast<E*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(E)), 64));
    return result;
  }
};

struct TokenRange {
  int64_t begin, end;
};

inline int64_t offset_at(const PoolArgs& args, int64_t i) {
  const int64_t value = args.offsets_are_64_bit ? static_cast<const int64_t*>(args.offsets)[i * args.offsets_stride]
                                                : static_cast<const int32_t*>(args.offsets)[i * args.offsets_stride];
  return value < 0 ? 0 : value > args.tokens ? args.tokens : value;
}

inline TokenRange bag_range(const PoolArgs& args, int64_t bag) {
  if (!args.packed) return {0, args.tokens};
  const int64_t begin = offset_at(args, bag), end = offset_at(args, bag + 1);
  return {begin, end < begin ? begin : end};
}

inline TokenRange item_range(const PoolArgs& args, const PoolItem& item, int64_t bag) {
  return item.part < 0 ? bag_range(args, bag) : TokenRange{item.token_begin, item.token_end};
}

// Position of a token in contiguous per-token results, in tokens.
inline int64_t token_index(const PoolArgs& args, int64_t bag, int64_t token) {
  return args.packed ? token : bag * args.tokens + token;
}

template <typename E>
inline void fill(E* to, int64_t count, E value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Whether the products are those of pairs.
template <typename T>
inline bool by_pairs(const PoolArgs& args) {
  // The vectors of a bag, packed, stay in the second-level cache.
  constexpr int64_t most = 1 << 16;
  return PairProducts<T>::kAvailable && args.rounds_to_tokens && args.x_strides.inner == 1 &&
         args.queries * args.channels <= most;
}

// Up to `capacity` kept tokens of one bag, their rows, and [vectors][ld] products of the rows.
template <typename T>
struct Block {
  using A = typename AccOf<T>::type;

  int64_t capacity, ld;
  bool needs_tile;  // rows are brought into a tile of contiguous acc first
  int64_t ahead;    // bytes from a row to its successor in a later block
  int64_t count = 0;
  int64_t* tokens;
  const T** rows;
  const A** tile_rows;
  A* tile;
  void* kept_rows;  // pointers, for queries that drop different tokens

  Block(const PoolArgs& args, Arena& arena) {
    // The rows are read twice, the second time from the nearest cache. With few channels a block
    // still has rows enough to fill the vectors of scores.
    needs_tile = args.x_strides.inner != 1 || (sizeof(T) != sizeof(A) && args.queries > 4 && !by_pairs<T>(args));
    const int64_t row_bytes = (args.channels > 0 ? args.channels : 1) * (needs_tile ? sizeof(A) : sizeof(T));
    const int64_t budget = args.queries < 4 ? 16 << 10 : 32 << 10;
    const int64_t fit = budget / row_bytes / 8 * 8;
    capacity = row_bytes > 4096 ? kRowStep : fit < 8 ? 8 : fit > 64 ? 64 : fit;
    constexpr int64_t least_ahead = 16 << 10;
    const int64_t step = capacity * args.x_strides.token * static_cast<int64_t>(sizeof(T));
    const int64_t distance = step < 0 ? -step : step;
    ahead = distance == 0 ? 0 : (least_ahead + distance - 1) / distance * step;
    ld = round_up(capacity, kLanes<A>);
    tokens = arena.take<int64_t>(capacity);
    rows = arena.take<const T*>(capacity);
    tile_rows = arena.take<const A*>(needs_tile ? capacity : 0);
    tile = arena.take<A>(needs_tile ? capacity * args.channels : 0);
    kept_rows = arena.take<const void*>(capacity);
  }

  // Lists the kept tokens of [begin, end). Given scores go to scores[k][lane]; a token whose scores are
  // all -inf is as good as masked.
  void list(const PoolArgs& args, int64_t bag, int64_t begin, int64_t end, A* scores) {
    const T* x = static_cast<const T*>(args.x) + bag * args.x_strides.bag;
    const uint8_t* mask = args.mask == nullptr ? nullptr : args.mask + bag * args.mask_bag;
    count = 0;
    for (int64_t t = begin; t < end; ++t) {
      if (mask != nullptr && mask[t * args.mask_token] == 0) continue;
      if (args.scores != nullptr && !read_scores(args, bag, t, scores + count)) continue;
      tokens[count] = t;
      rows[count] = x + t * args.x_strides.token;
      ++count;
    }
  }

  // Calls use(RowList) with rows of T or of the tile's acc.
  template <typename Use>
  void with_rows(const Use& use) const {
    if (needs_tile) {
      use(RowList<A>{tile_rows, count, 0});
    } else {
      use(RowList<T>{rows, count, ahead});
    }
  }

  // The rows that keep(r) says yes to, and their values moved to the front of kept_values.
  template <typename Row, typename Keep>
  RowList<Row> kept(const RowList<Row>& list, const A* values, A* kept_values, const Keep& keep) const {
    const Row** rows_kept = static_cast<const Row**>(kept_rows);
    int64_t kept_count = 0;
    for (int64_t r = 0; r < list.count; ++r) {
      if (!keep(r)) continue;
      rows_kept[kept_count] = list.rows[r];
      kept_values[kept_count++] = values[r];
    }
    return {rows_kept, kept_count, 0};
  }

  // Brings the rows into the tile. Readers in steps of rows find the last one again behind the end.
  void ready_rows(const PoolArgs& args) {
    for (int64_t r = count; r < round_up(count, kRowStep); ++r) rows[r] = rows[count - 1];
    if (!needs_tile) return;
    for (int64_t r = 0; r < count; ++r) {
      tile_rows[r] = tile + r * args.channels;
      gather<A>(rows[r], args.x_strides.inner, args.channels, tile + r * args.channels, ahead);
    }
    for (int64_t r = count; r < round_up(count, kRowStep); ++r) tile_rows[r] = tile_rows[count - 1];
  }

 private:
  bool read_scores(const PoolArgs& args, int64_t bag, int64_t t, A* scores) {
    const cpu::Strides& strides = args.scores_strides;
    const int64_t offset = bag * strides.bag + t * strides.token;
    bool kept = false;
    for (int64_t k = 0; k < args.queries; ++k) {
      const int64_t i = offset + k * strides.inner;
      const A score = args.scores_are_acc ? static_cast<const A*>(args.scores)[i]
                                          : static_cast<A>(to_acc(static_cast<const T*>(args.scores)[i]));
      scores[k * ld] = score;
      kept |= score != -kInfinity<A>;
    }
    return kept;
  }
};

// Whether a score of the first `count` lanes is -inf.
template <typename A>
inline bool any_dropped(const A* scores, int64_t ld, int64_t num_queries, int64_t count) {
  IntOf<A> dropped{};
  for (int64_t k = 0; k < num_queries; ++k) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      dropped |= (load(scores + k * ld + i) == -kInfinity<A>)&lanes_below<A>(i, count);
    }
  }
  return any_lane(dropped);
}

}  // namespace
}  // namespace fusefeat
