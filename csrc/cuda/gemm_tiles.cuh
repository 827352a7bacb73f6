// Tiles of a product's operands on their way from global memory, through registers, to shared memory, where they lie
// as [words of depth][outer]: outer are rows or columns of the product.
#pragma once

#include "mma.cuh"
#include "shared_elements.cuh"

namespace fusefeat::cuda {

constexpr int kGemmThreads = 256;

// What a word is, the type of an operand's elements that takes the least work, and the tile: outer x steps words.
template <typename T>
struct SimtWords {
  using Acc = T;
  using Element = T;
  using Word = T;
  static constexpr bool kTensor = false;
  static constexpr int kPerWord = 1, kTile = sizeof(T) == 8 ? 64 : 128, kSteps = 8;
  static __device__ __forceinline__ Word encode(const Acc* values) { return values[0]; }
};

template <typename T>
struct PairWords {
  using Acc = float;
  using Element = T;
  using Word = uint32_t;
  static constexpr bool kTensor = true;
  static constexpr int kPerWord = 2, kTile = 128, kSteps = 16;
  static __device__ __forceinline__ Word encode(const Acc* values) {
    return static_cast<uint32_t>(T(values[0]).x) | static_cast<uint32_t>(T(values[1]).x) << 16;
  }
};

struct Tf32Words {
  using Acc = float;
  using Element = Half;
  using Word = float;
  static constexpr bool kTensor = true;
  static constexpr int kPerWord = 1, kTile = 128, kSteps = 16;
  static __device__ __forceinline__ Word encode(const Acc* values) { return to_tf32(values[0]); }
};

// Steps of neighbouring outer words, which no two of a warp's accesses to the tile find in the same bank.
template <class C>
constexpr int kTileStride = C::kTile + 8;

// kAlongRows: depth runs along the matrix's rows (and outer along its columns), else along its columns. kFast: rows
// are whole 16-byte vectors of Element, or floats of the same number. Each thread moves kWords words: of one outer
// and neighbouring depths, or of one depth and neighbouring outers.
template <class C, bool kAlongRows, bool kFast>
class TileLoader {
  using A = typename C::Acc;
  using Element = typename C::Element;
  using Word = typename C::Word;
  static constexpr int kWords = C::kTile * C::kSteps / kGemmThreads;
  static constexpr int kVector = 16 / sizeof(Element);
  static constexpr int kAcross = C::kTile / kWords;  // threads along outer when kAlongRows

 public:
  __device__ __forceinline__ TileLoader(const RowMatrix& matrix, int64_t outer)
      : outer_(outer + (kAlongRows ? threadIdx.x % kAcross * kWords : threadIdx.x % C::kTile)),
        step_(kAlongRows ? threadIdx.x / kAcross : threadIdx.x / C::kTile * kWords) {
    if constexpr (!kAlongRows) read_ = row_used(matrix, outer_);
  }

  // Depths at and after `depth`, as many as a tile has.
  __device__ __forceinline__ void fetch(const RowMatrix& matrix, int64_t depth) {
    const int64_t first = depth + step_ * C::kPerWord;
    if constexpr (!kAlongRows) {
      constexpr int kElements = kWords * C::kPerWord;
      A values[kElements];
      if constexpr (kFast) {
#pragma unroll
        for (int i = 0; i < kElements; i += kVector) {
          read_vector(matrix, outer_, first + i, read_, words_ + i / C::kPerWord);
        }
      } else {
        read_elements<kElements>(matrix, outer_, first, read_, values);
#pragma unroll
        for (int i = 0; i < kWords; ++i) words_[i] = C::encode(values + i * C::kPerWord);
      }
    } else if constexpr (kFast && C::kPerWord == 2) {
      Word one[kWords / 2], two[kWords / 2];
      read_vector(matrix, first, outer_, row_used(matrix, first), one);
      read_vector(matrix, first + 1, outer_, row_used(matrix, first + 1), two);
#pragma unroll
      for (int i = 0; i < kWords / 2; ++i) {
        words_[2 * i] = (one[i] & 0xffffu) | two[i] << 16;
        words_[2 * i + 1] = one[i] >> 16 | (two[i] & 0xffff0000u);
      }
    } else if constexpr (kFast) {
      const bool read = row_used(matrix, first);
#pragma unroll
      for (int i = 0; i < kWords; i += kVector) read_vector(matrix, first, outer_ + i, read, words_ + i);
    } else {
      static_assert(C::kPerWord == 1);
      A values[kWords];
      read_elements<kWords>(matrix, first, outer_, row_used(matrix, first), values);
#pragma unroll
      for (int i = 0; i < kWords; ++i) words_[i] = C::encode(values + i);
    }
  }

