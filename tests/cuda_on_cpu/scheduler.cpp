#include "scheduler.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Frames of functions that leave their stack by a jump must have nothing poisoned around them.
#define SWITCHES_STACKS __attribute__((noinline, no_sanitize_address))

namespace cuda_on_cpu {

namespace {
constexpr int kWarp = 32;
constexpr size_t kGuardUnits = 64;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating type
constexpr unsigned char kGuard = 0xa5;

// The address sanitizer is told before and after every change of stacks.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;  // frames are larger with poison around their arrays
void before_switch(const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(nullptr, stack, bytes);
}
void after_switch(const void** left = nullptr, size_t* bytes = nullptr) {
  __sanitizer_finish_switch_fiber(nullptr, left, bytes);
}
#else
constexpr size_t kStackBytes = 64 * 1024;
void before_switch(const void*, size_t) {}
void after_switch(const void** = nullptr, size_t* = nullptr) {}
#endif

struct Unwind {};  // leaves the kernel of a thread that is not to go on

// Of __builtin_setjmp, which the address sanitizer leaves alone: longjmp would make it forget the poison of all frames.
using Jump = void* [5];

// A call, or the compiler takes it that nobody comes back to where __builtin_setjmp is.
[[noreturn]] SWITCHES_STACKS void jump_to(Jump& jump) {
  __builtin_longjmp(jump, 1);
}
}  // namespace

struct Fiber {
  enum class State { kReady, kBarrier, kWarp, kDone };
  State state = State::kDone;
  Index index;
  ucontext_t context;
  Jump jump;
  bool started = false;
  bool cancelled = false;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  // What it waits for, and what it gets.
  int flag = 0, line = 0, count = 0;
  WarpOp op = WarpOp::kSync;
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int argument = 0, width = kWarp;
};

struct Scheduler::MainContext {
  Jump jump;
  const void* stack = nullptr;  // for the address sanitizer
  size_t stack_bytes = 0;
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

Scheduler::Scheduler() : main_(new MainContext) {}
Scheduler::~Scheduler() = default;

const Index& Scheduler::thread_index() const {
  return running_->index;
}

void Scheduler::fail(const std::string& what) {
  if (failure_.empty()) failure_ = what;
}

void Scheduler::check(bool good, const char* what) {
  if (good) return;
  fail(what);
  throw Unwind();
}

// ucontext makes a stack to run on; later switches are jumps, which make no system call.
SWITCHES_STACKS void Scheduler::enter() {
  Scheduler& self = scheduler();
  after_switch(&self.main_->stack, &self.main_->stack_bytes);
  self.run_thread();
  self.running_->state = Fiber::State::kDone;
  before_switch(self.main_->stack, self.main_->stack_bytes);
  jump_to(self.main_->jump);
}

void Scheduler::run_thread() {
  try {
    (*kernel_)();
  } catch (const Unwind&) {
  }
}

SWITCHES_STACKS void Scheduler::resume(Fiber& fiber) {
  running_ = &fiber;
  if (__builtin_setjmp(main_->jump) == 0) {
    before_switch(fiber.stack.get(), kStackBytes);
    if (fiber.started) jump_to(fiber.jump);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Scheduler::enter, 0);
    setcontext(&fiber.context);
  }
  after_switch();
  running_ = nullptr;
}

SWITCHES_STACKS void Scheduler::leave(Fiber& fiber) {
  if (__builtin_setjmp(fiber.jump) == 0) {
    before_switch(main_->stack, main_->stack_bytes);
    jump_to(main_->jump);
  }
  after_switch();
}

void Scheduler::pause() {
  Fiber* fiber = running_;
  leave(*fiber);
  if (fiber->cancelled) throw Unwind();
}

int Scheduler::barrier(int flag, int line) {
  running_->line = line;
  running_->flag = flag != 0;
  running_->state = Fiber::State::kBarrier;
  Fiber* fiber = running_;
  pause();
  return fiber->count;
}

uint64_t Scheduler::warp(WarpOp op, unsigned mask, uint64_t value, int argument, int width) {
  Fiber* fiber = running_;
  fiber->op = op;
  fiber->mask = mask;
  fiber->value = value;
  fiber->argument = argument;
  fiber->width = width;
  fiber->state = Fiber::State::kWarp;
  pause();
  return fiber->result;
}

void* Scheduler::static_shared(const void* key, size_t bytes) {
  const auto [found, fresh] = static_.try_emplace(key);
  if (fresh) {
    found->second.resize((bytes + 15) / 16);
    std::memset(found->second.data(), kPoison, found->second.size() * 16);
  }
  return found->second.data();
}

// Threads that have returned no longer take part.
bool Scheduler::release_barrier() {
  int waiting = 0, count = 0, line = 0;
  for (int i = 0; i < threads_; ++i) {
    const Fiber& fiber = *fibers_[i];
    if (fiber.state == Fiber::State::kDone) continue;
    if (fiber.state != Fiber::State::kBarrier) return false;
    if (waiting++ > 0 && fiber.line != line) {
      fail("threads of a block are at different barriers");
      return false;
    }
    line = fiber.line;
    count += fiber.flag;
  }
  if (waiting == 0) return false;
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = *fibers_[i];
    if (fiber.state == Fiber::State::kDone) continue;
    fiber.count = count;
    fiber.state = Fiber::State::kReady;
  }
  return true;
}

// Every thread that can go on does, up to where it waits.
bool Scheduler::run_warp(int first, int count) {
  bool progress = false;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *fibers_[first + (reverse_ ? count - 1 - i : i)];
    if (fiber.state != Fiber::State::kReady || !failure_.empty()) continue;
    resume(fiber);
    progress = true;
  }
  return progress;
}

