// Tiles of logits z = margin * (row . weight + bias): [feature][row of the strip], in acc.
#pragma once

#include "pack.h"

namespace fusefeat {
namespace {

inline int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline int64_t max_of(int64_t a, int64_t b) {
  return a > b ? a : b;
}

inline int64_t blocks_of(int64_t length, int64_t block) {
  return (length + block - 1) / block;
}

template <typename A, bool kPairs>
inline int64_t packed_depth(int64_t channels) {
  return kPairs ? (channels + 1) / 2 : channels;
}

// Where a strip of the packed rows of a chunk begins.
template <typename A, bool kPairs>
inline const A* packed_strip(const Logits& logits, const void* packed, int64_t strip) {
  return static_cast<const A*>(packed) + strip * packed_depth<A, kPairs>(logits.depth_block) * kStrip<A>;
}

// Elements of a packed block of weights.
template <typename A, bool kPairs>
inline int64_t packed_weight_length(const Logits& logits) {
  return blocks_of(logits.depth_block, kStrip<A> * (kPairs ? 2 : 1)) * logits.block * kStrip<A>;
}

// Packed channels that are summed in one go: partial sums keep the rounding of long sums down.
constexpr int64_t kSummed = 256;

// A block of weights, channels [begin, end), and where it is packed to, unless it can be multiplied as it is: packing
// costs what little rows do not make up for.
template <typename A, bool kPairs>
struct WeightBlock {
  const Logits& logits;
  int64_t first, features, begin, end;
  A* packed;
  const A* direct = nullptr;
  int64_t row_stride = 0;

  WeightBlock(const Logits& logits_, int64_t first_, int64_t features_, int64_t begin_, int64_t end_, A* packed_)
      : logits(logits_), first(first_), features(features_), begin(begin_), end(end_), packed(packed_) {
    using T = Operand<A, kPairs>;
    constexpr int64_t pair = kPairs ? 2 : 1, set = 2048 / static_cast<int64_t>(sizeof(T));
    const int64_t stride = logits.weight.row_stride;
    if ((end - begin) % pair != 0 || stride % pair != 0 || stride % set == 0) return;
    direct = reinterpret_cast<const A*>(RowRange{&logits, true, first, features}.template direct<T>(0, begin));
    row_stride = stride / pair;
  }
};

// One strip of rows times a block of weights. Starts from `from` when given (earlier channels), and applies margin and
// bias when these are the last channels. The first strip of a task packs each tile of weights just before it is
// multiplied: what comes next is on its way from memory meanwhile.
template <typename A, bool kPairs>
inline void logits_tile(
    const WeightBlock<A, kPairs>& block, bool pack, const A* rows, const A* from, bool last, A* to) {
  constexpr int strip = kStrip<A>;
  const Logits& logits = block.logits;
  const int64_t features = block.features, first_feature = block.first;
  const int64_t depth = packed_depth<A, kPairs>(block.end - block.begin);
  const A* weights = block.packed;
  const VecOf<A> margin = splat<A>(static_cast<A>(logits.margin));
  const A* bias = logits.bias == nullptr ? nullptr : static_cast<const A*>(logits.bias) + first_feature;
  for_row_tiles(features, [&]<int kRows>(int64_t f) {
    VecOf<A> sum[kRows][2];
    const A* earlier = from == nullptr ? nullptr : from + f * strip;
    Ahead ahead;
    if (pack) {
      if (block.direct == nullptr) {
        const RowRange range{&logits, true, first_feature, features};
        pack_by_rows<A, kPairs>(range, f, f + kRows, block.begin, block.end, block.packed);
      }
      const int64_t next = first_feature + f + kRows, end = min_of(next + kTileRows, first_feature + features);
      ahead = Ahead(logits.weight, next, end, block.begin, block.end);
    }
    const int64_t lines = ahead.lines() * strip / (depth + 1) + 1;
    for (int64_t k = 0;; k += kSummed) {
      clear_tile<A, kRows>(sum);
      const auto beside = [&](int64_t) { ahead.ask(lines); };
      if (block.direct != nullptr) {
        multiply_rows<A, kPairs, kRows, strip>(
            block.direct + f * block.row_stride + k, strip, block.row_stride, rows + k * strip,
            min_of(kSummed, depth - k), sum, beside);
      } else {
        multiply_rows<A, kPairs, kRows, strip>(
            weights + k * features + f * strip, features * strip, strip, rows + k * strip, min_of(kSummed, depth - k),
            sum, beside);
      }
      if (earlier != nullptr) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          sum[r][0] += load(earlier + r * strip);
          sum[r][1] += load(earlier + r * strip + kLanes<A>);
        }
      }
      if (k + kSummed >= depth) break;
      earlier = to + f * strip;
      store_tile<A, kRows>(to + f * strip, strip, strip, false, sum);
    }
    if (last) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VecOf<A> b = bias == nullptr ? VecOf<A>{} : splat<A>(bias[f + r]);
        sum[r][0] = margin * (sum[r][0] + b);
        sum[r][1] = margin * (sum[r][1] + b);
      }
    }
    store_tile<A, kRows>(to + f * strip, strip, strip, false, sum);
  });
}

// A tile of logits as it would be read again from float16.
template <typename A>
inline void round_tile(int64_t features, A* z) {
  for (int64_t i = 0; i < features * kStrip<A>; i += kLanes<A>) store(z + i, in_float16<A>(load(z + i)));
}

// Kept logits lie in strips of 128 bytes on every instruction set, the last one as narrow as its rows.
template <typename A>
struct KeptStrip {
  int64_t offset, width;

