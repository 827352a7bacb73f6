#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

using fusefeat::Isa;

// The builtin also asks whether the operating system saves the registers.
Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::generic;
#else
  return Isa::generic;
#endif
}

Isa best() {
  static const Isa isa = detect();
  return isa;
}

Isa initial() {
  const char* wish = std::getenv("FUSEFEAT_ISA");
  if (wish == nullptr) return best();
  Isa isa = best();
  if (std::strcmp(wish, "generic") == 0) isa = Isa::generic;
  if (std::strcmp(wish, "avx2") == 0) isa = Isa::avx2;
  return isa < best() ? isa : best();
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

#define FUSEFEAT_EXPORT __attribute__((visibility("default")))

extern "C" {

FUSEFEAT_EXPORT int fusefeat_isa_best() {
  return static_cast<int>(best());
}

FUSEFEAT_EXPORT int fusefeat_isa_current() {
  return static_cast<int>(current().load(std::memory_order_relaxed));
}

FUSEFEAT_EXPORT int fusefeat_isa_set(int isa) {
  if (isa < 0 || isa > static_cast<int>(best())) return 0;
  current().store(static_cast<Isa>(isa), std::memory_order_relaxed);
  return 1;
}

}  // extern "C"
