// One tiled product for the three that the shared-logits operators need: sum over depth of a[outer] b[outer], by
// tensor cores or by plain multiply-adds, handed to an output that knows what becomes of it.
#pragma once

#include "gemm_tiles.cuh"

namespace fusefeat::cuda {

template <class Output>
struct GemmArgs {
  RowMatrix a, b;
  int64_t rows = 0, columns = 0, depth = 0;
  int64_t row_tiles = 0, column_tiles = 0;
  Parts parts;
  Output out;
};

// A thread's share of the sums of a tile.
template <class C, bool kTensor = C::kTensor>
class Sums;

// 16 x 16 threads, each with kGroups x kGroups blocks of neighbouring sums.
template <class C>
class Sums<C, false> {
  using A = typename C::Acc;
  static constexpr int kEach = C::kTile / 16, kRun = 16 / sizeof(A), kGroups = kEach / kRun;

 public:
  __device__ __forceinline__ void multiply(const A* a, const A* b) {
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      A left[kEach], right[kEach];
      read(a + step * kTileStride<C> + threadIdx.x / 16 * kRun, left);
      read(b + step * kTileStride<C> + threadIdx.x % 16 * kRun, right);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums_[i][j] += left[i] * right[j];
      }
    }
  }

  // put(row, column, neighbouring sums)
  template <class Put>
  __device__ __forceinline__ void for_each(const Put& put) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        A run[kRun];
#pragma unroll
        for (int j = 0; j < kRun; ++j) run[j] = sums_[i][group * kRun + j];
        put(at(threadIdx.x / 16, i / kRun) + i % kRun, at(threadIdx.x % 16, group), run);
      }
    }
  }

 private:
  static __device__ __forceinline__ int at(int thread, int group) { return group * 16 * kRun + thread * kRun; }

  static __device__ __forceinline__ void read(const A* from, A (&to)[kEach]) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from + group * 16 * kRun);
      memcpy(to + group * kRun, &raw, sizeof(raw));
    }
  }

  A sums_[kEach][kEach] = {};
};

// 2 x 4 warps, each with 4 x 4 products of 16 x 8.
template <class C>
class Sums<C, true> {
  using Word = typename C::Word;
  static constexpr int kRows = 64, kColumns = 32;  // of a warp
  static_assert(C::kTile == 128 && kGemmThreads == 256);

 public:
  __device__ __forceinline__ void multiply(const Word* a, const Word* b) {
    const int t = threadIdx.x % 4, g = threadIdx.x % kWarp / 4;
    a += first_row() + t * kTileStride<C> + g;
    b += first_column() + t * kTileStride<C> + g;
#pragma unroll
    for (int step = 0; step < C::kSteps; step += 8) {
      Word left[4][4], right[4][2];
      const Word *left_at = a + step * kTileStride<C>, *right_at = b + step * kTileStride<C>;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) left[i][j] = left_at[j / 2 * 4 * kTileStride<C> + i * 16 + j % 2 * 8];
#pragma unroll
        for (int j = 0; j < 2; ++j) right[i][j] = right_at[j * 4 * kTileStride<C> + i * 8];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<typename C::Element>(sums_[i][j], left[i], right[j]);
      }
    }
  }

  template <class Put>
  __device__ __forceinline__ void for_each(const Put& put) const {
    const int t = threadIdx.x % 4, g = threadIdx.x % kWarp / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float run[2] = {sums_[i][j][2 * half], sums_[i][j][2 * half + 1]};
          put(first_row() + i * 16 + half * 8 + g, first_column() + j * 8 + 2 * t, run);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int first_row() { return threadIdx.x / kWarp / 4 * kRows; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / kWarp % 4 * kColumns; }

  float sums_[4][4][4] = {};
};

template <class C, bool kFast, class Output>
__global__ void __launch_bounds__(kGemmThreads, kFast ? 2 : 1) multiply(const GemmArgs<Output> args) {
  using A = typename C::Acc;
  constexpr int kBuffer = C::kSteps * kTileStride<C>, kDepth = C::kSteps * C::kPerWord;
  SHARED_ARRAY(typename C::Word, tiles, 4 * kBuffer);  // two of a, two of b
  // Neighbouring blocks share b's tile, the larger operand.
  const int64_t tile = blockIdx.x / args.parts.count, part = blockIdx.x % args.parts.count;
  const int64_t row = tile % args.row_tiles * C::kTile, column = tile / args.row_tiles * C::kTile;
  const int64_t begin = part * args.parts.depth;
  const int64_t end = begin + args.parts.depth < args.depth ? begin + args.parts.depth : args.depth;

  TileLoader<C, Output::kLeftAlongRows, kFast> a(args.a, row);
  TileLoader<C, Output::kRightAlongRows, kFast> b(args.b, column);
  Sums<C> sums;
  if (begin < end) {
    a.fetch(args.a, begin);
    b.fetch(args.b, begin);
    a.put(tiles);
    b.put(tiles + 2 * kBuffer);
  }
  int turn = 0;
  for (int64_t depth = begin; depth < end; depth += kDepth) {
    __syncthreads();
    const bool more = depth + kDepth < end;
    if (more) {
      a.fetch(args.a, depth + kDepth);
      b.fetch(args.b, depth + kDepth);
    }
    sums.multiply(tiles + turn * kBuffer, tiles + (2 + turn) * kBuffer);
    turn ^= 1;
    if (more) {
      a.put(tiles + turn * kBuffer);
      b.put(tiles + (2 + turn) * kBuffer);
    }
  }

  A* partial = args.parts.count == 1 ? nullptr : static_cast<A*>(args.parts.sums) + part * args.rows * args.columns;
  sums.for_each([&](int i, int j, const auto& run) {
    const int64_t to_row = row + i, to_column = column + j;
    if (to_row >= args.rows) return;
    constexpr int kRun = sizeof(run) / sizeof(A);
    if (partial == nullptr) {
      if constexpr (Output::kTakesRuns) {
        if (args.out.put_run(to_row, to_column, run)) return;
      }
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (to_column + k >= args.columns) break;
      if (partial != nullptr) {
        partial[to_row * args.columns + to_column + k] = run[k];
      } else {
        args.out.put(to_row, to_column + k, run[k]);
      }
    }
  });
}

}  // namespace fusefeat::cuda
