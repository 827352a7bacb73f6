// Tensor-core products of one warp: each lane shows its fragments to the others, whose stacks stay while they wait.
#pragma once

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

// Rounds half away from zero to 10 bits behind the point, as cvt.rna does.
inline float to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// What the tensor cores read of a word; NaN stays one.
inline float truncate_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7f800000u) != 0x7f800000u) bits &= ~0x1fffu;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// m16n8 with 8 words of depth; get(word, i) is element i of a word of two (0 for the second of one that has one).
template <typename Word, typename Get>
void multiply_add(float (&sums)[4], const Word (&a)[4], const Word (&b)[2], Get get) {
  struct Fragments {
    const Word *a, *b;
  };
  static Fragments shown[32][32];
  Fragments(&lanes)[32] = shown[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  lanes[lane] = {a, b};
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int word = 0; word < 8; ++word) {
      const Word left = lanes[row % 8 * 4 + word % 4].a[row / 8 + word / 4 * 2];
      const Word right = lanes[column * 4 + word % 4].b[word / 4];
      sums[i] += get(left, 0) * get(right, 0);
      sums[i] += get(left, 1) * get(right, 1);
    }
  }
  __syncwarp();
}

}  // namespace cuda_on_cpu
