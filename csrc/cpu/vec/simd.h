// Vector types for the CPU kernels: loads and stores that convert to and from the accumulation
// type, partial ones for row ends, horizontal sums and exp.
//
// Included only by sources that are compiled once per instruction set. Everything is in an anonymous
// namespace, and no std templates are used: code with external linkage would be merged at link time
// and could carry AVX-512 instructions to machines without them.
#pragma once

#include <stdint.h>

#if defined(FUSEFEAT_ISA_AVX2) || defined(FUSEFEAT_ISA_AVX512)
// Some intrinsics start from registers left as they are, which GCC takes for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif !defined(FUSEFEAT_ISA_GENERIC)
#error "define one of FUSEFEAT_ISA_GENERIC, FUSEFEAT_ISA_AVX2 and FUSEFEAT_ISA_AVX512"
#endif

namespace fusefeat {
namespace {

#if defined(FUSEFEAT_ISA_AVX512)
constexpr int kVectorBytes = 64;
constexpr bool kManyRegisters = true;  // 32 vector registers, not 16
#elif defined(FUSEFEAT_ISA_AVX2)
constexpr int kVectorBytes = 32;
constexpr bool kManyRegisters = false;
#else
constexpr int kVectorBytes = 16;
constexpr bool kManyRegisters = false;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using VecOf = typename Simd<A>::V;
template <typename A>
using IntOf = typename Simd<A>::I;
using FloatVec = VecOf<float>;
using DoubleVec = VecOf<double>;

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
constexpr A kInfinity = static_cast<A>(__builtin_inff());

template <typename A>
inline VecOf<A> splat(A value) {
  return value - VecOf<A>{};
}

template <typename A>
inline IntOf<A> iota() {
  IntOf<A> lanes;
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = i;
  return lanes;
}

inline FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
#if defined(FUSEFEAT_ISA_AVX512)
  return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FUSEFEAT_ISA_AVX2)
  return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) {
#if defined(FUSEFEAT_ISA_AVX512)
  return (DoubleVec)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FUSEFEAT_ISA_AVX2)
  return (DoubleVec)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

inline float to_acc(float value) {
  return value;
}
inline double to_acc(double value) {
  return value;
}

inline float to_acc(BFloat16 value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}

inline float to_acc(Half value) {
#if defined(FUSEFEAT_ISA_GENERIC)
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23);
  if (magnitude < 0x0400u) {  // zero and subnormals: multiples of 2^-24
    bits = __builtin_bit_cast(uint32_t, static_cast<float>(magnitude) * 0x1p-24f);
  }
  return __builtin_bit_cast(float, bits | sign);
#else
  return _cvtsh_ss(value.bits);
#endif
}

inline void from_acc(float value, float* to) {
  *to = value;
}
inline void from_acc(double value, double* to) {
  *to = value;
}

inline void from_acc(float value, BFloat16* to) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_acc(float value, Half* to) {
#if defined(FUSEFEAT_ISA_GENERIC)
  const uint32_t all_bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t sign = (all_bits >> 16) & 0x8000u;
  const uint32_t bits = all_bits & 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 puts the last place of a half at the float's own
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, bits) + 0.5f) - 0x3f000000u;
  } else {
    half = (bits - ((127u - 15u) << 23) + 0x0fffu + ((bits >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(half | sign);
#else
  to->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#endif
}

inline FloatVec load(const float* from) {
  FloatVec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline DoubleVec load(const double* from) {
  DoubleVec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline FloatVec load(const BFloat16* from) {
#if defined(FUSEFEAT_ISA_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (FloatVec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(FUSEFEAT_ISA_AVX2)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (FloatVec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  FloatVec v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(from[i]);
  return v;
#endif
}

inline FloatVec load(const Half* from) {
#if defined(FUSEFEAT_ISA_AVX512)
  return (FloatVec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(FUSEFEAT_ISA_AVX2)
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  FloatVec v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_acc(from[i]);
  return v;
#endif
}

inline void store(float* to, FloatVec v) {
  __builtin_memcpy(to, &v, sizeof v);
}
inline void store(double* to, DoubleVec v) {
  __builtin_memcpy(to, &v, sizeof v);
}

#if !defined(FUSEFEAT_ISA_GENERIC)
// Round to nearest even, NaN to the quiet NaN, as 16-bit values in the low half of each lane.
inline Simd<float>::U bfloat16_bits(FloatVec v) {
  typedef Simd<float>::U U;
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : U{} + 0x7fc0u;
}
#endif

inline void store(BFloat16* to, FloatVec v) {
#if defined(FUSEFEAT_ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(v)));
#elif defined(FUSEFEAT_ISA_AVX2)
  const __m256i bits = (__m256i)bfloat16_bits(v);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
#else
  for (int i = 0; i < kLanes<float>; ++i) from_acc(v[i], to + i);
#endif
}

inline void store(Half* to, FloatVec v) {
#if defined(FUSEFEAT_ISA_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(FUSEFEAT_ISA_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) from_acc(v[i], to + i);
#endif
}

// The first `count` < lanes elements; the other lanes are 0.
template <typename T>
inline auto load_part(const T* from, int count) {
  T lanes[sizeof(load(from)) / sizeof(to_acc(*from))] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

template <typename T, typename V>
inline void store_part(T* to, V v, int count) {
  for (int i = 0; i < count; ++i) from_acc(v[i], to + i);
}

#if defined(FUSEFEAT_ISA_AVX512)
inline auto load_part(const float* from, int count) {
  return (FloatVec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
inline auto load_part(const double* from, int count) {
  return (DoubleVec)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
inline auto load_part(const BFloat16* from, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  return (FloatVec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
inline auto load_part(const Half* from, int count) {
  return (FloatVec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from));
}
inline void store_part(float* to, FloatVec v, int count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
inline void store_part(double* to, DoubleVec v, int count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
}
inline void store_part(BFloat16* to, FloatVec v, int count) {
  const __m256i bits = _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(v));
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), bits);
}
inline void store_part(Half* to, FloatVec v, int count) {
  const __m256i bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), bits);
}
#elif defined(FUSEFEAT_ISA_AVX2)
inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), (__m256i)iota<float>());
}
inline __m256i first_double_lanes(int count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), (__m256i)iota<double>());
}
inline auto load_part(const float* from, int count) {
  return (FloatVec)_mm256_maskload_ps(from, first_lanes(count));
}
inline auto load_part(const double* from, int count) {
  return (DoubleVec)_mm256_maskload_pd(from, first_double_lanes(count));
}
inline void store_part(float* to, FloatVec v, int count) {
  _mm256_maskstore_ps(to, first_lanes(count), (__m256)v);
}
inline void store_part(double* to, DoubleVec v, int count) {
  _mm256_maskstore_pd(to, first_double_lanes(count), (__m256d)v);
}
#endif

// Past the caches; `to` is aligned to the bytes written. The caller ends with stream_fence().
template <typename T, typename V>
inline void store_stream(T* to, V v) {
#if defined(FUSEFEAT_ISA_GENERIC)
  store(to, v);
#else
  T values[sizeof(V) / sizeof(v[0])];
  store(values, v);
  if constexpr (sizeof values == 64) {
#if defined(FUSEFEAT_ISA_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(values));
#endif
  } else if constexpr (sizeof values == 32) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
#endif
}

inline void stream_fence() {
#if !defined(FUSEFEAT_ISA_GENERIC)
  _mm_sfence();
#endif
}

// Sum of the lanes, always in the same order: halves folded together until one lane is left.
template <typename V>
inline auto sum_lanes(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  auto folded = v;
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) folded[i] += folded[i + half];
  }
  return folded[0];
}

// The largest lane; a NaN lane counts only when it is the first.
template <typename V>
inline auto max_lanes(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  auto result = v[0];
  for (int i = 1; i < lanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

#if defined(FUSEFEAT_ISA_AVX512) || defined(FUSEFEAT_ISA_AVX2)
inline __m256 fold(FloatVec v) {
#if defined(FUSEFEAT_ISA_AVX512)
  return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  return (__m256)v;
#endif
}

inline auto sum_lanes(FloatVec v) {
  const __m256 eight = fold(v);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline auto max_lanes(FloatVec v) {
#if defined(FUSEFEAT_ISA_AVX512)
  const __m256 eight = _mm256_max_ps(_mm512_extractf32x8_ps((__m512)v, 1), _mm512_castps512_ps256((__m512)v));
#else
  const __m256 eight = (__m256)v;
#endif
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two));
}
#endif

// Four sums at once, each in the order of sum_lanes.
template <typename V, typename A>
inline void sum_lanes_of_four(V a, V b, V c, V d, A* to) {
  to[0] = sum_lanes(a);
  to[1] = sum_lanes(b);
  to[2] = sum_lanes(c);
  to[3] = sum_lanes(d);
}

#if defined(FUSEFEAT_ISA_AVX512)
inline void sum_lanes_of_four(FloatVec a, FloatVec b, FloatVec c, FloatVec d, float* to) {
  const auto halves = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  };
  const __m512 ab = halves((__m512)a, (__m512)b), cd = halves((__m512)c, (__m512)d);
  const __m512 quarters = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 pairs = _mm512_add_ps(quarters, _mm512_permute_ps(quarters, 0xee));
  const __m512 sums = _mm512_add_ps(pairs, _mm512_movehdup_ps(pairs));
  const __m512i first_of_quarter = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_quarter, sums)));
}
#elif defined(FUSEFEAT_ISA_AVX2)
inline void sum_lanes_of_four(FloatVec a, FloatVec b, FloatVec c, FloatVec d, float* to) {
  const auto halves = [](__m256 x, __m256 y) {
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  };
  const __m256 ab = halves((__m256)a, (__m256)b), cd = halves((__m256)c, (__m256)d);
  const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(pairs, pairs, 0x88), _mm256_shuffle_ps(pairs, pairs, 0xdd));
  _mm_storeu_ps(to, _mm_unpacklo_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
#endif

template <typename I>
inline bool any_lane(I mask) {
#if defined(FUSEFEAT_ISA_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(FUSEFEAT_ISA_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  uint64_t halves[2];
  __builtin_memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}

template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int degree = 7;
  static constexpr float low = -104.0f, high = 89.0f;
  static constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the last bits
  static constexpr int32_t round_bits = 0x4b400000;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr int degree = 13;
  static constexpr double low = -746.0, high = 710.0;
  static constexpr double round = 0x1.8p52;
  static constexpr int64_t round_bits = 0x4338000000000000;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int mantissa = 52, bias = 1023;
};

// e^x to about one unit in the last place, results below the normal range included; NaN stays NaN.
template <typename A>
inline VecOf<A> exp_lanes(VecOf<A> x) {
  using C = ExpConstants<A>;
  using V = VecOf<A>;
  using I = IntOf<A>;
  x = x < C::low ? splat<A>(C::low) : x;
  x = x > C::high ? splat<A>(C::high) : x;
  const V shifted = fma(x, splat<A>(static_cast<A>(1.4426950408889634)), splat<A>(C::round));
  const I n = (I)shifted - C::round_bits;
  const V rounded = shifted - C::round;
  V r = fma(rounded, splat<A>(-C::ln2_high), x);
  r = fma(rounded, splat<A>(-C::ln2_low), r);
  double factorial = 1;
  A coefficients[C::degree + 1];
  for (int i = 0; i <= C::degree; ++i) {
    coefficients[i] = static_cast<A>(1 / factorial);
    factorial *= i + 1;
  }
  V result = splat<A>(coefficients[C::degree]);
  for (int i = C::degree - 1; i >= 0; --i) result = fma(result, r, splat<A>(coefficients[i]));
  // 2^n in two steps, so that neither leaves the range of normal numbers.
  const I half = n >> 1;
  const V scale_low = (V)((half + C::bias) << C::mantissa);
  const V scale_high = (V)((n - half + C::bias) << C::mantissa);
  return result * scale_low * scale_high;
}

// x, or where it is less what exp_bounded makes 0 of; NaN stays NaN.
template <typename A>
inline VecOf<A> bounded_below(VecOf<A> x) {
  constexpr A low = ExpConstants<A>::low;
#if defined(FUSEFEAT_ISA_AVX512)
  // The second operand is what max gives for a NaN.
  if constexpr (sizeof(A) == sizeof(float)) return (FloatVec)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#endif
  return x < low ? splat<A>(low) : x;
}

// e^x where x <= 0 but for rounding and bounded_below; NaN stays NaN. Cheaper than exp_lanes where there are
// instructions for the first and last steps; its error grows by the rounding of x / ln 2, which is that of an x that
// was computed.
template <typename A>
inline VecOf<A> exp_bounded(VecOf<A> x) {
#if defined(FUSEFEAT_ISA_AVX512)
  if constexpr (sizeof(A) == sizeof(float)) {
    const FloatVec t = x * 0x1.715476p+0f;  // 2^t
    const FloatVec r = (FloatVec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    FloatVec p = splat<float>(0x1.c54176p-13f);
    p = fma(p, r, splat<float>(0x1.46d64cp-10f));
    p = fma(p, r, splat<float>(0x1.3d0b92p-7f));
    p = fma(p, r, splat<float>(0x1.c68912p-5f));
    p = fma(p, r, splat<float>(0x1.ebfd58p-3f));
    p = fma(p, r, splat<float>(0x1.62e42cp-1f));
    p = fma(p, r, splat<float>(1.0f));
    return (FloatVec)_mm512_scalef_ps((__m512)p, (__m512)t);  // by its integer part
  }
#endif
  return exp_lanes<A>(x);
}

template <typename A>
inline A exp_one(A x) {
  return exp_lanes<A>(splat<A>(x))[0];
}

inline float log_one(float x) {
  return __builtin_logf(x);
}
inline double log_one(double x) {
  return __builtin_log(x);
}

}  // namespace
}  // namespace fusefeat
