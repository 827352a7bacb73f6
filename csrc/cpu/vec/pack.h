// Packing of rows and weights for gemm.h: any strides and dtypes in, strips of the accumulation type (or of
// pairs of bfloat16) out, zeros where a strip reaches past the matrix.
#pragma once

#include "cpu/shared_logits.h"
#include "gemm.h"

namespace fusefeat {
namespace {

using cpu::Chunk;
using cpu::Logits;
using cpu::Matrix;
using cpu::Scalar;

template <typename A>
inline A round_to(A value, int operand) {
  if (operand == 1) {
    BFloat16 rounded;
    from_acc(static_cast<float>(value), &rounded);
    return static_cast<A>(to_acc(rounded));
  }
  if (operand == 2) {
    Half rounded;
    from_acc(static_cast<float>(value), &rounded);
    return static_cast<A>(to_acc(rounded));
  }
  return value;
}

inline FloatVec round_lanes(FloatVec v, int operand) {
  if (operand == 1) {
    BFloat16 rounded[kLanes<float>];
    store(rounded, v);
    return load(rounded);
  }
  Half rounded[kLanes<float>];
  store(rounded, v);
  return load(rounded);
}

// What a vector of logits is after it was stored in float16; doubles never are.
template <typename A>
inline VecOf<A> in_float16(VecOf<A> v) {
  if constexpr (sizeof(A) == sizeof(float)) return round_lanes(v, 2);
  return v;
}

// `count` elements to acc, rounded to the operand's type.
template <typename A, typename T>
inline void to_operands(const T* from, int64_t stride, int64_t count, int operand, A* to) {
  int64_t i = 0;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (stride == 1) {
      for (; i + kLanes<A> <= count; i += kLanes<A>) {
        const FloatVec v = load(from + i);
        store(to + i, operand == 0 ? v : round_lanes(v, operand));
      }
    }
  }
  for (; i < count; ++i) to[i] = round_to<A>(static_cast<A>(to_acc(from[i * stride])), operand);
}

// Elements [begin, begin + count) of a row.
template <typename A>
inline void row_to_operands(const Matrix& matrix, int64_t row, int64_t begin, int64_t count, int operand, A* to) {
  const int64_t offset = row * matrix.row_stride + begin * matrix.col_stride;
  const auto convert = [&](auto* base) { to_operands<A>(base + offset, matrix.col_stride, count, operand, to); };
  if constexpr (sizeof(A) == sizeof(double)) {
    convert(static_cast<const double*>(matrix.data));
  } else {
    if (matrix.type == Scalar::f32) convert(static_cast<const float*>(matrix.data));
    if (matrix.type == Scalar::bf16) convert(static_cast<const BFloat16*>(matrix.data));
    if (matrix.type == Scalar::f16) convert(static_cast<const Half*>(matrix.data));
  }
}

template <typename T>
constexpr Scalar kScalar = Scalar::f32;
template <>
inline constexpr Scalar kScalar<double> = Scalar::f64;
template <>
inline constexpr Scalar kScalar<BFloat16> = Scalar::bf16;

template <bool kPairs, typename A>
struct OperandOf {
  using Type = A;
};
template <>
struct OperandOf<true, float> {
  using Type = BFloat16;
};
// What is multiplied.
template <typename A, bool kPairs>
using Operand = typename OperandOf<kPairs, A>::Type;

// A range of rows that are packed together: of the chunk, or of the weight.
struct RowRange {
  const Logits* logits;
  bool is_weight;
  int64_t begin, count;  // rows at and past `count` are zero

  // Which matrix, and which of its rows, holds a row of this range.
  const Matrix& locate(int64_t& row) const {
    row += begin;
    if (is_weight) return logits->weight;
    if (logits->used != nullptr) row = logits->used[row];
    if (row < logits->context_rows) return logits->context;
    row -= logits->context_rows;
    return logits->input;
  }

  template <typename A>
  void get(int64_t row, int64_t begin_column, int64_t columns, A* to) const {
    if (row >= count) {
      for (int64_t i = 0; i < columns; ++i) to[i] = A{};
      return;
    }
    const Matrix& matrix = locate(row);
    row_to_operands(matrix, row, begin_column, columns, logits->operand, to);
  }

