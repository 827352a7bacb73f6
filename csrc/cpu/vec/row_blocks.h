// The three products of a block of token rows that pooling is made of. Rows are pointers to channels
// that lie next to each other; coefficients are [vectors][ld] with one lane per row.
#pragma once

#include "simd.h"

namespace fusefeat {
namespace {

template <typename A, int kRows, int kVectors, typename T>
inline void dot_tile(
    const T* const* rows, const A* const* vectors, int64_t channels, A* __restrict products, int64_t ld) {
  using V = VecOf<A>;
  constexpr int lanes = kLanes<A>;
  const T* row[kRows];
  const A* vector[kVectors];
  V sum[kVectors][kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  for (int j = 0; j < kVectors; ++j) {
    vector[j] = vectors[j];
    for (int r = 0; r < kRows; ++r) sum[j][r] = V{};
  }
  int64_t d = 0;
  for (; d + lanes <= channels; d += lanes) {
    V v[kVectors];
    for (int j = 0; j < kVectors; ++j) v[j] = load(vector[j] + d);
    for (int r = 0; r < kRows; ++r) {
      const V x = load(row[r] + d);
      for (int j = 0; j < kVectors; ++j) sum[j][r] = fma(x, v[j], sum[j][r]);
    }
  }
  if (d < channels) {
    const int rest = static_cast<int>(channels - d);
    V v[kVectors];
    for (int j = 0; j < kVectors; ++j) v[j] = load_part(vector[j] + d, rest);
    for (int r = 0; r < kRows; ++r) {
      const V x = load_part(row[r] + d, rest);
      for (int j = 0; j < kVectors; ++j) sum[j][r] = fma(x, v[j], sum[j][r]);
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    for (int r = 0; r < kRows; ++r) products[j * ld + r] = sum_lanes(sum[j][r]);
  }
}

constexpr int kRowStep = 4;  // row lists are padded to a multiple of this

template <typename A, int kVectors, typename T>
inline void dot_rows(
    const T* const* rows, int64_t count, const A* const* vectors, int64_t channels, A* products, int64_t ld) {
  // As many sums as the registers hold, eight at least to hide the latency of the additions.
  constexpr int tile = kVectors == 1 || (kManyRegisters && kVectors == 2) ? 2 * kRowStep : kRowStep;
  int64_t r = 0;
  for (; r + tile <= count; r += tile) {
    dot_tile<A, tile, kVectors>(rows + r, vectors, channels, products + r, ld);
  }
  if (tile > kRowStep && r < count) {
    dot_tile<A, kRowStep, kVectors>(rows + r, vectors, channels, products + r, ld);
  }
}

// products[j][r] = <rows[r], vectors[j]>; count is a multiple of kRowStep.
template <typename A, typename T>
inline void dots(
    const T* const* rows, int64_t count, const A* const* vectors, int64_t num_vectors, int64_t channels, A* products,
    int64_t ld) {
  int64_t j = 0;
  if (kManyRegisters) {
    for (; j + 4 <= num_vectors; j += 4) dot_rows<A, 4>(rows, count, vectors + j, channels, products + j * ld, ld);
  }
  for (; j + 2 <= num_vectors; j += 2) dot_rows<A, 2>(rows, count, vectors + j, channels, products + j * ld, ld);
  if (j < num_vectors) dot_rows<A, 1>(rows, count, vectors + j, channels, products + j * ld, ld);
}

template <typename A, int kSums, int kColumns, bool kPart, typename T>
inline void accumulate_tile(
    const T* const* rows, int64_t count, const A* coefficients, int64_t ld, const A* rescale, int64_t d, int rest,
    A* __restrict sums, int64_t channels) {
  using V = VecOf<A>;
  constexpr int lanes = kLanes<A>;
  V sum[kSums][kColumns];
  for (int k = 0; k < kSums; ++k) {
    for (int c = 0; c < kColumns; ++c) sum[k][c] = V{};
  }
  for (int64_t r = 0; r < count; ++r) {
    const T* row = rows[r] + d;
    V x[kColumns];
    for (int c = 0; c < kColumns; ++c) x[c] = kPart ? load_part(row, rest) : load(row + c * lanes);
    for (int k = 0; k < kSums; ++k) {
      const V p = splat<A>(coefficients[k * ld + r]);
      for (int c = 0; c < kColumns; ++c) sum[k][c] = fma(x[c], p, sum[k][c]);
    }
  }
  for (int k = 0; k < kSums; ++k) {
    A* to = sums + k * channels + d;
    for (int c = 0; c < kColumns; ++c) {
      if (kPart) {
        if (rescale != nullptr) sum[k][c] = fma(load_part(to, rest), splat<A>(rescale[k]), sum[k][c]);
        store_part(to, sum[k][c], rest);
      } else {
        if (rescale != nullptr) sum[k][c] = fma(load(to + c * lanes), splat<A>(rescale[k]), sum[k][c]);
        store(to + c * lanes, sum[k][c]);
      }
    }
  }
}

template <typename A, int kSums, typename T>
inline void accumulate_columns(
    const T* const* rows, int64_t count, const A* coefficients, int64_t ld, const A* rescale, int64_t d, int columns,
    int rest, A* sums, int64_t channels) {
  if (columns == 4) {
    accumulate_tile<A, kSums, 4, false>(rows, count, coefficients, ld, rescale, d, 0, sums, channels);
  } else if (columns == 2) {
    accumulate_tile<A, kSums, 2, false>(rows, count, coefficients, ld, rescale, d, 0, sums, channels);
  } else if (columns == 1) {
    accumulate_tile<A, kSums, 1, false>(rows, count, coefficients, ld, rescale, d, 0, sums, channels);
  } else {
    accumulate_tile<A, kSums, 1, true>(rows, count, coefficients, ld, rescale, d, rest, sums, channels);
  }
}

// sums[k] = rescale[k] * sums[k] + sum_r coefficients[k][r] * rows[r]; without rescale, sums start at 0.
// The rows of one block are added up on their own first, which keeps the rounding error of long bags low.
template <typename A, typename T>
inline void accumulate(
    const T* const* rows, int64_t count, const A* coefficients, int64_t ld, const A* rescale, int64_t num_sums, A* sums,
    int64_t channels) {
  constexpr int lanes = kLanes<A>;
  int64_t d = 0;
  while (d < channels) {
    const int64_t left = channels - d;
    const int wide = kManyRegisters || num_sums == 1 ? 4 : 2;
    const int columns = left >= wide * lanes ? wide : left >= 2 * lanes ? 2 : left >= lanes ? 1 : 0;
    const int rest = static_cast<int>(left);
    int64_t k = 0;
    for (; k + 4 <= num_sums; k += 4) {
      accumulate_columns<A, 4>(
          rows, count, coefficients + k * ld, ld, rescale == nullptr ? nullptr : rescale + k, d, columns, rest,
          sums + k * channels, channels);
    }
    for (; k < num_sums; ++k) {
      accumulate_columns<A, 1>(
          rows, count, coefficients + k * ld, ld, rescale == nullptr ? nullptr : rescale + k, d, columns, rest,
          sums + k * channels, channels);
    }
    d += columns == 0 ? left : static_cast<int64_t>(columns) * lanes;
  }
}

template <typename A, int kRows, int kColumns, bool kPart, typename T>
inline void combine_tile(
    T* const* rows, const A* coefficients, int64_t ld, const A* const* vectors, int64_t num_vectors, int64_t d,
    int rest, bool stream) {
  using V = VecOf<A>;
  constexpr int lanes = kLanes<A>;
  V sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c] = V{};
  }
  for (int64_t j = 0; j < num_vectors; ++j) {
    V v[kColumns];
    for (int c = 0; c < kColumns; ++c)
      v[c] = kPart ? load_part(vectors[j] + d, rest) : load(vectors[j] + d + c * lanes);
    for (int r = 0; r < kRows; ++r) {
      const V p = splat<A>(coefficients[j * ld + r]);
      for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(v[c], p, sum[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      T* to = rows[r] + d + c * lanes;
      if (kPart) {
        store_part(to, sum[r][c], rest);
      } else if (stream) {
        store_stream(to, sum[r][c]);
      } else {
        store(to, sum[r][c]);
      }
    }
  }
}

template <typename A, int kRows, typename T>
inline void combine_rows(
    T* const* rows, const A* coefficients, int64_t ld, const A* const* vectors, int64_t num_vectors, int64_t channels,
    bool stream) {
  constexpr int lanes = kLanes<A>;
  constexpr int columns = kManyRegisters || kRows == 1 ? 4 : 2;
  int64_t d = 0;
  for (; d + columns * lanes <= channels; d += columns * lanes) {
    combine_tile<A, kRows, columns, false>(rows, coefficients, ld, vectors, num_vectors, d, 0, stream);
  }
  for (; d + lanes <= channels; d += lanes) {
    combine_tile<A, kRows, 1, false>(rows, coefficients, ld, vectors, num_vectors, d, 0, stream);
  }
  if (d < channels) {
    const int rest = static_cast<int>(channels - d);
    combine_tile<A, kRows, 1, true>(rows, coefficients, ld, vectors, num_vectors, d, rest, false);
  }
}

// rows[r] = sum_j coefficients[j][r] * vectors[j].
template <typename A, typename T>
inline void combine(
    T* const* rows, int64_t count, const A* coefficients, int64_t ld, const A* const* vectors, int64_t num_vectors,
    int64_t channels, bool stream) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    combine_rows<A, 4>(rows + r, coefficients + r, ld, vectors, num_vectors, channels, stream);
  }
  for (; r < count; ++r) {
    combine_rows<A, 1>(rows + r, coefficients + r, ld, vectors, num_vectors, channels, stream);
  }
}

// Elements `stride` apart to contiguous acc.
template <typename A, typename T>
inline void gather(const T* from, int64_t stride, int64_t count, A* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(from + i));
  }
  for (; i < count; ++i) to[i] = to_acc(from[i * stride]);
}

// Contiguous acc to T.
template <typename A, typename T>
inline void convert(const A* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(to + i, load(from + i));
  for (; i < count; ++i) from_acc(from[i], to + i);
}

}  // namespace
}  // namespace fusefeat
