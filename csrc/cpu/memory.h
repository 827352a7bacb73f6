// Large outputs: how their memory is first touched and written.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "../common/poison.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fusefeat::cpu {

// Asks for huge pages inside a large fresh output before its first write: page faults on small pages cost
// several times what writing the values does.
inline void advise_huge_pages(void* data, int64_t bytes, int64_t worthwhile = 4 << 20) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  if (bytes < worthwhile) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#else
  (void)data, (void)bytes, (void)worthwhile;
#endif
}

// Gives the pages inside a range of private memory back; what they held is lost.
inline void release_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 64 << 10;  // a multiple of every page size in use
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) / page * page;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
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

// Uninitialised memory for the kernels, aligned to cache lines.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes > 0 ? bytes : 0) {
    if (bytes <= 0) return;
    data_.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), alignment)));
    advise_huge_pages(data_.get(), bytes);
    poison(data_.get(), bytes);
  }
  char* get() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(char* data) const { ::operator delete(data, alignment); }
  };
  int64_t bytes_;
  std::unique_ptr<char, Free> data_;
};

}  // namespace fusefeat::cpu
