#include "shared_phases.h"

#include <algorithm>

#include "parallel.h"

namespace fusefeat::cpu {
namespace {

constexpr int64_t kMiB = 1 << 20;

int64_t blocks_of(int64_t length, int64_t block) {
  return (length + block - 1) / block;
}

// Rows whose logits are in scratch at one time: what stays in the caches, but enough rows to be worth reading
// the weight for, in at most 48 MiB (or one strip, however long).
int64_t chunk_rows(const SharedProblem& problem, int64_t rows, bool in_scratch) {
  const Logits& logits = problem.logits;
  const int64_t row_bytes = logits.features * problem.acc_bytes(), strip = 128 / problem.acc_bytes();
  int64_t limit = 2 * kMiB / (logits.depth_block * problem.acc_bytes());
  if (in_scratch) {
    limit = std::min(limit, std::max(2 * kMiB / row_bytes, std::min(logits.group, 48 * kMiB / row_bytes)));
  }
  const int64_t step = limit >= logits.group ? logits.group : strip;
  limit = std::max(limit / step * step, step);
  const int64_t chunks = std::max<int64_t>(1, blocks_of(rows, limit));
  return blocks_of(blocks_of(rows, chunks), step) * step;
}

// Runs phases of one call: its threads and their scratch.
class Workers {
 public:
  explicit Workers(const SharedProblem& problem)
      : bytes_(problem.kernels->worker_bytes(problem.logits) / 64 * 64 + 64),
        count_(std::clamp<int64_t>(6 * kMiB / bytes_, 1, torch::stable::get_num_threads())),
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
void for_depth_blocks(const Logits& logits, const F& f) {
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + logits.depth_block, logits.channels);
    f(begin, end);
    begin = end;
  } while (begin < logits.channels);
}

Buffer packed_buffer(const SharedProblem& problem, int64_t rows) {
  const int64_t channels = blocks_of(problem.logits.depth_block, problem.kernels->pack_factor);
  const int64_t strips = blocks_of(rows, problem.kernels->strip);
  return Buffer(strips * problem.kernels->strip * channels * problem.acc_bytes());
}

Chunk chunk_at(const SharedProblem& problem, int64_t begin, int64_t end) {
  return {begin, end - begin, blocks_of(end - begin, problem.kernels->strip)};
}

template <typename Args>
void pack_transposed(const SharedProblem& problem, const Workers& workers, const Args& args, void* to) {
  workers.run(args.chunk.strips, args.chunk.rows * (args.depth_end - args.depth_begin), [&](int64_t strip, void*) {
    problem.kernels->pack_transposed(problem.logits, args.chunk, strip, args.depth_begin, args.depth_end, to);
  });
}

}  // namespace