  __device__ __forceinline__ void put(Word* tile) const {
    if constexpr (kAlongRows) {
      constexpr int kRun = 16 / sizeof(Word);
      Word* to = tile + step_ * kTileStride<C> + threadIdx.x % kAcross * kWords;
#pragma unroll
      for (int i = 0; i < kWords; i += kRun) {
        uint4 raw;
        memcpy(&raw, words_ + i, sizeof(raw));
        *reinterpret_cast<uint4*>(to + i) = raw;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) tile[(step_ + i) * kTileStride<C> + threadIdx.x % C::kTile] = words_[i];
    }
  }

 private:
  static __device__ __forceinline__ bool row_used(const RowMatrix& matrix, int64_t row) {
    return row < matrix.rows && is_used<A>(matrix.row_weight, matrix.first + row);
  }

  static __device__ __forceinline__ Matrix part_of(const RowMatrix& matrix, int64_t& row) {
    row += matrix.first;
    if (row < matrix.split) return matrix.head;
    row -= matrix.split;
    return matrix.tail;
  }

  // kVector elements as words that hold neighbouring columns.
  static __device__ __forceinline__ void read_vector(
      const RowMatrix& matrix, int64_t row, int64_t col, bool read, Word* words) {
    constexpr int kCount = kVector / C::kPerWord;
    if (!read || col >= matrix.cols) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) words[i] = Word(0);
      return;
    }
    const Matrix from = part_of(matrix, row);
    const int64_t index = row * from.row_stride + col;
    if constexpr (C::kTensor) {
      if (from.type == kScalarOf<Element>) {
        const auto pack = load_pack<kVector>(static_cast<const Element*>(from.data) + index);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if constexpr (C::kPerWord == 2) {
            words[i] = pack.words[i];
          } else {
            words[i] = pack.get(i);
          }
        }
        return;
      }
    }
    const auto pack = load_pack<kVector>(static_cast<const A*>(from.data) + index);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      A values[C::kPerWord];
#pragma unroll
      for (int j = 0; j < C::kPerWord; ++j) {
        values[j] = pack.get(i * C::kPerWord + j);
        // A word of pairs is in the operand's type anyway.
        if constexpr (std::is_same_v<C, Tf32Words>) values[j] = round_operand(values[j], matrix.operand);
      }
      words[i] = C::encode(values);
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void read_elements(
      const RowMatrix& matrix, int64_t row, int64_t col, bool read, A (&values)[kCount]) {
    Matrix from;
    if (read) from = part_of(matrix, row);
    const auto read_as = [&](auto zero) {
      using T = decltype(zero);
      const T* at = static_cast<const T*>(from.data) + row * from.row_stride + col * from.col_stride;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i] = read && col + i < matrix.cols ? static_cast<A>(at[i * from.col_stride]) : A(0);
      }
    };
    if constexpr (std::is_same_v<A, double>) {
      read_as(0.0);
    } else {
      if (from.type == Scalar::bf16) {
        read_as(BFloat16());
      } else if (from.type == Scalar::f16) {
        read_as(Half());
      } else {
        read_as(0.0f);
      }
      if (matrix.operand != 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = round_operand(values[i], matrix.operand);
      }
    }
  }

  Word words_[kWords];
  int64_t outer_;
  int step_;
  bool read_ = true;
};

}  // namespace fusefeat::cuda