  // The row itself when it holds neighbouring numbers of this type that need no rounding, else null.
  template <typename T>
  const T* direct(int64_t row, int64_t column) const {
    if (row >= count) return nullptr;
    const Matrix& matrix = locate(row);
    if (matrix.type != kScalar<T> || matrix.col_stride != 1) return nullptr;
    if (logits->operand != 0 && matrix.type != Scalar::bf16) return nullptr;
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + column;
  }
};

#if defined(FUSEFEAT_BF16)
// Two vectors of float to 32 bfloat16, in order.
inline FloatVec to_pairs(const float* from) {
  return (FloatVec)_mm512_cvtne2ps_pbh((__m512)load(from + 16), (__m512)load(from));
}

// Lane i of the results: (a[i], b[i]), of 16 lanes each.
inline FloatVec interleave_pairs(FloatVec a, FloatVec b) {
  typedef Simd<float>::U U;
  return (FloatVec)(((U)a >> 16) | ((U)b & 0xffff0000u));
}
#endif

// One strip's worth of a row, columns [begin, begin + columns) of it being there.
template <typename A, bool kPairs>
inline void get_strip(const RowRange& rows, int64_t row, int64_t begin, int64_t columns, A* to) {
  constexpr int width = kStrip<A> * (kPairs ? 2 : 1);
  const int64_t count = columns < width ? (columns < 0 ? 0 : columns) : width;
  if constexpr (kPairs) {
#if defined(FUSEFEAT_BF16)
    const BFloat16* direct = count == width ? rows.direct<BFloat16>(row, begin) : nullptr;
    if (direct != nullptr) {
      __builtin_memcpy(to, direct, width * sizeof *direct);
      return;
    }
    float wide[width];
    rows.get(row, begin, count, wide);
    for (int64_t i = count; i < width; ++i) wide[i] = 0;
    store(to, to_pairs(wide));
    store(to + 16, to_pairs(wide + 32));
#endif
  } else {
    const A* direct = count == width ? rows.direct<A>(row, begin) : nullptr;
    if (direct != nullptr) {
      __builtin_memcpy(to, direct, width * sizeof *direct);
      return;
    }
    rows.get(row, begin, count, to);
    for (int64_t i = count; i < width; ++i) to[i] = A{};
  }
}

// Rows that are packed together: strips lie a power of two apart, and one row at a time would write all of its strips
// to the same few lines of a cache.
constexpr int64_t kPackedRows = 8;

// For the broadcast operand: rows [first, last) to[strip of columns][row][column], pairs along the columns.
template <typename A, bool kPairs>
inline void pack_by_rows(const RowRange& rows, int64_t first, int64_t last, int64_t begin, int64_t end, A* to) {
  constexpr int width = kStrip<A> * (kPairs ? 2 : 1);
  for (int64_t c = begin; c < end; c += width, to += rows.count * kStrip<A>) {
    for (int64_t r = first; r < last; ++r) get_strip<A, kPairs>(rows, r, c, end - c, to + r * kStrip<A>);
  }
}

// Asks for the memory of a block of a matrix, a few lines at a time.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Matrix& matrix, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    if (matrix.col_stride != 1 || row >= rows) return;
    const int64_t size = matrix.type == Scalar::f64 ? 8 : matrix.type == Scalar::f32 ? 4 : 2;
    at_ = static_cast<const char*>(matrix.data) + (row * matrix.row_stride + begin) * size;
    stride_ = matrix.row_stride * size;
    width_ = (end - begin) * size;
    rows_ = rows - row;
  }

  int64_t lines() const { return rows_ * ((width_ + kLine - 1) / kLine); }

  void ask(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(at_ + offset_, 0, 2);
      offset_ += kLine;
      if (offset_ >= width_) {
        offset_ = 0;
        at_ += stride_;
        --rows_;
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* at_ = nullptr;
  int64_t stride_ = 0, width_ = 0, rows_ = 0, offset_ = 0;
};

// to[column or pair of them][row], kStrip rows.
template <typename A, bool kPairs>
inline void pack_by_columns(const RowRange& rows, int64_t begin, int64_t end, A* to) {
  constexpr int strip = kStrip<A>, lanes = kLanes<A>, width = strip * (kPairs ? 2 : 1);
  alignas(64) A block[strip * strip];
  for (int64_t c = begin; c < end; c += width, to += strip * strip) {
    for (int r = 0; r < strip; ++r) get_strip<A, kPairs>(rows, r, c, end - c, block + r * strip);
    const int64_t left = kPairs ? (end - c + 1) / 2 : end - c;
    const int64_t columns = left < strip ? left : strip;
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        VecOf<A> v[lanes];
        for (int r = 0; r < lanes; ++r) v[r] = load(block + (i * lanes + r) * strip + j * lanes);
        transpose<A>(v);
        for (int k = 0; k < lanes && j * lanes + k < columns; ++k)
          store(to + (j * lanes + k) * strip + i * lanes, v[k]);
      }
    }
  }
}

#if defined(FUSEFEAT_BF16)
// One strip's worth of two rows.
inline void get_strip_of_pairs(const RowRange& rows, int64_t row, int64_t begin, int64_t columns, float* to) {
  constexpr int strip = kStrip<float>;
  const BFloat16* direct_a = columns >= strip ? rows.direct<BFloat16>(row, begin) : nullptr;
  const BFloat16* direct_b = columns >= strip ? rows.direct<BFloat16>(row + 1, begin) : nullptr;
  if (direct_a != nullptr && direct_b != nullptr) {
    store(to, interleave_pairs(load(direct_a), load(direct_b)));
    store(to + 16, interleave_pairs(load(direct_a + 16), load(direct_b + 16)));
    return;
  }
  float a[strip], b[strip];
  get_strip<float, false>(rows, row, begin, columns, a);
  get_strip<float, false>(rows, row + 1, begin, columns, b);
  store(to, interleave_pairs(load(a), load(b)));
  store(to + 16, interleave_pairs(load(a + 16), load(b + 16)));
}
#endif

// to[strip of columns][row or pair of them][column], strips `stride` apart; pairs along the rows.
template <typename A, bool kPairs>
inline void pack_along_rows(const RowRange& rows, int64_t count, int64_t begin, int64_t end, int64_t stride, A* to) {
  constexpr int strip = kStrip<A>, pair = kPairs ? 2 : 1;
  for (int64_t first = 0; first < count; first += kPackedRows) {
    const int64_t last = first + kPackedRows < count ? first + kPackedRows : count;
    A* at = to;
    for (int64_t c = begin; c < end; c += strip, at += stride) {
      for (int64_t r = first; r < last; r += pair) {
        if constexpr (kPairs) {
#if defined(FUSEFEAT_BF16)
          get_strip_of_pairs(rows, r, c, end - c, at + r / pair * strip);
#endif
        } else {
          get_strip<A, false>(rows, r, c, end - c, at + r * strip);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusefeat
