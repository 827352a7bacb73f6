// Where bags begin and end, and how a worker walks those that its range of tokens meets.
//
// Tokens of all bags are numbered through: padded token t of bag b is b * tokens_each + t. So both
// layouts are cut into the same fixed ranges of tokens, by shape alone: offsets stay on the device.
#pragma once

#include "primitives.cuh"

namespace fusefeat::cuda {

struct Bags {
  const void* offsets = nullptr;  // packed: [count + 1], contiguous; null when padded
  bool offsets_64bit = false;
  int64_t count = 0;
  int64_t tokens_each = 0;  // padded only
  int64_t tokens = 0;       // of all bags

  __device__ __forceinline__ int64_t raw_offset(int64_t index) const {
    return offsets_64bit ? static_cast<const int64_t*>(offsets)[index] : static_cast<const int32_t*>(offsets)[index];
  }
  // Offsets come unchecked from the device: clamped, they give no access out of bounds.
  // refuse_bad_offsets sees to the result.
  __device__ __forceinline__ int64_t offset(int64_t index) const {
    if (offsets == nullptr) return index * tokens_each;
    const int64_t value = raw_offset(index);
    return value < 0 ? 0 : value > tokens ? tokens : value;
  }
  __device__ __forceinline__ int64_t start(int64_t bag) const { return offset(bag); }
  __device__ __forceinline__ int64_t end(int64_t bag) const { return offset(bag + 1); }

  // Where a range of tokens that may reach past the last one ends.
  __device__ __forceinline__ int64_t limit(int64_t token) const { return token < tokens ? token : tokens; }

  // The number of bags that end at or before `token`; the whole warp asks for the same token, and
  // each lane probes one place. The loop ends for unsorted offsets too.
  __device__ __forceinline__ int64_t ended_by(int64_t token) const {
    if (offsets == nullptr) return token / tokens_each;
    const int lane = threadIdx.x % kWarp;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t step = (high - low + kWarp - 1) / kWarp;
      const int64_t probe = low + (lane + 1) * step - 1;
      const int ended = __popc(__ballot_sync(kAllLanes, probe < high && end(probe) <= token));
      const int64_t next = low + (ended + 1) * step - 1;
      low += ended * step;
      high = next < high ? next : high;
    }
    return low;
  }

  // Calls segment(bag, begin, end) for the part of each non-empty bag within [first, first + length),
  // and gap(begin, end) for tokens outside of all bags: every token exactly once, in order. begin
  // and end count from first; 32 bits hold them, which saves the kernels registers.
  template <typename Segment, typename Gap>
  __device__ __forceinline__ void walk(int64_t first, int length, Segment segment, Gap gap) const {
    const auto within = [&](int64_t token) {
      return token >= first + length ? length : token > first ? static_cast<int>(token - first) : 0;
    };
    int token = 0;
    int64_t bag = length > 0 ? ended_by(first) : count;
    while (token < length) {
      const int begin = bag < count ? within(start(bag)) : length;
      if (begin > token) {
        gap(token, begin);
        token = begin;
        if (token == length) break;
      }
      const int stop = within(end(bag));
      if (stop > token) {
        segment(bag, token, stop);
        token = stop;
      }
      ++bag;
      // Empty bags may come in thousands: search for the end of the run instead of stepping.
      if (bag < count && token < length && within(end(bag)) <= token) {
        const int64_t next = ended_by(first + token);
        bag = next > bag ? next : bag + 1;
      }
    }
  }
};

// Element strides of a per-token tensor: [bag, token, ...] padded, or [token, ...] with bag = 0.
struct TokenLayout {
  int64_t bag = 0, token = 0, inner = 0;

  __device__ __forceinline__ int64_t row(const Bags& bags, int64_t bag_index, int64_t token_index) const {
    const int64_t origin = bags.offsets == nullptr ? bag_index * bags.tokens_each : 0;
    return bag_index * bag + (token_index - origin) * token;
  }
};

struct Mask {
  const bool* data = nullptr;  // null: every token is kept
  TokenLayout layout;

  __device__ __forceinline__ bool keeps(const Bags& bags, int64_t bag, int64_t token) const {
    return data == nullptr || data[layout.row(bags, bag, token)];
  }
};

}  // namespace fusefeat::cuda