  KeptStrip(int64_t features, int64_t rows, int64_t row, int64_t feature) {
    constexpr int64_t full = 128 / static_cast<int64_t>(sizeof(A));
    const int64_t head = row / full * full;
    width = min_of(full, rows - head);
    offset = head * features + feature * width + row - head;
  }
};

// Calls body with a typed pointer to element `offset` of kept logits.
template <typename A, typename Body>
inline void with_kept(Scalar type, void* kept, int64_t offset, const Body& body) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (type == Scalar::f16) return body(static_cast<Half*>(kept) + offset);
  }
  body(static_cast<A*>(kept) + offset);
}

// -1 in the lanes of a strip that hold a row.
template <typename A>
inline void valid_lanes(int64_t rows, IntOf<A> (&valid)[2]) {
  const IntOf<A> lane = iota<A>();
  for (int j = 0; j < 2; ++j) valid[j] = lane + j * kLanes<A> < static_cast<int>(rows);
}

template <typename A>
inline int count_lanes(IntOf<A> mask) {
#if defined(FUSEFEAT_ISA_AVX512)
  if constexpr (sizeof(A) == sizeof(float)) return __builtin_popcount(_mm512_movepi32_mask((__m512i)mask));
  return __builtin_popcount(_mm512_movepi64_mask((__m512i)mask));
#else
  int count = 0;
  for (int i = 0; i < kLanes<A>; ++i) count -= static_cast<int>(mask[i]);
  return count;
#endif
}

// Rows of the chunk's strip that exist.
template <typename A>
inline int64_t rows_of_strip(const Chunk& chunk, int64_t strip) {
  return min_of(kStrip<A>, chunk.rows - strip * kStrip<A>);
}

// Zeros where a strip has no row: an infinite weight makes a NaN of a row of zeros.
template <typename A>
inline void clear_lanes(A* tile, int64_t features, int64_t rows) {
  if (rows >= kStrip<A>) return;
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t i = rows; i < kStrip<A>; ++i) tile[f * kStrip<A> + i] = 0;
  }
}

// Columns [begin, begin + features) of a strip of rows of a matrix to a tile, and back; rows that are not there are 0.
template <typename A>
inline void matrix_to_tile(const Matrix& matrix, int64_t row, int64_t rows, int64_t begin, int64_t features, A* tile) {
  constexpr int strip = kStrip<A>, lanes = kLanes<A>;
  for (int64_t f = 0; f < features; f += lanes) {
    const int64_t columns = min_of(lanes, features - f);
    for (int i = 0; i < 2; ++i) {
      alignas(64) A block[lanes * lanes] = {};
      for (int r = 0; r < lanes && i * lanes + r < rows; ++r) {
        row_to_operands<A>(matrix, row + i * lanes + r, begin + f, columns, 0, block + r * lanes);
      }
      VecOf<A> v[lanes];
      for (int r = 0; r < lanes; ++r) v[r] = load(block + r * lanes);
      transpose<A>(v);
      for (int k = 0; k < columns; ++k) store(tile + (f + k) * strip + i * lanes, v[k]);
    }
  }
}

template <typename A, typename T>
inline void tile_to_matrix(const A* tile, int64_t rows, int64_t features, T* to, int64_t row_stride) {
  constexpr int strip = kStrip<A>, lanes = kLanes<A>;
  for (int64_t f = 0; f < features; f += lanes) {
    const int columns = static_cast<int>(min_of(lanes, features - f));
    for (int i = 0; i < 2; ++i) {
      VecOf<A> v[lanes];
      for (int k = 0; k < lanes; ++k) v[k] = k < columns ? load(tile + (f + k) * strip + i * lanes) : VecOf<A>{};
      transpose<A>(v);
      for (int r = 0; r < lanes && i * lanes + r < rows; ++r) {
        T* row = to + (i * lanes + r) * row_stride + f;
        if (columns == lanes) {
          store(row, v[r]);
        } else {
          store_part(row, v[r], columns);
        }
      }
    }
  }
}

template <typename A, bool kPairs>
void pack_transposed(const Logits& logits, const Chunk& chunk, int64_t strip, int64_t begin, int64_t end, void* to) {
  const RowRange rows{&logits, false, chunk.begin + strip * kStrip<A>, rows_of_strip<A>(chunk, strip)};
  pack_by_columns<A, kPairs>(rows, begin, end, const_cast<A*>(packed_strip<A, kPairs>(logits, to, strip)));
}

template <typename A, bool kPairs>
void pack_rows(const Logits& logits, const Chunk& chunk, int64_t strip, int64_t begin, int64_t end, void* to) {
  constexpr int pair = kPairs ? 2 : 1;
  const RowRange rows{&logits, false, chunk.begin + strip * kStrip<A>, rows_of_strip<A>(chunk, strip)};
  pack_along_rows<A, kPairs>(
      rows, kStrip<A>, begin, end, chunk.strips * kStrip<A> / pair * kStrip<A>,
      static_cast<A*>(to) + strip * kStrip<A> / pair * kStrip<A>);
}

// Calls body with a typed pointer to element `offset`.
template <typename A, typename Body>
inline void with_type(Scalar type, void* data, int64_t offset, const Body& body) {
  if constexpr (sizeof(A) == sizeof(double)) {
    body(static_cast<double*>(data) + offset);
  } else {
    if (type == Scalar::f32) body(static_cast<float*>(data) + offset);
    if (type == Scalar::bf16) body(static_cast<BFloat16*>(data) + offset);
    if (type == Scalar::f16) body(static_cast<Half*>(data) + offset);
  }
}

}  // namespace
}  // namespace fusefeat
