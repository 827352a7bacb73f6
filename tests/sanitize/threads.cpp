// Stands in for torch's threads under the thread sanitizer. OpenMP is not compiled with it, so what orders its threads
// would go unseen; std::thread in instrumented code is understood. Preloaded, hence found before torch's own.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t torch_get_num_threads(uint32_t* out) {
  *out = kThreads;
  return 0;
}

EXPORT int32_t
torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t step = std::max({grain, (end - begin + kThreads - 1) / kThreads, int64_t{1}});
  std::vector<std::thread> threads;
  for (int64_t first = begin + step; first < end; first += step) {
    threads.emplace_back(body, first, std::min(first + step, end), context);
  }
  if (begin < end) body(begin, std::min(begin + step, end), context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