bool Scheduler::release_warp(int first, int count) {
  bool released = false;
  for (int lane = 0; lane < count; ++lane) {
    const Fiber& leader = *fibers_[first + lane];
    if (leader.state != Fiber::State::kWarp) continue;
    const unsigned mask = count == kWarp ? leader.mask : leader.mask & ((1u << count) - 1);
    bool complete = (mask >> lane & 1) != 0;
    if (!complete) fail("a lane is not in the mask of its own warp operation");
    for (int other = 0; other < count && complete; ++other) {
      if ((mask >> other & 1) == 0) continue;
      const Fiber& fiber = *fibers_[first + other];
      if (fiber.state == Fiber::State::kDone) fail("a warp operation waits for a lane that has returned");
      complete = fiber.state == Fiber::State::kWarp;
      if (complete && (fiber.mask != leader.mask || fiber.op != leader.op)) {
        fail("lanes of a warp are at different warp operations");
      }
    }
    if (!failure_.empty()) return false;
    if (!complete) continue;

    uint64_t ballot = 0;
    for (int other = 0; other < count; ++other) {
      if (mask >> other & 1) ballot |= fibers_[first + other]->value << other;
    }
    for (int other = 0; other < count; ++other) {
      if ((mask >> other & 1) == 0) continue;
      Fiber& fiber = *fibers_[first + other];
      const int section = other / fiber.width * fiber.width;
      int source = other;
      switch (fiber.op) {
        case WarpOp::kSync:
        case WarpOp::kBallot:
          break;
        case WarpOp::kShuffle:
          source = section + (fiber.argument & (fiber.width - 1));
          break;
        case WarpOp::kShuffleXor:
          source = other ^ fiber.argument;
          if (source >= section + fiber.width) source = other;
          break;
        case WarpOp::kShuffleUp:
          source = other - fiber.argument < section ? other : other - fiber.argument;
          break;
        case WarpOp::kShuffleDown:
          source = other + fiber.argument >= section + fiber.width ? other : other + fiber.argument;
          break;
      }
      if (fiber.op == WarpOp::kBallot) {
        fiber.result = ballot;
      } else if (source < count && (mask >> source & 1)) {
        fiber.result = fibers_[first + source]->value;
      } else {
        std::memset(&fiber.result, kPoison, sizeof(fiber.result));  // undefined in CUDA
      }
    }
    for (int other = 0; other < count; ++other) {
      if (mask >> other & 1) fibers_[first + other]->state = Fiber::State::kReady;
    }
    released = true;
  }
  return released;
}

void Scheduler::run_block(const std::function<void()>& kernel) {
  kernel_ = &kernel;
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = *fibers_[i];
    fiber.state = Fiber::State::kReady;
    fiber.started = fiber.cancelled = false;
    const unsigned x = i % block_size.x, rest = i / block_size.x;
    fiber.index = {x, rest % block_size.y, rest / block_size.y};
  }
  while (failure_.empty()) {
    bool progress = false;
    const int warps = (threads_ + kWarp - 1) / kWarp;
    for (int w = 0; w < warps; ++w) {
      const int first = (reverse_ ? warps - 1 - w : w) * kWarp;
      const int count = std::min(kWarp, threads_ - first);
      while (run_warp(first, count) || release_warp(first, count)) progress = true;
    }
    progress |= release_barrier();
    if (progress) continue;
    const bool done = std::all_of(fibers_.begin(), fibers_.begin() + threads_, [](const auto& fiber) {
      return fiber->state == Fiber::State::kDone;
    });
    if (done) break;
    fail("deadlock: threads of a block wait at a barrier or warp operation that others do not reach");
  }
  // After a fault, threads under way are unwound, so that their stacks can be used again.
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = *fibers_[i];
    if (fiber.state == Fiber::State::kDone || !fiber.started) continue;
    fiber.cancelled = true;
    resume(fiber);
  }
}

void Scheduler::run(Index grid, Index block, size_t shared_bytes, const std::function<void()>& kernel) {
  grid_size = grid;
  block_size = block;
  threads_ = static_cast<int>(block.x * block.y * block.z);
  failure_.clear();
  if (threads_ < 1 || threads_ > 1024) fail("a block must have 1 to 1024 threads");
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    fail("the grid's size is out of range");
  }
  if (shared_bytes > 48 * 1024) fail("a launch asks for more than 48 KiB of dynamic shared memory");
  if (!failure_.empty()) throw std::runtime_error("CUDA on CPU: " + failure_);
  while (static_cast<int>(fibers_.size()) < threads_) fibers_.emplace_back(new Fiber);
  dynamic_bytes_ = shared_bytes;
  const size_t units = (shared_bytes + 15) / 16;
  dynamic_.resize(units + kGuardUnits);
  auto* bytes = reinterpret_cast<unsigned char*>(dynamic_.data());
  const size_t all_bytes = dynamic_.size() * 16;

  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        static_.clear();
        std::memset(bytes, kPoison, dynamic_bytes_);
        std::memset(bytes + dynamic_bytes_, kGuard, all_bytes - dynamic_bytes_);
        run_block(kernel);
        const bool guarded =
            std::all_of(bytes + dynamic_bytes_, bytes + all_bytes, [](unsigned char byte) { return byte == kGuard; });
        if (!guarded) fail("a write past the end of dynamic shared memory");
        if (!failure_.empty()) throw std::runtime_error("CUDA on CPU: " + failure_);
      }
    }
  }
}

}  // namespace cuda_on_cpu

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_set_reverse(int reverse) {
  cuda_on_cpu::scheduler().set_reverse(reverse != 0);
}
