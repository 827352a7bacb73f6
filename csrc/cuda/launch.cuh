// What differs between nvcc and the host compiler, under which the tests run the same kernels
// on the CPU (tests/cuda_on_cpu).
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

// Dispatch key of the operators and, below it, shared memory and launches.
#define FUSEFEAT_DEVICE_KEY CUDA

#define SHARED_ARRAY(T, name, count) __shared__ T name[count]

#define DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_bytes)

#define FUSEFEAT_UNPAREN(...) __VA_ARGS__

// The kernel comes in parentheses, so that template arguments may hold commas.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  FUSEFEAT_UNPAREN kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

#else

#include <cuda_on_cpu.h>

#endif
