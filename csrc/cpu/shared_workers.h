// What the forward and the backward of the shared-logits operators share: how rows are cut, and who works on them.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "shared_phases.h"

namespace fusefeat::cpu {

inline constexpr int64_t kMiB = 1 << 20;

inline int64_t blocks_of(int64_t length, int64_t block) {
  return (length + block - 1) / block;
}

// Rows whose logits are in scratch at one time, `size` bytes each (0: none are): what stays in the caches, but
// `enough` rows to be worth reading the weight for, in at most 48 MiB less what is `held` beside it (or one strip,
// however long). Rows of few channels are many: their sums, of which each block of features has its own, and the counts
// of their groups take 16 MiB at most.
inline int64_t chunk_rows(const SharedProblem& problem, int64_t rows, int64_t size, int64_t enough, int64_t held = 0) {
  const Logits& logits = problem.logits;
  const int64_t strip = 128 / problem.acc_bytes();
  const int64_t sums_bytes =
      3 * blocks_of(logits.features, logits.block) * problem.acc_bytes() + blocks_of(logits.features * 4, logits.group);
  int64_t limit = std::min(2 * kMiB / (logits.grad_depth * problem.acc_bytes()), 16 * kMiB / sums_bytes);
  if (size > 0) {
    const int64_t row_bytes = logits.features * size;
    limit = std::min(limit, std::max(2 * kMiB / row_bytes, std::min(enough, (48 * kMiB - held) / row_bytes)));
  }
  const int64_t step = limit >= logits.group ? logits.group : strip;
  limit = std::max(limit / step * step, step);
  const int64_t chunks = std::max<int64_t>(1, blocks_of(rows, limit));
  return blocks_of(blocks_of(rows, chunks), step) * step;
}

// Runs phases of one call: its threads and their scratch, which takes kMost bytes at most, or one thread's.
class Workers {
 public:
  static constexpr int64_t kMost = 6 * kMiB, kMostOfSweep = 8 * kMiB;

  explicit Workers(const SharedProblem& problem, int64_t sweep_rows = 0)
      : bytes_(problem.kernels->worker_bytes(problem.logits, sweep_rows) / 64 * 64 + 64),
        count_(
            std::clamp<int64_t>((sweep_rows > 0 ? kMostOfSweep : kMost) / bytes_, 1, torch::stable::get_num_threads())),
        scratch_(bytes_ * count_) {}

  // `work` in multiply-adds of all items together.
  template <typename F>
  void run(int64_t items, int64_t work, const F& f) const {
    const int64_t workers = std::min(count_, worker_count(items, work / 4));
    for_each_item(items, workers, [&](int64_t item, int64_t worker) { f(item, scratch_.get() + worker * bytes_); });
  }

 private:
  int64_t bytes_, count_;
  Buffer scratch_;
};

struct Counts {
  int64_t strips, groups, blocks, lanes, work;

  Counts(const SharedProblem& problem, const Chunk& chunk)
      : strips(chunk.strips),
        groups(blocks_of(chunk.strips * problem.kernels->strip, problem.logits.group)),
        blocks(blocks_of(problem.logits.features, problem.logits.block)),
        lanes(chunk.strips * problem.kernels->strip),
        work(chunk.rows * problem.logits.features) {}
};

// Calls f(begin, end) for blocks of channels, once without any when there are none.
template <typename F>
void for_depth_blocks(int64_t channels, int64_t block, const F& f) {
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + block, channels);
    f(begin, end);
    begin = end;
  } while (begin < channels);
}

inline Buffer packed_buffer(const SharedProblem& problem, int64_t rows) {
  const int64_t channels = blocks_of(problem.logits.depth_block, problem.kernels->pack_factor);
  const int64_t strips = blocks_of(rows, problem.kernels->strip);
  return Buffer(strips * problem.kernels->strip * channels * problem.acc_bytes());
}

inline Chunk chunk_at(const SharedProblem& problem, int64_t begin, int64_t end) {
  return {begin, end - begin, blocks_of(end - begin, problem.kernels->strip)};
}

template <typename Args>
void pack_transposed(const SharedProblem& problem, const Workers& workers, const Args& args, void* to) {
  workers.run(args.chunk.strips, args.chunk.rows * (args.depth_end - args.depth_begin), [&](int64_t strip, void*) {
    problem.kernels->pack_transposed(problem.logits, args.chunk, strip, args.depth_begin, args.depth_end, to);
  });
}

}  // namespace fusefeat::cpu
