// Which kernels are launched, with how many threads per block and bytes of dynamic shared memory: what a GPU's
// occupancy depends on (benchmarks/cuda_launches.py).
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <tuple>

namespace cuda_on_cpu {

// While it records, launches are counted and nothing runs.
class Launches {
 public:
  void set_recording(bool recording);
  // Whether the launch was counted instead of run.
  bool take(const void* kernel, unsigned threads, size_t shared_bytes);
  // Lines of symbol, threads per block, bytes, how often.
  std::string text() const;

 private:
  bool recording_ = false;
  std::map<std::tuple<const void*, unsigned, size_t>, int> counts_;
};

Launches& launches();

}  // namespace cuda_on_cpu
