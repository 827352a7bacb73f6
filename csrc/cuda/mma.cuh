// Tensor-core products of one warp, 16 x 8 with 8 words of depth: words of two half values, or of one value in tf32.
// Lane (g, t) = (lane / 4, lane % 4) holds a = words (t, g), (t, g + 8), (t + 4, g), (t + 4, g + 8) of the left
// operand, b = words (t, g), (t + 4, g) of the right one, and of the sums rows g and g + 8, columns 2t and 2t + 1.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "primitives.cuh"

#ifndef __CUDACC__
#include <mma_on_cpu.h>
#endif

namespace fusefeat::cuda {

// The nearest value with 10 bits behind the point, which is what the tensor cores read.
__device__ __forceinline__ float to_tf32(float value) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  return cuda_on_cpu::to_tf32(value);
#endif
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  cuda_on_cpu::multiply_add(sums, a, b, [](uint32_t word, int i) {
    return static_cast<float>(T(static_cast<uint16_t>(word >> (i * 16)), T::from_bits()));
  });
#endif
}

// tf32
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
  cuda_on_cpu::multiply_add(
      sums, a, b, [](float word, int i) { return i == 0 ? cuda_on_cpu::truncate_tf32(word) : 0.0f; });
#endif
}

}  // namespace fusefeat::cuda
