// Kernels with one fault each, chosen by a flag, that the layer must show.
#include <cstdio>
#include <stdexcept>

#include "launch.cuh"

namespace {

enum Fault : int {
  kNone,
  kNoBarrier,
  kNoBarrierDescending,
  kUnwrittenTail,
  kDivergentBarrier,
  kTwoBarriers,
  kPastTheEnd,
  kReturnedLane,
  kDifferentShuffles,
  kMisaligned,
  kPastATensor,
  kPastALocalArray,
};

constexpr int kThreads = 64;

// Across a barrier, behind which nothing of the frame may be forgotten.
__device__ float from_local_array(float value, int last) {
  float local[kThreads];
  for (int i = 0; i < kThreads; ++i) local[i] = value;
  __syncthreads();
  float* end = local + last;
  *end = value;
  return local[kThreads / 2];
}

__global__ void reverse(const float* in, float* out, int fault) {
  DYNAMIC_SHARED(float, shared);
  SHARED_ARRAY(float, tail, kThreads);
  const int i = threadIdx.x;
  if (fault == kPastALocalArray) {
    out[i] = from_local_array(in[kThreads - 1 - i], kThreads);
    return;
  }
  if (fault == kReturnedLane && i == 40) return;
  if (fault != kUnwrittenTail || i < 50) tail[i] = in[i];
  if (fault != kNoBarrierDescending) __syncthreads();
  float sum = fault == kNoBarrierDescending ? tail[i == kThreads - 1 ? i : i + 1] * 0 + 0 : 0;
  shared[i + (fault == kPastTheEnd && i == kThreads - 1)] = in[i];
  if (fault == kDivergentBarrier) {
    if (i < 16) {
      __syncthreads();
    } else {
      sum += 0 * __shfl_xor_sync(0xffffffffu, in[i], 1);
    }
  } else if (fault == kTwoBarriers) {
    if (i < 16) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  if (fault == kMisaligned) sum += 0 * static_cast<float>(__ldg(reinterpret_cast<const uint4*>(in + 1)).x);
  if (fault == kDifferentShuffles && i % 2 == 1) {
    sum += 0 * __shfl_down_sync(0xffffffffu, in[i], 1);
  } else {
    sum += 0 * __shfl_xor_sync(0xffffffffu, in[i], 1);
  }
  for (int j = 0; j < kThreads; ++j) sum += 0 * (fault == kNoBarrierDescending ? 0 : tail[j]);
  out[fault == kPastATensor ? i + 1 : i] = shared[kThreads - 1 - i] + sum;
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_down_sync(0xffffffffu, lane, 20);
  out[32 + lane] = __shfl_up_sync(0xffffffffu, lane, 20);
  out[64 + lane] = __shfl_xor_sync(0xffffffffu, lane, 12, 8);
  out[96 + lane] = __shfl_sync(0xffffffffu, lane, 9, 8);
  out[128 + lane] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
  out[160 + lane] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
}

// Threads leave one by one; the barrier must not wait for them.
__global__ void early_exits(int* out) {
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) __syncthreads();
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

}  // namespace

// Returns what was found, or an empty string.
extern "C" __attribute__((visibility("default"))) const char* run_planted(const float* in, float* out, int fault) {
  static char message[256];
  message[0] = 0;
  try {
    LAUNCH((reverse), 1, kThreads, kThreads * sizeof(float), nullptr, in, out, fault);
  } catch (const std::runtime_error& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
  }
  return message;
}

extern "C" __attribute__((visibility("default"))) void run_shuffles(int* out) {
  LAUNCH((shuffles), 1, 32, 0, nullptr, out);
}

extern "C" __attribute__((visibility("default"))) void run_early_exits(int* out) {
  LAUNCH((early_exits), 1, 64, 0, nullptr, out);
}
