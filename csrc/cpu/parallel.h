// Work items on torch's threads: whoever is free takes the next one. Items are cut by the shape of the
// problem alone, so which thread computes what, and how many there are, changes no result.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fusefeat::cpu {

// The thread sanitizer's build sets it low: small problems then run on several threads.
#ifndef FUSEFEAT_BYTES_PER_WORKER
#define FUSEFEAT_BYTES_PER_WORKER (64 << 10)
#endif

// How many threads are worth waking for `items` items that touch `bytes` bytes.
inline int64_t worker_count(int64_t items, int64_t bytes) {
  constexpr int64_t bytes_per_worker = FUSEFEAT_BYTES_PER_WORKER;
  const int64_t useful = std::min(items, bytes / bytes_per_worker);
  if (useful <= 1) return 1;
  return std::min<int64_t>(useful, torch::stable::get_num_threads());
}

// Calls f(item, worker) for every item in [0, items), worker in [0, workers). f must not throw: the text of
// an exception is lost on its way out of a parallel region.
template <typename F>
void for_each_item(int64_t items, int64_t workers, const F& f) {
  if (workers <= 1) {
    for (int64_t item = 0; item < items; ++item) f(item, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t item = next++; item < items; item = next++) f(item, worker);
  });
}

}  // namespace fusefeat::cpu
