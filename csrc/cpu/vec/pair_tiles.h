// The innermost loops of pair_products.h: rows of bfloat16 times vectors or coefficients of bfloat16, two at a time.
#pragma once

#include "row_blocks.h"

namespace fusefeat {
namespace {

constexpr int kPairLanes = 32;

inline __m512i load_bf16(const BFloat16* from) {
  return _mm512_loadu_si512(from);
}
inline __m512i load_bf16(const BFloat16* from, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, from);
}
inline __mmask32 first_bf16(int64_t count) {
  return count >= kPairLanes ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}
inline FloatVec dot_pairs(FloatVec sum, __m512i a, __m512i b) {
  return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

template <int kRows, int kVectors, bool kPrefetch>
inline void pair_dot_tile(
    const BFloat16* const* rows, int64_t ahead, const BFloat16* vectors, int64_t width, int64_t channels,
    float* __restrict products, int64_t ld) {
  const BFloat16* row[kRows];
  FloatVec sum[kVectors][kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  for (int j = 0; j < kVectors; ++j) {
    for (int r = 0; r < kRows; ++r) sum[j][r] = FloatVec{};
  }
  int64_t d = 0;
  for (; d + kPairLanes <= channels; d += kPairLanes) {
    __m512i v[kVectors];
    for (int j = 0; j < kVectors; ++j) v[j] = load_bf16(vectors + j * width + d);
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = load_bf16(row[r] + d);
      if (kPrefetch) prefetch(row[r] + d, ahead);
      for (int j = 0; j < kVectors; ++j) sum[j][r] = dot_pairs(sum[j][r], x, v[j]);
    }
  }
  if (d < channels) {
    const __mmask32 rest = first_bf16(channels - d);
    for (int r = 0; r < kRows; ++r) {
      const __m512i x = load_bf16(row[r] + d, rest);
      for (int j = 0; j < kVectors; ++j) sum[j][r] = dot_pairs(sum[j][r], x, load_bf16(vectors + j * width + d));
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    for (int r = 0; r < kRows; r += 4) {
      sum_lanes_of_four(sum[j][r], sum[j][r + 1], sum[j][r + 2], sum[j][r + 3], products + j * ld + r);
    }
  }
}

// Sums of up to 32 channels from d on; those of a pair of rows meet in one instruction. With kSplit the rest of each
// coefficient lies `rests` behind it.
template <int kSums, int kColumns, bool kPrefetch, bool kSplit>
inline void pair_accumulate_tile(
    const RowList<BFloat16>& list, const uint32_t* coefficients, int64_t rests, int64_t ld, const float* rescale,
    int64_t d, __mmask32 mask, float* __restrict sums, int64_t channels) {
  FloatVec low[kSums][kColumns], high[kSums][kColumns];
  for (int k = 0; k < kSums; ++k) {
    for (int c = 0; c < kColumns; ++c) low[k][c] = high[k][c] = FloatVec{};
  }
  for (int64_t r = 0; r < list.count; r += 2) {
    // Behind the last row comes nothing: 0, not a row times 0.
    const __mmask32 second = r + 1 < list.count ? mask : 0;
    const BFloat16 *row = list.rows[r] + d, *next = list.rows[r + 1] + d;
    __m512i even[kColumns], odd[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      const __m512i a = load_bf16(row + c * kPairLanes, mask), b = load_bf16(next + c * kPairLanes, second);
      if (kPrefetch) prefetch(row + c * kPairLanes, list.ahead);
      if (kPrefetch) prefetch(next + c * kPairLanes, list.ahead);
      even[c] = _mm512_unpacklo_epi16(a, b);
      odd[c] = _mm512_unpackhi_epi16(a, b);
    }
    for (int k = 0; k < kSums; ++k) {
      const __m512i p = _mm512_set1_epi32(static_cast<int>(coefficients[k * ld + r / 2]));
      for (int c = 0; c < kColumns; ++c) {
        low[k][c] = dot_pairs(low[k][c], even[c], p);
        high[k][c] = dot_pairs(high[k][c], odd[c], p);
      }
      if constexpr (kSplit) {
        const __m512i rest = _mm512_set1_epi32(static_cast<int>(coefficients[rests + k * ld + r / 2]));
        for (int c = 0; c < kColumns; ++c) {
          low[k][c] = dot_pairs(low[k][c], even[c], rest);
          high[k][c] = dot_pairs(high[k][c], odd[c], rest);
        }
      }
    }
  }
  // Unpacking took four channels in turn.
  const __m512i firsts = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i lasts = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int k = 0; k < kSums; ++k) {
    for (int c = 0; c < kColumns; ++c) {
      const __m512 a = (__m512)low[k][c], b = (__m512)high[k][c];
      FloatVec halves[2] = {
          (FloatVec)_mm512_permutex2var_ps(a, firsts, b), (FloatVec)_mm512_permutex2var_ps(a, lasts, b)};
      for (int half = 0; half < 2; ++half) {
        float* to = sums + k * channels + d + c * kPairLanes + half * 16;
        const auto part = static_cast<__mmask16>(mask >> (16 * half));
        if (rescale != nullptr) {
          const __m512 old = _mm512_maskz_loadu_ps(part, to);
          halves[half] = fma((FloatVec)old, splat<float>(rescale[k]), halves[half]);
        }
        _mm512_mask_storeu_ps(to, part, (__m512)halves[half]);
      }
    }
  }
}

// Channels [d, d + 32 * kColumns) of kRows rows, from pairs of vectors.
template <int kRows, int kColumns>
inline void pair_combine_tile(
    BFloat16* const* rows, const uint32_t* coefficients, int64_t ld, const uint32_t* vectors, int64_t width,
    int64_t num_pairs, int64_t d, __mmask32 mask, bool stream) {
  FloatVec sum[kRows][2 * kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < 2 * kColumns; ++c) sum[r][c] = FloatVec{};
  }
  for (int64_t j = 0; j < num_pairs; ++j) {
    __m512i v[2 * kColumns];
    for (int c = 0; c < 2 * kColumns; ++c) v[c] = _mm512_loadu_si512(vectors + j * width + d + 16 * c);
    for (int r = 0; r < kRows; ++r) {
      const __m512i p = _mm512_set1_epi32(static_cast<int>(coefficients[j * ld + r]));
      for (int c = 0; c < 2 * kColumns; ++c) sum[r][c] = dot_pairs(sum[r][c], v[c], p);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      BFloat16* to = rows[r] + d + kPairLanes * c;
      const __m512i values = (__m512i)_mm512_cvtne2ps_pbh((__m512)sum[r][2 * c + 1], (__m512)sum[r][2 * c]);
      if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), values);
      } else {
        _mm512_mask_storeu_epi16(to, mask, values);
      }
    }
  }
}

