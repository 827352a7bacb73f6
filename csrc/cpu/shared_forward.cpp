#include <algorithm>

#include "shared_statistics.h"
#include "shared_workers.h"

namespace fusefeat::cpu {

bool run_forward(const SharedProblem& problem, const ForwardWishes& wishes) {
  if (problem.logits.rows == 0) return true;
  const SharedKernels& kernels = *problem.kernels;
  const Logits& logits = problem.logits;
  const int64_t size = problem.acc_bytes();
  const bool exponentials = wishes.row_entropy != nullptr;
  const bool whole = logits.block >= logits.features && logits.depth_block >= logits.channels && !wishes.softmax;
  const bool in_scratch = !whole && (exponentials || logits.depth_block < logits.channels);
  // Rounded logits are all that a chunk leaves in scratch, or where they are kept, unless sums of products are there.
  const bool rounded = wishes.kept_type == Scalar::f16;
  const bool half = rounded && in_scratch && logits.depth_block >= logits.channels;
  const int64_t tile_size = !in_scratch ? 0 : half ? 2 : size;
  const int64_t rows =
      chunk_rows(problem, logits.rows, tile_size, half ? logits.group / 4 : logits.group, wishes.kept_bytes);
  const Counts most(problem, chunk_at(problem, 0, rows));
  const Workers workers(problem);
  const Buffer packed = packed_buffer(problem, rows);
  const Buffer tile(half && wishes.kept_rows == logits.rows ? 0 : most.lanes * logits.features * tile_size);
  const Buffer statistics(exponentials ? 3 * most.blocks * most.lanes * size : 0);
  const Buffer excess(wishes.row_excess != nullptr ? most.blocks * most.lanes * size : 0);
  const Buffer fired(
      wishes.fired != nullptr ? most.groups * logits.features * static_cast<int64_t>(sizeof(int32_t)) : 0);

  const Buffer prob_sums(whole && exponentials ? most.groups * logits.features * size : 0);

  SharedForwardArgs args{};
  args.logits = logits;
  args.whole = whole;
  args.prob_sums = prob_sums.get();
  args.packed = packed.get();
  args.tile = tile.get();
  args.tile_type = half ? Scalar::f16 : problem.is_double ? Scalar::f64 : Scalar::f32;
  if (exponentials) {
    const int64_t step = most.blocks * most.lanes * size;
    args.peak = statistics.get();
    args.sum = statistics.get() + step;
    args.dot = statistics.get() + 2 * step;
    args.row_weight = wishes.row_weight->get();
    args.row_entropy = wishes.row_entropy->get();
    args.row_lse = wishes.lse->get();
  }
  args.excess = excess.get();
  args.fired = reinterpret_cast<int32_t*>(fired.get());
  args.kept = wishes.kept;
  args.kept_type = wishes.kept_type;
  args.kept_rows = wishes.kept_rows;
  args.row_excess = wishes.row_excess == nullptr ? nullptr : wishes.row_excess->get();
  args.prob_sum = wishes.prob_sum;
  args.fired_sum = wishes.fired;
  if (wishes.matrix != nullptr) {
    args.matrix = wishes.matrix->mutable_data_ptr();
    args.matrix_type = scalar_of(wishes.matrix->scalar_type());
  }

  for (int64_t begin = 0; begin < logits.rows; begin += rows) {
    args.chunk = chunk_at(problem, begin, std::min(begin + rows, logits.rows));
    const Counts count(problem, args.chunk);
    for_depth_blocks(logits.channels, logits.depth_block, [&](int64_t depth_begin, int64_t depth_end) {
      args.depth_begin = depth_begin;
      args.depth_end = depth_end;
      if (!whole) pack_transposed(problem, workers, args, packed.get());
      workers.run(
          count.blocks * count.groups, count.work * (depth_end - depth_begin + 16), [&](int64_t item, void* scratch) {
            kernels.forward_task(args, item / count.groups, item % count.groups, scratch);
          });
    });
    if (!whole && (exponentials || wishes.row_excess != nullptr)) {
      workers.run(count.strips, count.lanes * count.blocks * 16, [&](int64_t strip, void*) {
        kernels.combine_strip(args, strip);
      });
    }
    if (rounded && !stand_rounding(*wishes.lse, begin, args.chunk.rows)) return false;
    if (wishes.prob_sum != nullptr || wishes.fired != nullptr) {
      constexpr int64_t step = 64;  // divides the block of more than one block
      workers.run(blocks_of(logits.features, step), count.work, [&](int64_t item, void*) {
        kernels.column_sums(args, item * step, std::min((item + 1) * step, logits.features));
      });
    }
    if (wishes.softmax) {
      workers.run(count.blocks * count.groups, count.work * 4, [&](int64_t item, void* scratch) {
        kernels.write_assignment(args, item / count.groups, item % count.groups, scratch);
      });
    }
  }
  return true;
}

}  // namespace fusefeat::cpu
