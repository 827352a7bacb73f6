// The products of row_blocks.h where rows are bfloat16 and the processor multiplies pairs of bfloat16, adding both
// products in float: twice the work per instruction, and no conversion of the rows. Query and incoming gradient are
// bfloat16 already. Weights and gradients of scores become a bfloat16 and a second one for the rest where their sums
// may cancel, and are rounded to one, as a matrix product in bfloat16 would, where they cannot. These instructions take
// numbers below the smallest normal one for 0.
#pragma once

#include "row_blocks.h"

#if defined(FUSEFEAT_BF16)
#include "gemm.h"
#include "pair_tiles.h"
#endif

namespace fusefeat {
namespace {

// Builds and types without such products: every call says that it has done nothing.
template <typename T>
struct PairProducts {
  using A = decltype(to_acc(T{}));
  static constexpr bool kAvailable = false;
  static constexpr bool active = false;
  template <typename Arena>
  PairProducts(bool, int64_t, int64_t, int64_t, bool, Arena&) {}
  bool set_vectors(const A* const*, int64_t, int64_t) { return false; }
  void pair_vectors(int64_t, int64_t) {}
  void widen_vectors(int64_t, int64_t) {}
  template <typename Row>
  bool dots(const RowList<Row>&, int64_t, int64_t, A*, int64_t) {
    return false;
  }
  template <bool kSplit, typename Row>
  bool accumulate(const RowList<Row>&, const A*, int64_t, const A*, int64_t, A*) {
    return false;
  }
  bool combine(T* const*, int64_t, const A*, int64_t, int64_t, bool) { return false; }
};

#if defined(FUSEFEAT_BF16)
template <>
struct PairProducts<BFloat16> {
  static constexpr bool kAvailable = true;
  bool active;  // the vectors that were set last are bfloat16
  int64_t channels, width;
  BFloat16* vectors;       // [num_vectors][width], 0 behind the channels
  uint32_t* vector_pairs;  // [num_vectors / 2][width], when rows are to be combined of them
  uint32_t* wide;          // [num_vectors / 16][width / 2][16], pairs of channels, where there are many vectors
  uint32_t* coefficients;  // [num_vectors][ld]: pairs along the rows and then their rests, or pairs of two vectors

  template <typename Arena>
  PairProducts(bool wanted, int64_t num_vectors, int64_t channels_, int64_t ld, bool combines, Arena& arena)
      : active(wanted), channels(channels_), width(round_up(channels_, kPairLanes)) {
    if (!wanted) num_vectors = 0;
    vectors = arena.template take<BFloat16>(num_vectors * width);
    vector_pairs = arena.template take<uint32_t>(combines ? (num_vectors + 1) / 2 * width : 0);
    wide = arena.template take<uint32_t>(num_vectors < kLeastWide ? 0 : round_up(num_vectors, 16) * width / 2);
    coefficients = arena.template take<uint32_t>(num_vectors * ld);
  }

