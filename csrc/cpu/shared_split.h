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

// How far a sweep goes: `rows` (0: there is none), the first of which were kept; then `loan` whose logits lie where the
// weight's gradient will, `in_tile` whose are in scratch, and those whose are computed once more.
struct Sweep {
  int64_t rows = 0, loan = 0, in_tile = 0;

  int64_t recomputed(int64_t direct) const { return rows - direct - loan - in_tile; }
};

// Which rows share a chunk. Those whose logits need no computing come first.
struct Split {
  int64_t direct;  // how many these are
  Scalar tile_type;
  int64_t tile_bytes;
  int64_t direct_rows, rows;  // per chunk of these and of the others; 0 without any
  // A weight too large for the caches has its gradient written once, in one sweep over many rows.
  Sweep sweep;
  bool at_once = false;  // all rows are in the sweep, without sums of the weight's gradient in acc

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
                ? chunk_rows(problem, problem.logits.rows - direct, tile_bytes, problem.logits.group, wishes.kept_bytes)
                : 0) {
    const Logits& logits = problem.logits;
    const int64_t acc = problem.acc_bytes();
    if (wishes.kind != Gradient::penalty || wishes.row_dot == nullptr || wishes.grad_weight == nullptr ||
        logits.features * logits.channels * acc < 16 * kMiB || logits.channels > logits.depth_block) {
      return;
    }
    const int64_t size = static_cast<int64_t>(wishes.grad_weight->element_size());
    const Sweep whole = reach(problem, wishes.kept_bytes, size, true);
    sweep = reach(problem, wishes.kept_bytes, acc, false);
    if (whole.rows < logits.rows) return;
    // Every chunk behind a sweep has weight and sums of its gradient from memory and back, for whose time so many rows
    // are multiplied; sums that are not the gradient itself are further pages to be had. Both measured.
    const bool pairs = problem.kernels->pack_factor == 2;
    const int64_t per_chunk = pairs ? 120 : 64, new_sums = pairs ? 380 : 160;
    const int64_t chunks = rows == 0 ? 0 : blocks_of(logits.rows - sweep.rows, rows);
    at_once = sweep.rows == 0 || whole.recomputed(direct) <= chunks * per_chunk + (size < acc ? new_sums : 0);
    if (at_once) sweep = whole;
  }

  // The first chunk sets the sums of the weight's gradient, hence the partition is made for its rows.
  int64_t first_rows() const { return sweep.rows == 0 && direct > 0 ? direct_rows : std::max<int64_t>(rows, 1); }
  int64_t most_rows() const { return std::max(first_rows(), rows); }

 private:
  Sweep reach(const SharedProblem& problem, int64_t held, int64_t weight_size, bool recompute) const {
    // What a row holds: packed for both products, some parts of its gradient's sums, and the sums per block. And what
    // its logits do, in scratch that the C library has without new pages.
    constexpr int64_t most = 1024, least_parts = 4, tile = 31 * kMiB;
    const Logits& logits = problem.logits;
    const int64_t strip = problem.kernels->strip, acc = problem.acc_bytes();
    const int64_t row_bytes =
        ((2 + least_parts) * logits.channels + 3 * blocks_of(logits.features, logits.block)) * acc;
    const int64_t logits_bytes = logits.features * tile_bytes;
    const int64_t room = kSweepBytes - held + logits.features * logits.channels * (acc - weight_size);
    const auto whole_strips = [&](int64_t n) { return n / strip * strip; };
    Sweep result;
    int64_t reached = std::min({most, logits.rows, room / row_bytes});
    if (reached < logits.rows) reached = whole_strips(reached);
    if (room < 0 || reached < direct) return result;
    result.loan = std::min(whole_strips(logits.channels * weight_size / tile_bytes), reached - direct);
    const int64_t left = reached - direct - result.loan;
    const int64_t alone = recompute ? room - reached * row_bytes : room - (direct + result.loan) * row_bytes;
    const int64_t each = recompute ? logits_bytes : logits_bytes + row_bytes;
    result.in_tile = std::clamp<int64_t>(whole_strips(std::min(alone / each, tile / logits_bytes)), 0, left);
    result.rows = recompute ? reached : direct + result.loan + result.in_tile;
    return result;
  }
};

}  // namespace fusefeat::cpu
