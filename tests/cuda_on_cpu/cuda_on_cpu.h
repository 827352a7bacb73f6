// Runs CUDA kernels on the CPU, for tests: just enough of the language to compile csrc/cuda with a
// host compiler. Each CUDA thread is a fiber; blocks run one after another. It is strict where a
// GPU is lenient: see scheduler.h for what it detects.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "launches.h"
#include "scheduler.h"

#define FUSEFEAT_DEVICE_KEY CPU

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

#define threadIdx (cuda_on_cpu::scheduler().thread_index())
#define blockIdx (cuda_on_cpu::scheduler().block_index)
#define blockDim (cuda_on_cpu::scheduler().block_size)
#define gridDim (cuda_on_cpu::scheduler().grid_size)

#define SHARED_ARRAY(T, name, count) \
  static char name##_key;            \
  T* name = static_cast<T*>(cuda_on_cpu::scheduler().static_shared(&name##_key, sizeof(T) * (count)))

#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(cuda_on_cpu::scheduler().dynamic_shared())

#define FUSEFEAT_UNPAREN(...) __VA_ARGS__
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  cuda_on_cpu::launch(FUSEFEAT_UNPAREN kernel, dim3(grid), dim3(block), shared_bytes, __VA_ARGS__)

namespace cuda_on_cpu {

inline Index to_index(dim3 size) {
  return {size.x, size.y, size.z};
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, const Arguments&... arguments) {
  if (launches().take(reinterpret_cast<const void*>(kernel), block.x * block.y * block.z, shared_bytes)) return;
  const std::tuple<std::remove_const_t<Parameters>...> copies(arguments...);
  scheduler().run(to_index(grid), to_index(block), shared_bytes, [&] { std::apply(kernel, copies); });
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T shuffle(WarpOp op, unsigned mask, T value, int argument, int width) {
  return from_bits<T>(scheduler().warp(op, mask, to_bits(value), argument, width));
}

}  // namespace cuda_on_cpu

// The line tells barriers apart: all threads of a block must be at the same one.
inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_on_cpu::scheduler().barrier(0, line);
}
inline int __syncthreads_count(int flag, int line = __builtin_LINE()) {
  return cuda_on_cpu::scheduler().barrier(flag, line);
}
inline int __syncthreads_or(int flag, int line = __builtin_LINE()) {
  return __syncthreads_count(flag, line) != 0;
}
inline int __syncthreads_and(int flag, int line = __builtin_LINE()) {
  return __syncthreads_count(!flag, line) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_cpu::scheduler().warp(cuda_on_cpu::WarpOp::kSync, mask, 0, 0, 32);
}
inline unsigned __ballot_sync(unsigned mask, int flag) {
  return static_cast<unsigned>(cuda_on_cpu::scheduler().warp(cuda_on_cpu::WarpOp::kBallot, mask, flag != 0, 0, 32));
}
inline int __any_sync(unsigned mask, int flag) {
  return __ballot_sync(mask, flag) != 0;
}
inline int __all_sync(unsigned mask, int flag) {
  return __ballot_sync(mask, !flag) == 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::kShuffle, mask, value, lane, width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::kShuffleXor, mask, value, lanes, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::kShuffleUp, mask, value, static_cast<int>(delta), width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::kShuffleDown, mask, value, static_cast<int>(delta), width);
}

// A misaligned 16-byte access faults on a GPU.
template <typename T>
T __ldg(const T* from) {
  cuda_on_cpu::scheduler().check(
      reinterpret_cast<uintptr_t>(from) % alignof(T) == 0, "a load is not aligned to its size");
  return *from;
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
