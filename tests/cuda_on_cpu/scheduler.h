// Fibers for the threads of one CUDA block, with what shows faults that a CPU would hide:
// - shared memory is filled with NaN before every block, and guarded against writes past its end;
// - a warp runs as far as it gets before the next one starts, and so do its threads, in ascending or
//   (when set) descending order, so that a missing barrier gives a wrong result in one of the two;
// - threads of a block that wait for each other at different places are an error, not a hang; threads
//   that have returned are not waited for;
// - warp operations whose lanes disagree on the operation or its mask, or name a lane that has
//   returned, are errors; a shuffle from a lane outside the mask gives NaN;
// - misaligned 16-byte loads and launches outside a GPU's limits are errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace cuda_on_cpu {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

enum class WarpOp : int { kSync, kBallot, kShuffle, kShuffleXor, kShuffleUp, kShuffleDown };

struct Fiber;

class Scheduler {
 public:
  Index block_index, block_size, grid_size;

  Scheduler();
  ~Scheduler();

  void set_reverse(bool reverse) { reverse_ = reverse; }

  // Throws std::runtime_error for a fault of the kernel.
  void run(Index grid, Index block, size_t shared_bytes, const std::function<void()>& kernel);

  // For the running thread.
  const Index& thread_index() const;
  void* static_shared(const void* key, size_t bytes);
  void* dynamic_shared() { return dynamic_.data(); }
  int barrier(int flag, int line);  // how many threads came with a flag that is not 0
  uint64_t warp(WarpOp op, unsigned mask, uint64_t value, int argument, int width);
  void check(bool good, const char* what);

 private:
  struct alignas(16) Unit {
    unsigned char bytes[16];
  };
  using Memory = std::vector<Unit>;

  void run_block(const std::function<void()>& kernel);
  void resume(Fiber& fiber);
  void leave(Fiber& fiber);
  void pause();
  void run_thread();
  bool release_barrier();
  bool run_warp(int first, int count);
  bool release_warp(int first, int count);
  void fail(const std::string& what);
  static void enter();

  std::vector<std::unique_ptr<Fiber>> fibers_;  // kept from block to block
  int threads_ = 0;
  Fiber* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  bool reverse_ = false;
  std::string failure_;
  size_t dynamic_bytes_ = 0;
  Memory dynamic_;
  std::map<const void*, Memory> static_;
  struct MainContext;
  std::unique_ptr<MainContext> main_;
};

Scheduler& scheduler();

}  // namespace cuda_on_cpu
