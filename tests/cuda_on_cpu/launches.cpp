#include "launches.h"

#include <dlfcn.h>

namespace cuda_on_cpu {

Launches& launches() {
  static Launches instance;
  return instance;
}

void Launches::set_recording(bool recording) {
  recording_ = recording;
  if (recording) counts_.clear();
}

bool Launches::take(const void* kernel, unsigned threads, size_t shared_bytes) {
  if (recording_) ++counts_[{kernel, threads, shared_bytes}];
  return recording_;
}

std::string Launches::text() const {
  std::string lines;
  for (const auto& [launch, count] : counts_) {
    const auto& [kernel, threads, bytes] = launch;
    Dl_info found{};
    const bool named = dladdr(kernel, &found) != 0 && found.dli_sname != nullptr && found.dli_saddr == kernel;
    lines += std::string(named ? found.dli_sname : "?") + " " + std::to_string(threads) + " " + std::to_string(bytes) +
             " " + std::to_string(count) + "\n";
  }
  return lines;
}

}  // namespace cuda_on_cpu

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_set_recording(int recording) {
  cuda_on_cpu::launches().set_recording(recording != 0);
}

extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_launches() {
  static std::string text;
  text = cuda_on_cpu::launches().text();
  return text.c_str();
}
