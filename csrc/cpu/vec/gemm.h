// Matrix products of packed operands. A packed matrix is cut into strips of columns; a strip holds its rows
// one after the other, each as wide as two vectors. With kPairs an element is two bfloat16 operands that are
// multiplied and added up together, carried in the bits of a float.
#pragma once

#include "simd.h"

namespace fusefeat {
namespace {

template <typename A>
constexpr int kStrip = 2 * kLanes<A>;

constexpr int kTileRows = kManyRegisters ? 8 : 4;

// By its bits: a pair of bfloat16 may look like a signalling NaN.
template <typename A, bool kPairs>
inline VecOf<A> broadcast(const A* from) {
  if constexpr (kPairs) {
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return (VecOf<A>)(bits - IntOf<A>{});
  } else {
    return splat<A>(*from);
  }
}

template <typename A, bool kPairs>
inline VecOf<A> multiply_add(VecOf<A> a, VecOf<A> b, VecOf<A> sum) {
#if defined(FUSEFEAT_BF16)
  if constexpr (kPairs) return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return fma(a, b, sum);
}

// sum[r] += sum_k a(r, k) b(k), where a(r, k) = a[k / kRun * run_stride + r * row_stride + k % kRun]: of packed rows,
// kRun apart, or, with runs one behind the other, of rows as they are. Calls beside(k) for each run.
template <typename A, bool kPairs, int kRows, int kRun, typename Beside>
inline void multiply_rows(
    const A* a, int64_t run_stride, int64_t row_stride, const A* b, int64_t depth, VecOf<A> (&sum)[kRows][2],
    const Beside& beside) {
  for (int64_t k = 0; k < depth; k += kRun, a += run_stride) {
    beside(k);
    const int run = depth - k < kRun ? static_cast<int>(depth - k) : kRun;
    for (int i = 0; i < run; ++i, b += kStrip<A>) {
      const VecOf<A> b0 = load(b), b1 = load(b + kLanes<A>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const VecOf<A> v = broadcast<A, kPairs>(a + r * row_stride + i);
        sum[r][0] = multiply_add<A, kPairs>(v, b0, sum[r][0]);
        sum[r][1] = multiply_add<A, kPairs>(v, b1, sum[r][1]);
      }
    }
  }
}

// sum[r] += sum_k a[k][r] b[k], for kRows neighbouring columns of a strip a.
template <typename A, bool kPairs, int kRows>
inline void multiply_columns(const A* a, const A* b, int64_t depth, VecOf<A> (&sum)[kRows][2]) {
  for (int64_t k = 0; k < depth; ++k, a += kStrip<A>, b += kStrip<A>) {
    const VecOf<A> b0 = load(b), b1 = load(b + kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VecOf<A> v = broadcast<A, kPairs>(a + r);
      sum[r][0] = multiply_add<A, kPairs>(v, b0, sum[r][0]);
      sum[r][1] = multiply_add<A, kPairs>(v, b1, sum[r][1]);
    }
  }
}

// Asks for the lines of a tile that is written once its product is done.
template <typename A, int kRows>
inline void prefetch_tile(const A* to, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    __builtin_prefetch(to + r * stride, 1);
    __builtin_prefetch(to + r * stride + kLanes<A>, 1);
  }
}

// Stores the first `columns` <= kStrip of kRows rows, `stride` apart, added to what is there if `add`.
template <typename A, int kRows>
inline void store_tile(A* to, int64_t stride, int columns, bool add, VecOf<A> (&sum)[kRows][2]) {
  if (columns == kStrip<A>) {
    if (add) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += load(to + r * stride);
        sum[r][1] += load(to + r * stride + kLanes<A>);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      store(to + r * stride, sum[r][0]);
      store(to + r * stride + kLanes<A>, sum[r][1]);
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j * kLanes<A> < columns; ++j) {
      A* at = to + r * stride + j * kLanes<A>;
      const int left = columns - j * kLanes<A>;
      if (left >= kLanes<A>) {
        store(at, add ? sum[r][j] + load(at) : sum[r][j]);
      } else {
        store_part(at, add ? sum[r][j] + load_part(at, left) : sum[r][j], left);
      }
    }
  }
}

template <typename A, int kRows>
inline void clear_tile(VecOf<A> (&sum)[kRows][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = VecOf<A>{};
}

// Calls body<kRows>(first row) over [0, rows) in the largest tiles that fit.
template <typename Body>
inline void for_row_tiles(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) body.template operator()<kTileRows>(row);
  if (kTileRows == 8 && row + 4 <= rows) {
    body.template operator()<4>(row);
    row += 4;
  }
  if (row + 2 <= rows) {
    body.template operator()<2>(row);
    row += 2;
  }
  if (row < rows) body.template operator()<1>(row);
}

// Rows of a square block of vectors become its columns.
template <typename A>
inline void transpose(VecOf<A> (&v)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2) {
    IntOf<A> low, high;
    for (int i = 0; i < lanes; ++i) {
      low[i] = i & half ? lanes + i - half : i;
      high[i] = i & half ? lanes + i : i + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & half) continue;
      const VecOf<A> a = v[i], b = v[i + half];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace
}  // namespace fusefeat
