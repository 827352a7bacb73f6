// Large outputs: how their memory is first touched and written.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusefeat::cpu {

// Asks for huge pages inside a large fresh output before its first write: page faults on small pages cost
// several times what writing the values does.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t worthwhile = 32 << 20;
  constexpr uintptr_t page = 2 << 20;
  if (bytes < worthwhile) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#else
  (void)data, (void)bytes;
#endif
}

// Whether an output is written past the caches: when nothing of it would stay in them anyway, and each of
// its rows starts and ends on a cache line.
inline bool stream_output(const void* data, int64_t row_bytes, int64_t bytes) {
  constexpr int64_t worthwhile = 8 << 20;
  constexpr int64_t line = 64;
  return bytes >= worthwhile && row_bytes % line == 0 && reinterpret_cast<uintptr_t>(data) % line == 0;
}

}  // namespace fusefeat::cpu