// As pair_dot_tile for sixteen vectors at once, one a lane: packed[pair of channels][16]. sums[r] holds those of row r.
template <int kRows>
inline void pair_wide_tile(
    const BFloat16* const* rows, int64_t ahead, const uint32_t* packed, int64_t channels, FloatVec* sums) {
  const BFloat16* row[kRows];
  FloatVec sum[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  for (int r = 0; r < kRows; ++r) sum[r] = FloatVec{};
  const auto add = [&](int64_t d, auto pair_of) {
    const __m512i v = _mm512_loadu_si512(packed + d / 2 * 16);
    for (int r = 0; r < kRows; ++r) sum[r] = dot_pairs(sum[r], _mm512_set1_epi32(pair_of(row[r] + d)), v);
  };
  int64_t d = 0;
  for (; d + 2 <= channels; d += 2) {
    if (ahead != 0 && d % kPairLanes == 0) {
      for (int r = 0; r < kRows; ++r) prefetch(row[r] + d, ahead);
    }
    add(d, [](const BFloat16* at) {
      int pair;
      __builtin_memcpy(&pair, at, sizeof pair);
      return pair;
    });
  }
  if (d < channels) add(d, [](const BFloat16* at) { return static_cast<int>(at->bits); });
  for (int r = 0; r < kRows; ++r) sums[r] = sum[r];
}

}  // namespace
}  // namespace fusefeat
