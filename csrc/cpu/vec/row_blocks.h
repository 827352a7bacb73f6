// The three products of a block of token rows that pooling is made of. Rows are pointers to channels
// that lie next to each other; coefficients are [vectors][ld] with one lane per row.
#pragma once

#include "simd.h"

namespace fusefeat {
namespace {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int kRowStep = 4;  // row lists can be read up to the next multiple of this

// Which lanes of the vector that starts at `first` lie below `count`.
template <typename A>
inline IntOf<A> lanes_below(int64_t first, int64_t count) {
  return iota<A>() < static_cast<int>(count - first);
}

template <int n>
struct Constant {
  static constexpr int value = n;
};

// `ahead` is how many bytes behind each row its successor in a later block lies, 0 for not known.
template <typename T>
struct RowList {
  const T* const* rows;
  int64_t count;
  int64_t ahead;
};

// Into the second-level cache: there the rows of the block after this one fit whatever the first level holds.
template <typename T>
inline void prefetch(const T* from, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead, 0, 2);
}

// A set bit j of kCentred makes product j that of row - centres[j].
template <typename A, int kRows, int kVectors, unsigned kCentred, bool kPrefetch, typename T>
inline void dot_tile(
    const T* const* rows, int64_t ahead, const A* const* vectors, const A* const* centres, int64_t channels,
    A* __restrict products, int64_t ld) {
  using V = VecOf<A>;
  constexpr int lanes = kLanes<A>;
  const T* row[kRows];
  const A* vector[kVectors];
  const A* centre[kVectors];
  V sum[kVectors][kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  for (int j = 0; j < kVectors; ++j) {
    vector[j] = vectors[j];
    centre[j] = (kCentred >> j & 1) ? centres[j] : nullptr;
    for (int r = 0; r < kRows; ++r) sum[j][r] = V{};
  }
  int64_t d = 0;
  for (; d + lanes <= channels; d += lanes) {
    V v[kVectors], c[kVectors];
    for (int j = 0; j < kVectors; ++j) v[j] = load(vector[j] + d);
    for (int j = 0; j < kVectors; ++j) c[j] = (kCentred >> j & 1) ? load(centre[j] + d) : V{};
    for (int r = 0; r < kRows; ++r) {
      const V x = load(row[r] + d);
      if (kPrefetch) prefetch(row[r] + d, ahead);
      for (int j = 0; j < kVectors; ++j) sum[j][r] = fma((kCentred >> j & 1) ? x - c[j] : x, v[j], sum[j][r]);
    }
  }
  if (d < channels) {
    const int rest = static_cast<int>(channels - d);
    V v[kVectors], c[kVectors];
    for (int j = 0; j < kVectors; ++j) v[j] = load_part(vector[j] + d, rest);
    for (int j = 0; j < kVectors; ++j) c[j] = (kCentred >> j & 1) ? load_part(centre[j] + d, rest) : V{};
    for (int r = 0; r < kRows; ++r) {
      const V x = load_part(row[r] + d, rest);
      for (int j = 0; j < kVectors; ++j) sum[j][r] = fma((kCentred >> j & 1) ? x - c[j] : x, v[j], sum[j][r]);
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    if constexpr (kRows % 4 == 0) {
      for (int r = 0; r < kRows; r += 4) {
        sum_lanes_of_four(sum[j][r], sum[j][r + 1], sum[j][r + 2], sum[j][r + 3], products + j * ld + r);
      }
    } else {
      for (int r = 0; r < kRows; ++r) products[j * ld + r] = sum_lanes(sum[j][r]);
    }
  }
}

template <typename A, int kVectors, unsigned kCentred, bool kPrefetch, typename T>
inline void dot_rows(
    const RowList<T>& list, const A* const* vectors, const A* const* centres, int64_t channels, A* products,
    int64_t ld) {
  // As many sums as the registers hold, eight at least to hide the latency of the additions.
  constexpr int tile = kVectors == 1 || (kManyRegisters && kVectors == 2) ? 2 * kRowStep : kRowStep;
  const int64_t count = round_up(list.count, kRowStep);
  int64_t r = 0;
  for (; r + tile <= count; r += tile) {
    dot_tile<A, tile, kVectors, kCentred, kPrefetch>(
        list.rows + r, list.ahead, vectors, centres, channels, products + r, ld);
  }
  if (tile > kRowStep && r < count) {
    dot_tile<A, kRowStep, kVectors, kCentred, kPrefetch>(
        list.rows + r, list.ahead, vectors, centres, channels, products + r, ld);
  }
}

// products[j][r] = <row r - centres[j], vectors[j]>, for rows up to the next multiple of kRowStep; centres are only
// read where kCentred.
template <typename A, bool kCentred, typename T>
inline void dots(
    const RowList<T>& list, const A* const* vectors, const A* const* centres, int64_t num_vectors, int64_t channels,
    A* products, int64_t ld) {
  constexpr unsigned all = kCentred ? ~0u : 0u;
  int64_t j = 0;
  const auto some = [&](auto vectors_at_once) {
    constexpr int step = decltype(vectors_at_once)::value;
    for (; j + step <= num_vectors; j += step) {
      const A* const* some_centres = kCentred ? centres + j : nullptr;
      if (j == 0 && list.ahead != 0) {
        dot_rows<A, step, all, true>(list, vectors, some_centres, channels, products, ld);
      } else {
        dot_rows<A, step, all, false>(list, vectors + j, some_centres, channels, products + j * ld, ld);
      }
    }
  };
  if constexpr (kManyRegisters) some(Constant<4>{});
  some(Constant<2>{});
  some(Constant<1>{});
}

// One plain and one centred product in the same pass over the rows.
template <typename A, typename T>
inline void dots_of_pair(
    const RowList<T>& list, const A* const* vectors, const A* const* centres, int64_t channels, A* products,
    int64_t ld) {
  if (list.ahead != 0) {
    dot_rows<A, 2, 0b10, true>(list, vectors, centres, channels, products, ld);
  } else {
    dot_rows<A, 2, 0b10, false>(list, vectors, centres, channels, products, ld);
  }
}

template <typename A, int kSums, int kColumns, bool kPart, bool kPrefetch, typename T>
inline void accumulate_tile(
    const RowList<T>& list, const A* coefficients, int64_t ld, const A* rescale, int64_t d, int rest,
    A* __restrict sums, int64_t channels) {
  using V = VecOf<A>;
  constexpr int lanes = kLanes<A>;
  V sum[kSums][kColumns];
  for (int k = 0; k < kSums; ++k) {
    for (int c = 0; c < kColumns; ++c) sum[k][c] = V{};
  }
  for (int64_t r = 0; r < list.count; ++r) {
    const T* row = list.rows[r] + d;
    V x[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      x[c] = kPart ? load_part(row, rest) : load(row + c * lanes);
      if (kPrefetch) prefetch(row + c * lanes, list.ahead);
    }
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

// sums[k] = rescale[k] * sums[k] + sum_r coefficients[k][r] * row r; without rescale, sums start at 0.
// The rows of one block are added up on their own first, which keeps the rounding error of long bags low.
template <typename A, typename T>
inline void accumulate(
    const RowList<T>& list, const A* coefficients, int64_t ld, const A* rescale, int64_t num_sums, A* sums,
    int64_t channels) {
  constexpr int lanes = kLanes<A>;
  int64_t d = 0;
  const auto columns = [&](auto columns_at_once, auto part) {
    constexpr int step = decltype(columns_at_once)::value;
    constexpr bool is_part = decltype(part)::value != 0;
    const int rest = static_cast<int>(channels - d);
    int64_t k = 0;
    const auto some = [&](auto sums_at_once, auto prefetching) {
      constexpr int num = decltype(sums_at_once)::value;
      accumulate_tile<A, num, step, is_part, decltype(prefetching)::value != 0>(
          list, coefficients + k * ld, ld, rescale == nullptr ? nullptr : rescale + k, d, rest, sums + k * channels,
          channels);
      k += num;
    };
    if (list.ahead != 0 && num_sums == 1) some(Constant<1>{}, Constant<1>{});
    if (list.ahead != 0 && num_sums >= 4) some(Constant<4>{}, Constant<1>{});
    while (k + 4 <= num_sums) some(Constant<4>{}, Constant<0>{});
    while (k < num_sums) some(Constant<1>{}, Constant<0>{});
    d += step * lanes;
  };
  constexpr int wide = kManyRegisters ? 4 : 2;
  while (d + wide * lanes <= channels) columns(Constant<wide>{}, Constant<0>{});
  while (d + lanes <= channels) columns(Constant<1>{}, Constant<0>{});
  if (d < channels) columns(Constant<1>{}, Constant<1>{});
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

template <typename A>
inline A dot(const A* a, const A* b, int64_t count) {
  VecOf<A> sum{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) sum = fma(load(a + i), load(b + i), sum);
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    sum = fma(load_part(a + i, rest), load_part(b + i, rest), sum);
  }
  return sum_lanes(sum);
}

// Elements `stride` apart to contiguous acc.
template <typename A, typename T>
inline void gather(const T* from, int64_t stride, int64_t count, A* to, int64_t ahead = 0) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes<A> <= count; i += kLanes<A>) {
      store(to + i, load(from + i));
      if (ahead != 0) prefetch(from + i, ahead);
    }
  }
  for (; i < count; ++i) to[i] = to_acc(from[i * stride]);
}

}  // namespace
}  // namespace fusefeat