  // Vectors [first, first + count) of those given. Where a value is not bfloat16, all products are the caller's.
  bool set_vectors(const float* const* from, int64_t first, int64_t count) {
    typedef Simd<float>::U U;
    U lost{};
    for (int64_t j = first; j < first + count; ++j) {
      for (int64_t d = 0; d < width; d += kPairLanes) {
        const auto half = [&](int64_t begin) {
          const int64_t left = channels - begin;
          return left >= 16 ? load(from[j] + begin)
                 : left > 0 ? load_part(from[j] + begin, static_cast<int>(left))
                            : FloatVec{};
        };
        const FloatVec a = half(d), b = half(d + 16);
        lost |= ((U)a | (U)b) & 0xffffu;
        _mm512_storeu_si512(vectors + j * width + d, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
      }
    }
    active = !any_lane((IntOf<float>)lost);
    return active;
  }

  // products[j][r] = <row r, vector first + j>.
  template <typename Row>
  bool dots(const RowList<Row>& list, int64_t first, int64_t count, float* products, int64_t ld) {
    if constexpr (sizeof(Row) == sizeof(BFloat16)) {
      if (!active) return false;
      if (count >= kLeastWide) {
        for (int64_t j = 0; j < count; j += 16) wide_rows(list, j, count, products + j * ld, ld);
        return true;
      }
      int64_t j = 0;
      const auto some = [&](auto vectors_at_once) {
        constexpr int step = decltype(vectors_at_once)::value;
        for (; j + step <= count; j += step) {
          if (j == 0 && list.ahead != 0) {
            dot_rows<step, true>(list, first, products, ld);
          } else {
            dot_rows<step, false>(list, first + j, products + j * ld, ld);
          }
        }
      };
      some(Constant<4>{});
      some(Constant<2>{});
      some(Constant<1>{});
      return true;
    }
    return false;
  }

  // As accumulate() of row_blocks.h. kSplit carries each value as the sum of two bfloat16, where many values of both
  // signs nearly cancel.
  template <bool kSplit, typename Row>
  bool accumulate(
      const RowList<Row>& list, const float* values, int64_t ld, const float* rescale, int64_t num_sums, float* sums) {
    if constexpr (sizeof(Row) == sizeof(BFloat16)) {
      if (!active) return false;
      const int64_t rests = num_sums * ld / 2;
      for (int64_t k = 0; k < num_sums; ++k) {
        for (int64_t r = 0; r < list.count; r += 16) {
          const FloatVec value = load(values + k * ld + r);
          const FloatVec v = lanes_below<float>(r, list.count) ? value : FloatVec{};
          __m256i part = (__m256i)_mm512_cvtneps_pbh((__m512)v);
          uint32_t* to = coefficients + (k * ld + r) / 2;
          if constexpr (kSplit) {
            // Cut off, and with a rest that is never 0, both parts have one sign: an infinite token stays infinite.
            const FloatVec high = (FloatVec)((Simd<float>::U)v & 0xffff0000u);
            const FloatVec rest = v == high ? v * 0x1p-40f : v - high;
            part = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)high, 16));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + rests), (__m256i)_mm512_cvtneps_pbh((__m512)rest));
          }
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), part);
        }
      }
      int64_t d = 0;
      const auto columns = [&](auto columns_at_once) {
        constexpr int step = decltype(columns_at_once)::value;
        const __mmask32 mask = first_bf16(channels - d);
        int64_t k = 0;
        const auto some = [&](auto sums_at_once, auto prefetching) {
          constexpr int num = decltype(sums_at_once)::value;
          pair_accumulate_tile<num, step, decltype(prefetching)::value != 0, kSplit>(
              list, coefficients + k * ld / 2, rests, ld / 2, rescale == nullptr ? nullptr : rescale + k, d, mask,
              sums + k * channels, channels);
          k += num;
        };
        if (list.ahead != 0 && num_sums < 4) some(Constant<1>{}, Constant<1>{});
        if constexpr (step <= 2) {
          if (list.ahead != 0 && num_sums >= 4) some(Constant<4>{}, Constant<1>{});
          while (k + 4 <= num_sums) some(Constant<4>{}, Constant<0>{});
        }
        while (k < num_sums) some(Constant<1>{}, Constant<0>{});
        d += step * kPairLanes;
      };
      // Sums enough to hide the latency of the additions, and not more than the registers hold.
      while (num_sums < 4 && d + 4 * kPairLanes <= channels) columns(Constant<4>{});
      while (d + 2 * kPairLanes <= channels) columns(Constant<2>{});
      while (d < channels) columns(Constant<1>{});
      return true;
    }
    return false;
  }

  // rows[r] = sum_j values[j][r] * vector j of those that were paired.
  bool combine(
      BFloat16* const* rows, int64_t count, const float* values, int64_t ld, int64_t num_vectors, bool stream) {
    if (!active) return false;
    const __m512i in_turn = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0);
    for (int64_t j = 0; j < num_vectors; j += 2) {
      for (int64_t r = 0; r < count; r += 16) {
        const FloatVec a = load(values + j * ld + r),
                       b = j + 1 < num_vectors ? load(values + (j + 1) * ld + r) : FloatVec{};
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        _mm512_storeu_si512(coefficients + j / 2 * ld + r, _mm512_permutexvar_epi16(in_turn, both));
      }
    }
    const int64_t num_pairs = (num_vectors + 1) / 2;
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) combine_rows<4>(rows + r, coefficients + r, ld, num_pairs, stream);
    for (; r < count; ++r) combine_rows<1>(rows + r, coefficients + r, ld, num_pairs, stream);
    return true;
  }

  // Makes the pairs that combine() reads of vectors [first, first + count).
  void pair_vectors(int64_t first, int64_t count) {
    const auto load_wide = [](const BFloat16* from) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    };
    for (int64_t j = 0; j < count; j += 2) {
      const BFloat16* a = vectors + (first + j) * width;
      for (int64_t d = 0; d < width; d += 16) {
        const __m512i high = j + 1 < count ? load_wide(a + width + d) : __m512i{};
        _mm512_storeu_si512(
            vector_pairs + j / 2 * width + d, _mm512_or_si512(load_wide(a + d), _mm512_slli_epi32(high, 16)));
      }
    }
  }

  // Makes what dots() reads of vectors [first, first + count), where these are many.
  void widen_vectors(int64_t first, int64_t count) {
    if (count < kLeastWide) return;
    for (int64_t j = 0; j < count; j += 16) {
      for (int64_t d = 0; d < width; d += kPairLanes) {
        FloatVec block[16];
        for (int64_t i = 0; i < 16; ++i) {
          block[i] = j + i < count ? (FloatVec)load_bf16(vectors + (first + j + i) * width + d) : FloatVec{};
        }
        transpose<float>(block);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(wide + j * width / 2 + (d / 2 + i) * 16, (__m512i)block[i]);
      }
    }
  }

 private:
  static constexpr int64_t kLeastWide = 12;  // vectors from which on lanes without one cost less than sums over lanes

  void wide_rows(const RowList<BFloat16>& list, int64_t j, int64_t count, float* products, int64_t ld) const {
    constexpr int tile = 8;
    const int64_t num = count - j < 16 ? count - j : 16, ahead = j == 0 ? list.ahead : 0;
    for (int64_t r = 0; r < list.count; r += 16) {
      FloatVec sums[16];
      for (int64_t i = 0; i < 16; i += tile) {
        if (r + i >= list.count) {
          for (int64_t k = i; k < 16; ++k) sums[k] = FloatVec{};
          break;
        }
        const BFloat16* rows[tile];
        for (int64_t k = 0; k < tile; ++k) rows[k] = list.rows[r + i + k < list.count ? r + i + k : list.count - 1];
        pair_wide_tile<tile>(rows, ahead, wide + j * width / 2, channels, sums + i);
      }
      transpose<float>(sums);
      for (int64_t k = 0; k < num; ++k) store(products + k * ld + r, sums[k]);
    }
  }

  template <int kVectors, bool kPrefetch>
  void dot_rows(const RowList<BFloat16>& list, int64_t first, float* products, int64_t ld) const {
    constexpr int tile = kVectors <= 2 ? 2 * kRowStep : kRowStep;
    const int64_t count = round_up(list.count, kRowStep);
    const BFloat16* from = vectors + first * width;
    int64_t r = 0;
    for (; r + tile <= count; r += tile) {
      pair_dot_tile<tile, kVectors, kPrefetch>(list.rows + r, list.ahead, from, width, channels, products + r, ld);
    }
    if (r < count) {
      pair_dot_tile<kRowStep, kVectors, kPrefetch>(list.rows + r, list.ahead, from, width, channels, products + r, ld);
    }
  }

  template <int kRows>
  void combine_rows(BFloat16* const* rows, const uint32_t* pairs, int64_t ld, int64_t num_pairs, bool stream) const {
    int64_t d = 0;
    for (; d + 2 * kPairLanes <= channels; d += 2 * kPairLanes) {
      pair_combine_tile<kRows, 2>(rows, pairs, ld, vector_pairs, width, num_pairs, d, first_bf16(kPairLanes), stream);
    }
    for (; d < channels; d += kPairLanes) {
      const bool whole = d + kPairLanes <= channels;
      pair_combine_tile<kRows, 1>(
          rows, pairs, ld, vector_pairs, width, num_pairs, d, first_bf16(channels - d), stream && whole);
    }
  }
};
#endif

}  // namespace
}  // namespace fusefeat
