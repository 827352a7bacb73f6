// Elements of tensors whose type is known at run time only.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "primitives.cuh"
#include "shared_logits.h"

namespace fusefeat::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <typename T>
constexpr Scalar kScalarOf = std::is_same_v<T, double>     ? Scalar::f64
                             : std::is_same_v<T, BFloat16> ? Scalar::bf16
                             : std::is_same_v<T, Half>     ? Scalar::f16
                                                           : Scalar::f32;

template <typename A>
__device__ __forceinline__ A load_any(const void* data, Scalar type, int64_t index) {
  if constexpr (std::is_same_v<A, double>) {
    return static_cast<const double*>(data)[index];
  } else {
    if (type == Scalar::bf16) return static_cast<float>(static_cast<const BFloat16*>(data)[index]);
    if (type == Scalar::f16) return static_cast<float>(static_cast<const Half*>(data)[index]);
    return static_cast<const float*>(data)[index];
  }
}

template <typename A>
__device__ __forceinline__ void store_any(void* data, Scalar type, int64_t index, A value) {
  if constexpr (std::is_same_v<A, double>) {
    static_cast<double*>(data)[index] = value;
  } else if (type == Scalar::bf16) {
    static_cast<BFloat16*>(data)[index] = BFloat16(value);
  } else if (type == Scalar::f16) {
    static_cast<Half*>(data)[index] = Half(value);
  } else {
    static_cast<float*>(data)[index] = value;
  }
}

template <typename A>
__device__ __forceinline__ A load_element(const Matrix& matrix, int64_t row, int64_t col) {
  return load_any<A>(matrix.data, matrix.type, row * matrix.row_stride + col * matrix.col_stride);
}

template <typename A>
__device__ __forceinline__ A round_operand(A value, int operand) {
  if constexpr (std::is_same_v<A, float>) {
    if (operand == 1) return static_cast<float>(BFloat16(value));
    if (operand == 2) return static_cast<float>(Half(value));
  }
  return value;
}

template <typename A>
__device__ __forceinline__ bool is_used(const void* row_weight, int64_t row) {
  return row_weight == nullptr || static_cast<const A*>(row_weight)[row] != A(0);
}

// Lets 0 * x be 0 where x stands for -inf; NaN passes.
template <typename A>
__device__ __forceinline__ A bounded_below(A x) {
  return x < A(-1e30) ? A(-1e30) : x;
}

constexpr int kVectorThreads = 256;

// Numbers of any type and stride to acc, next to each other.
template <typename A>
__global__ void __launch_bounds__(kVectorThreads)
    gather_values(const void* from, Scalar type, int64_t stride, int64_t count, A* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) to[i] = load_any<A>(from, type, i * stride);
}

}  // namespace fusefeat::cuda