void run_forward(const SharedProblem& problem, const ForwardWishes& wishes) {
  if (problem.logits.rows == 0) return;
  const SharedKernels& kernels = *problem.kernels;
  const Logits& logits = problem.logits;
  const int64_t size = problem.acc_bytes();
  const bool exponentials = wishes.row_entropy != nullptr;
  const bool in_scratch = exponentials || logits.depth_block < logits.channels;
  const int64_t rows = chunk_rows(problem, logits.rows, in_scratch);
  const Counts most(problem, chunk_at(problem, 0, rows));
  const Workers workers(problem);
  const Buffer packed = packed_buffer(problem, rows);
  const Buffer tile(in_scratch ? most.lanes * logits.features * size : 0);
  const Buffer statistics(exponentials ? 3 * most.blocks * most.lanes * size : 0);
  const Buffer excess(wishes.row_excess != nullptr ? most.blocks * most.lanes * size : 0);
  const Buffer fired(
      wishes.fired != nullptr ? most.groups * logits.features * static_cast<int64_t>(sizeof(int32_t)) : 0);

  SharedForwardArgs args{};
  args.logits = logits;
  args.packed = packed.get();
  args.tile = tile.get();
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
    for_depth_blocks(logits, [&](int64_t depth_begin, int64_t depth_end) {
      args.depth_begin = depth_begin;
      args.depth_end = depth_end;
      pack_transposed(problem, workers, args, packed.get());
      workers.run(
          count.blocks * count.groups, count.work * (depth_end - depth_begin + 16), [&](int64_t item, void* scratch) {
            kernels.forward_task(args, item / count.groups, item % count.groups, scratch);
          });
    });
    if (exponentials || wishes.row_excess != nullptr) {
      workers.run(count.strips, count.lanes * count.blocks * 16, [&](int64_t strip, void*) {
        kernels.combine_strip(args, strip);
      });
    }
    if (wishes.prob_sum != nullptr || wishes.fired != nullptr) {
      constexpr int64_t step = 16;  // divides the block of more than one block
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
}

namespace {

// One gradient that is summed in several arrays first, unless a single one in acc can be the output itself.
class Sums {
 public:
  Sums(const SharedProblem& problem, const Tensor* out, int64_t count)
      : problem_(problem), out_(out), count_(count), buffer_(0) {
    if (out == nullptr) return;
    const auto type = problem.is_double ? ScalarType::Double : ScalarType::Float;
    direct_ = count == 1 && out->scalar_type() == type;
    if (direct_) {
      advise_huge_pages(out->mutable_data_ptr(), out->numel() * out->element_size());
    } else {
      buffer_ = Buffer(count * out->numel() * problem.acc_bytes());
    }
  }

  void* get() const { return out_ == nullptr ? nullptr : direct_ ? out_->mutable_data_ptr() : buffer_.get(); }

  void write(const Workers& workers) const {
    if (out_ == nullptr || direct_) return;
    constexpr int64_t step = 16384;
    const int64_t length = out_->numel(), size = problem_.acc_bytes();
    workers.run(blocks_of(length, step), length * count_, [&](int64_t item, void*) {
      const int64_t begin = item * step;
      char* to = static_cast<char*>(out_->mutable_data_ptr()) + begin * static_cast<int64_t>(out_->element_size());
      problem_.kernels->write_sums(
          buffer_.get() + begin * size, count_, length, std::min(step, length - begin), to,
          scalar_of(out_->scalar_type()));
    });
  }

 private:
  const SharedProblem& problem_;
  const Tensor* out_;
  int64_t count_;
  bool direct_ = false;
  Buffer buffer_;
};

struct Partition {
  int64_t parts, sums;

  Partition(const SharedProblem& problem, const BackwardWishes& wishes, int64_t rows) {
    constexpr int64_t tasks = 16, limit = 4 * kMiB;
    const Logits& logits = problem.logits;
    const Counts count(problem, chunk_at(problem, 0, rows));
    const int64_t weight_bytes = std::max<int64_t>(1, logits.features * logits.channels * problem.acc_bytes());
    const int64_t row_bytes = std::max<int64_t>(1, count.lanes * logits.depth_block * problem.acc_bytes());
    const bool with_weight = wishes.grad_weight != nullptr;
    const bool with_rows = wishes.grad_context != nullptr || wishes.grad_input != nullptr;
    sums = std::min(std::min(count.groups, tasks), with_weight ? std::max<int64_t>(1, limit / weight_bytes) : tasks);
    parts = std::min(std::min(count.blocks, tasks / sums), with_rows ? std::max<int64_t>(1, limit / row_bytes) : tasks);
  }
};

void write_rows(
    const SharedProblem& problem, const Workers& workers, const SharedBackwardArgs& args,
    const BackwardWishes& wishes) {
  const Logits& logits = problem.logits;
  const int64_t channels = args.depth_end - args.depth_begin, strip_rows = problem.kernels->strip;
  workers.run(args.chunk.strips, args.chunk.rows * channels * args.parts, [&](int64_t strip, void*) {
    const int64_t end = std::min((strip + 1) * strip_rows, args.chunk.rows);
    for (int64_t row = strip * strip_rows; row < end; ++row) {
      const int64_t index = logits.used == nullptr ? args.chunk.begin + row : logits.used[args.chunk.begin + row];
      const bool in_context = index < logits.context_rows;
      const Tensor* out = in_context ? wishes.grad_context : wishes.grad_input;
      if (out == nullptr) continue;
      const int64_t at = (in_context ? index : index - logits.context_rows) * logits.channels + args.depth_begin;
      char* to = static_cast<char*>(out->mutable_data_ptr()) + at * static_cast<int64_t>(out->element_size());
      problem.kernels->write_row(args, row, to, scalar_of(out->scalar_type()));
    }
  });
}

}  // namespace

void run_backward(const SharedProblem& problem, const BackwardWishes& wishes) {
  if (problem.logits.rows == 0) return;
  const SharedKernels& kernels = *problem.kernels;
  const Logits& logits = problem.logits;
  const int64_t size = problem.acc_bytes();
  const bool with_rows = wishes.grad_context != nullptr || wishes.grad_input != nullptr;
  const bool with_gradients = with_rows || wishes.grad_weight != nullptr || wishes.grad_bias != nullptr;
  const bool with_dots = wishes.row_dot != nullptr;
  const bool recompute = wishes.kind != Gradient::assignment && wishes.kept_rows < logits.rows;
  const int64_t rows = recompute ? chunk_rows(problem, logits.rows - wishes.kept_rows, true) : 0;
  const int64_t without_tile = recompute ? wishes.kept_rows : logits.rows;  // rows whose logits need no computing
  const int64_t direct_rows = without_tile > 0 ? chunk_rows(problem, without_tile, false) : 0;
  const int64_t most_rows = std::max(rows, direct_rows);
  const Counts most(problem, chunk_at(problem, 0, most_rows));
  const Partition partition(problem, wishes, direct_rows > 0 ? direct_rows : rows);
  const Workers workers(problem);
  const Buffer packed = packed_buffer(problem, recompute ? rows : 0);
  const Buffer packed_rows(
      wishes.grad_weight == nullptr ? 0
                                    : blocks_of(logits.depth_block, kernels.strip) * kernels.strip *
                                          blocks_of(most.lanes, kernels.pack_factor) * size);
  const Buffer tile(recompute ? blocks_of(rows, kernels.strip) * kernels.strip * logits.features * size : 0);
  const Buffer dots(with_dots ? most.blocks * most.lanes * size : 0);
  const Buffer grad_rows(
      with_rows ? partition.parts * blocks_of(logits.depth_block, kernels.strip) * kernels.strip * most.lanes * size
                : 0);
  const Sums weight_sums(problem, wishes.grad_weight, partition.sums);
  const Sums bias_sums(problem, wishes.grad_bias, partition.sums);

  SharedBackwardArgs args{};
  const auto data = [](const Buffer* buffer) { return buffer == nullptr ? nullptr : buffer->get(); };
  args.logits = logits;
  args.kind = wishes.kind;
  args.packed = packed.get();
  args.packed_rows = packed_rows.get();
  args.tile = tile.get();
  args.kept_rows = wishes.kept_rows;
  args.dots = dots.get();
  args.grad_prob_sum = wishes.grad_prob_sum;
  args.row_lse = data(wishes.lse);
  args.row_log_scale = data(wishes.log_scale);
  args.row_offset = data(wishes.offset);
  args.row_prob_scale = data(wishes.prob_scale);
  args.row_excess_grad = data(wishes.excess_grad);
  args.row_dot = data(wishes.row_dot);
  if (wishes.grad != nullptr) args.grad = matrix_of(*wishes.grad);
  if (wishes.assignment != nullptr) args.assignment = matrix_of(*wishes.assignment);
  args.parts = partition.parts;
  args.sums = partition.sums;
  args.grad_rows = grad_rows.get();
  args.grad_weight = weight_sums.get();
  args.grad_bias = bias_sums.get();
  args.skip_context = wishes.grad_context == nullptr;
  args.skip_input = wishes.grad_input == nullptr;

  for (int64_t begin = 0; begin < logits.rows;) {
    const bool has_logits = begin < without_tile;
    const int64_t end = has_logits ? std::min(begin + direct_rows, without_tile) : std::min(begin + rows, logits.rows);
    args.chunk = chunk_at(problem, begin, end);
    args.kept = has_logits ? wishes.kept : nullptr;
    const Counts count(problem, args.chunk);
    if (!has_logits) {
      for_depth_blocks(logits, [&](int64_t depth_begin, int64_t depth_end) {
        args.depth_begin = depth_begin;
        args.depth_end = depth_end;
        pack_transposed(problem, workers, args, packed.get());
        workers.run(
            count.blocks * count.groups, count.work * (depth_end - depth_begin + 16), [&](int64_t item, void* scratch) {
              kernels.logits_task(args, item / count.groups, item % count.groups, scratch);
            });
      });
    } else if (with_dots) {
      workers.run(count.blocks * count.groups, count.work * 16, [&](int64_t item, void* scratch) {
        kernels.dots_task(args, item / count.groups, item % count.groups, scratch);
      });
    }
    if (with_dots) {
      workers.run(
          count.strips, count.lanes * count.blocks, [&](int64_t strip, void*) { kernels.combine_dots(args, strip); });
    }
    if (with_gradients) {
      for_depth_blocks(logits, [&](int64_t depth_begin, int64_t depth_end) {
        args.depth_begin = depth_begin;
        args.depth_end = depth_end;
        const int64_t channels = depth_end - depth_begin;
        if (wishes.grad_weight != nullptr) {
          workers.run(count.strips, count.lanes * channels, [&](int64_t strip, void*) {
            kernels.pack_rows(logits, args.chunk, strip, depth_begin, depth_end, packed_rows.get());
          });
        }
        workers.run(args.parts * args.sums, count.work * (2 * channels + 16), [&](int64_t item, void* scratch) {
          kernels.gradient_task(args, item % args.parts, item / args.parts, scratch);
        });
        if (with_rows) write_rows(problem, workers, args, wishes);
      });
    }
    begin = end;
  }
  weight_sums.write(workers);
  bias_sums.write(workers);
}

}  // namespace fusefeat::cpu
