// Building blocks of the kernels: 16-byte accesses, sums over the threads that share a row, and
// the arithmetic of an online softmax.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace fusefeat::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements that are next to each other, moved by 16-byte accesses when they are that many. Half
// types stay in 32-bit words: as single elements each would take a register.
template <typename T, int kCount>
struct Pack {
  static constexpr bool kHalves = sizeof(T) == 2 && kCount % 2 == 0;
  static constexpr int kWords = kHalves ? kCount / 2 : kCount;
  using Word = std::conditional_t<kHalves, uint32_t, T>;
  Word words[kWords];

  __device__ __forceinline__ AccOf<T> get(int i) const {
    if constexpr (kHalves) {
      return static_cast<float>(T(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)), T::from_bits()));
    } else {
      return static_cast<AccOf<T>>(words[i]);
    }
  }
  // In order of i.
  __device__ __forceinline__ void set(int i, AccOf<T> value) {
    if constexpr (kHalves) {
      const uint32_t bits = T(value).x;
      words[i / 2] = i % 2 == 0 ? bits : words[i / 2] | bits << 16;
    } else {
      words[i] = static_cast<T>(value);
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = Word(0);
  }
  // Hides from the compiler that the elements have not changed. It would otherwise keep those that
  // are converted twice in their wider type, and run out of registers.
  __device__ __forceinline__ void forget() {
#ifdef __CUDA_ARCH__
    if constexpr (kHalves) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(words[i]));
    }
#endif
  }
};

// Read-only data of this launch.
template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* from) {
  Pack<T, kCount> pack;
  if constexpr (sizeof(pack) % 16 == 0) {
    uint4 raw[sizeof(pack) / 16];
#pragma unroll
    for (size_t i = 0; i < sizeof(pack) / 16; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    memcpy(&pack, raw, sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.set(i, static_cast<AccOf<T>>(from[i]));
  }
  return pack;
}

template <int kCount, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& pack) {
  if constexpr (sizeof(pack) % 16 == 0) {
    uint4 raw[sizeof(pack) / 16];
    memcpy(raw, &pack, sizeof(pack));
#pragma unroll
    for (size_t i = 0; i < sizeof(pack) / 16; ++i) reinterpret_cast<uint4*>(to)[i] = raw[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = static_cast<T>(pack.get(i));
  }
}

template <int kCount, typename A>
__device__ __forceinline__ void store_channels(A* to, const A* channels) {
  Pack<A, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.set(i, channels[i]);
  store_pack(to, pack);
}

// A tensor that is either of the tokens' type or of the accumulation type.
template <typename T>
__device__ __forceinline__ AccOf<T> load_either(const void* data, int64_t index, bool in_acc) {
  using A = AccOf<T>;
  return in_acc ? static_cast<const A*>(data)[index] : static_cast<A>(static_cast<const T*>(data)[index]);
}

template <typename T>
__device__ __forceinline__ void store_either(void* data, int64_t index, AccOf<T> value, bool in_acc) {
  if (in_acc) {
    static_cast<AccOf<T>*>(data)[index] = value;
  } else {
    static_cast<T*>(data)[index] = static_cast<T>(value);
  }
}

// The accurate functions: they run once per token, not once per element.
__device__ __forceinline__ float exp_of(float x) {
  return expf(x);
}
__device__ __forceinline__ double exp_of(double x) {
  return exp(x);
}

// The log of a sum of exponentials, in double: a float would not resolve exp(score - lse) at a large peak.
template <typename A>
__device__ __forceinline__ double log_sum(A peak, A total) {
  return total == A(0) ? -static_cast<double>(INFINITY) : static_cast<double>(peak) + log(static_cast<double>(total));
}

// exp(score - lse): the difference of near numbers is exact, and the rest of lse follows.
template <typename A>
__device__ __forceinline__ A weight_of(A score, double lse) {
  const A high = static_cast<A>(lse), low = static_cast<A>(lse - static_cast<double>(high));
  return exp_of(score - high - low);
}

template <typename A>
__device__ __forceinline__ A neg_inf() {
  return -static_cast<A>(INFINITY);
}

// A NaN candidate loses on purpose: it enters the softmax through its exponential.
template <typename A>
__device__ __forceinline__ A greater_of(A peak, A candidate) {
  return candidate > peak ? candidate : peak;
}

// What a sum relative to the peak `from` is multiplied by when the peak becomes `to` >= from.
// Equal infinities must give 1, not exp(inf - inf).
template <typename A>
__device__ __forceinline__ A rescale(A from, A to) {
  return from == to ? A(1) : exp_of(from - to);
}

// A team is the threads that share a token row: a power of two of them. Teams smaller than a warp
// sit side by side in it, each with its own row; a team larger than a warp is the whole block.
struct Team {
  int size;
  int lane;   // this thread within its team
  int row;    // this team among those of the warp
  int count;  // teams of the warp

  __device__ explicit Team(int team_size)
      : size(team_size),
        lane(threadIdx.x & (team_size - 1)),
        row(team_size < kWarp ? static_cast<int>(threadIdx.x % kWarp) / team_size : 0),
        count(team_size < kWarp ? kWarp / team_size : 1) {}

  // Sums each value over the team; every thread gets the result. `exchange` is shared memory for
  // 2 * warps * kCount values, used by teams larger than a warp only. Its halves take turns, so
  // that one barrier is enough; `turn` starts at 0 and belongs to the caller.
  template <int kCount, typename A>
  __device__ __forceinline__ void sum(A (&values)[kCount], A* exchange, int& turn) const {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      if (offset < size) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], offset);
      }
    }
    if (size <= kWarp) return;
    const int warps = size / kWarp;
    A* half = exchange + turn * warps * kCount;
    turn ^= 1;
    if (lane % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) half[lane / kWarp * kCount + i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = half[i];
#pragma unroll 2
    for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += half[warp * kCount + i];
    }
  }
};

}  // namespace fusefeat::cuda
