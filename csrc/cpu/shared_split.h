// How a backward of the shared-logits operators is cut: by the shapes and by what is wanted, never by the threads.
#pragma once

#include <algorithm>

#include "shared_workers.h"

namespace fusefeat::cpu {

// Of the 64 MiB that a call may have in scratch, what a sweep may hold beside the workers' own.
inline constexpr int64_t kSweepBytes = 62 * kMiB - Workers::kMostOfSweep;

// Ranges of feature blocks (`parts`) times ranges of groups of rows (`sums`) that are worked on at a time.
struct Partition {
  int64_t parts, sums;

  Partition(const SharedProblem& problem, const BackwardWishes& wishes, int64_t rows) {
    constexpr int64_t tasks = 16, limit = 4 * kMiB;
    const Logits& logits = problem.logits;
    const Counts count(problem, chunk_at(problem, 0, rows));
    const int64_t weight_bytes = std::max<int64_t>(1, logits.features * logits.channels * problem.acc_bytes());
    const int64_t row_bytes = std::max<int64_t>(1, count.lanes * logits.grad_depth * problem.acc_bytes());
    const bool with_weight = wishes.grad_weight != nullptr;
    const bool with_rows = wishes.grad_context != nullptr || wishes.grad_input != nullptr;
    sums = std::min(std::min(count.groups, tasks), with_weight ? std::max<int64_t>(1, limit / weight_bytes) : tasks);
    parts = std::min(std::min(count.blocks, tasks / sums), with_rows ? std::max<int64_t>(1, limit / row_bytes) : tasks);
  }
};

// Which rows share a chunk. Those whose logits need no computing come first.
struct Split {
  int64_t direct;  // how many these are
  Scalar tile_type;
  int64_t tile_bytes;
  int64_t direct_rows, rows;  // per chunk of these and of the others; 0 without any
  // A weight too large for the caches has its gradient written once, in one sweep, for as many rows as there is memory
  // for, that of the gradient included: `sweep` rows (0: no sweep), the logits of `loan` of them in that memory.
  int64_t sweep = 0, loan = 0;
  bool at_once = false;  // all rows are in the sweep without sums of the weight's gradient in acc

  Split(const SharedProblem& problem, const BackwardWishes& wishes)
      : direct(wishes.kind == Gradient::assignment ? problem.logits.rows : wishes.kept_rows),
        tile_type(
            problem.logits.depth_block >= problem.logits.channels ? wishes.kept_type
            : problem.is_double                                   ? Scalar::f64
                                                                  : Scalar::f32),
        tile_bytes(tile_type == Scalar::f16 ? 2 : problem.acc_bytes()),
        direct_rows(direct > 0 ? chunk_rows(problem, direct, 0, problem.logits.group) : 0),
        rows(
            direct < problem.logits.rows
                ? chunk_rows(
                      problem, problem.logits.rows - direct, tile_bytes,
                      wishes.unused_bytes > 0 ? problem.logits.group / 2 : problem.logits.group)
                : 0) {
    const Logits& logits = problem.logits;
    const int64_t weight_bytes = logits.features * logits.channels * problem.acc_bytes();
    if (wishes.kind != Gradient::penalty || wishes.row_dot == nullptr || wishes.grad_weight == nullptr ||
        weight_bytes < 16 * kMiB || logits.channels > logits.depth_block) {
      return;
    }
    // What `rows` rows hold: packed for both products, some parts of their gradients' sums, and the sums per block.
    constexpr int64_t most = 1024, least_parts = 4;
    const int64_t strip = problem.kernels->strip, acc = problem.acc_bytes();
    const int64_t row_bytes =
        ((2 + least_parts) * logits.channels + 3 * blocks_of(logits.features, logits.block)) * acc;
    const int64_t tile_row_bytes = logits.features * tile_bytes;
    const auto reach = [&](int64_t loan_row_bytes, int64_t further) {
      const int64_t room = kSweepBytes - wishes.unused_bytes + further - direct * (tile_row_bytes + row_bytes);
      if (room < 0 || direct > most) return int64_t{0};
      loan = std::min(loan_row_bytes / tile_bytes, room / row_bytes) / strip * strip;
      const int64_t in_tile = (room - loan * row_bytes) / (tile_row_bytes + row_bytes) / strip * strip;
      return std::min({direct + loan + in_tile, most, logits.rows});
    };
    const int64_t size = static_cast<int64_t>(wishes.grad_weight->element_size());
    sweep = reach(logits.channels * size, logits.features * logits.channels * (acc - size));
    at_once = sweep == logits.rows;
    // With chunks to follow the gradient is summed in acc, which has more room.
    if (!at_once) sweep = reach(logits.channels * acc, 0);
    if (sweep < logits.rows) sweep = sweep / strip * strip;
    loan = std::min(loan, sweep - direct);
  }

  // The first chunk sets the sums of the weight's gradient, hence the partition is made for its rows.
  int64_t first_rows() const { return sweep == 0 && direct > 0 ? direct_rows : std::max<int64_t>(rows, 1); }
  int64_t most_rows() const { return std::max(first_rows(), rows); }
};

}  // namespace fusefeat::cpu
