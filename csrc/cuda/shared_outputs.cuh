// What becomes of the sums of a product: logits, or gradients of rows and of the weight.
#pragma once

#include "shared_elements.cuh"

namespace fusefeat::cuda {

template <typename A>
struct LogitsOutput {
  static constexpr bool kLeftAlongRows = false, kRightAlongRows = false, kTakesRuns = true;
  const A* bias;
  A margin;
  A* z;
  int64_t stride, features;
  bool packs;  // runs of z lie on 16-byte boundaries
  void* matrix;
  Scalar type;

  __device__ __forceinline__ A logit(int64_t feature, A sum) const {
    return margin * (bias == nullptr ? sum : sum + bias[feature]);
  }

  __device__ __forceinline__ void put(int64_t row, int64_t feature, A sum) const {
    const A value = logit(feature, sum);
    if (z != nullptr) {
      z[row * stride + feature] = value;
    } else {
      // "not <=" keeps NaN.
      store_any(matrix, type, row * features + feature, value <= margin ? margin : value);
    }
  }

  template <int kRun>
  __device__ __forceinline__ bool put_run(int64_t row, int64_t feature, const A (&sums)[kRun]) const {
    if (!packs || feature + kRun > features) return false;
    A values[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) values[i] = logit(feature + i, sums[i]);
    A* to = z + row * stride + feature;
    if constexpr (sizeof(values) == 8) {
      uint64_t raw;
      memcpy(&raw, values, sizeof(raw));
      *reinterpret_cast<uint64_t*>(to) = raw;
    } else {
      store_channels<kRun>(to, values);
    }
    return true;
  }
};

template <typename A>
struct RowGradientOutput {
  static constexpr bool kLeftAlongRows = false, kRightAlongRows = true, kTakesRuns = false;
  void *context, *input;
  Scalar context_type, input_type;
  int64_t context_rows, first, channels;
  const void* row_weight;

  __device__ __forceinline__ void put(int64_t row, int64_t channel, A sum) const {
    row += first;
    // An infinite weight makes a NaN of a gradient of zeros.
    const A value = is_used<A>(row_weight, row) ? sum : A(0);
    if (row < context_rows) {
      if (context != nullptr) store_any(context, context_type, row * channels + channel, value);
    } else if (input != nullptr) {
      store_any(input, input_type, (row - context_rows) * channels + channel, value);
    }
  }
};

template <typename A>
struct RunningOutput {
  static constexpr bool kLeftAlongRows = true, kRightAlongRows = true, kTakesRuns = false;
  RunningSum sum;
  int64_t columns;

  __device__ __forceinline__ void put(int64_t row, int64_t column, A value) const {
    const int64_t at = row * columns + column;
    if (!sum.first) value += static_cast<const A*>(sum.sum)[at];
    if (sum.last) {
      store_any(sum.out, sum.type, at, value);
    } else {
      static_cast<A*>(sum.sum)[at] = value;
    }
  }
};

// Adds up the parts, in order.
template <typename A, class Output>
__global__ void __launch_bounds__(256) add_parts(const Parts parts, int64_t rows, int64_t columns, const Output out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, step = rows * columns;
  if (index >= step) return;
  const A* from = static_cast<const A*>(parts.sums) + index;
  A sum = 0;
#pragma unroll 4
  for (int64_t part = 0; part < parts.count; ++part) sum += from[part * step];
  out.put(index / columns, index % columns, sum);
}

}  // namespace fusefeat::cuda
