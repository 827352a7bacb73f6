#include <algorithm>

#include "shared_workers.h"

namespace fusefeat::cpu {
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

  // Large sums are given back while the output is written: both at once would be half as much again.
  void write(const Workers& workers) const {
    if (out_ == nullptr || direct_) return;
    const int64_t length = out_->numel(), size = problem_.acc_bytes();
    const bool release = count_ == 1 && length * size >= 32 * kMiB;
    const int64_t step = release ? 2 * kMiB / size : 16384;
    workers.run(blocks_of(length, step), length * count_, [&](int64_t item, void*) {
      const int64_t begin = item * step;
      char* to = static_cast<char*>(out_->mutable_data_ptr()) + begin * static_cast<int64_t>(out_->element_size());
      problem_.kernels->write_sums(
          buffer_.get() + begin * size, count_, length, std::min(step, length - begin), to,
          scalar_of(out_->scalar_type()));
      if (release) release_pages(buffer_.get() + begin * size, std::min(step, length - begin) * size);
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
    const int64_t row_bytes = std::max<int64_t>(1, count.lanes * logits.grad_depth * problem.acc_bytes());
    const bool with_weight = wishes.grad_weight != nullptr;
    const bool with_rows = wishes.grad_context != nullptr || wishes.grad_input != nullptr;
    sums = std::min(std::min(count.groups, tasks), with_weight ? std::max<int64_t>(1, limit / weight_bytes) : tasks);
    parts = std::min(std::min(count.blocks, tasks / sums), with_rows ? std::max<int64_t>(1, limit / row_bytes) : tasks);
  }
};

// The rows whose logits need no computing come first.
struct Split {
  int64_t direct;  // how many these are
  Scalar tile_type;
  int64_t tile_bytes;
  int64_t direct_rows, rows;  // per chunk of these and of the others; 0 without any
  Partition partition;

  Split(const SharedProblem& problem, const BackwardWishes& wishes)
      : direct(wishes.kind == Gradient::assignment ? problem.logits.rows : wishes.kept_rows),
        tile_type(
            problem.logits.depth_block >= problem.logits.channels ? wishes.kept_type
            : problem.is_double                                   ? Scalar::f64
                                                                  : Scalar::f32),
        tile_bytes(tile_type == Scalar::bf16 ? 2 : problem.acc_bytes()),
        direct_rows(direct > 0 ? chunk_rows(problem, direct, 0, problem.logits.group) : 0),
        rows(
            direct < problem.logits.rows ? chunk_rows(
                                               problem, problem.logits.rows - direct, tile_bytes,
                                               wishes.half_chunks ? problem.logits.group / 2 : problem.logits.group)
                                         : 0),
        partition(problem, wishes, direct > 0 ? direct_rows : rows) {}
};

// All chunks; the gradients of weight and bias are left in their sums.
void run_chunks(
    const SharedProblem& problem, const BackwardWishes& wishes, const Split& split, const Workers& workers,
    const Sums& weight_sums, const Sums& bias_sums) {
  const SharedKernels& kernels = *problem.kernels;
  const Logits& logits = problem.logits;
  const int64_t size = problem.acc_bytes();
  const bool with_rows = wishes.grad_context != nullptr || wishes.grad_input != nullptr;
  const bool with_gradients = with_rows || wishes.grad_weight != nullptr || wishes.grad_bias != nullptr;
  const bool with_dots = wishes.row_dot != nullptr;
  const Partition& partition = split.partition;
  const bool whole = logits.block >= logits.features && logits.depth_block >= logits.channels && with_gradients;
  const int64_t grad_depth = whole ? logits.depth_block : logits.grad_depth;
  const Counts most(problem, chunk_at(problem, 0, std::max(split.rows, split.direct_rows)));
  const Buffer packed = packed_buffer(problem, split.rows);
  const Buffer packed_rows(
      wishes.grad_weight == nullptr
          ? 0
          : blocks_of(grad_depth, kernels.strip) * kernels.strip * blocks_of(most.lanes, kernels.pack_factor) * size);
  const Buffer tile(blocks_of(split.rows, kernels.strip) * kernels.strip * logits.features * split.tile_bytes);
  const Buffer dots(with_dots ? 3 * most.blocks * most.lanes * size : 0);
  const Buffer grad_rows(
      with_rows && !whole ? partition.parts * blocks_of(grad_depth, kernels.strip) * kernels.strip * most.lanes * size
                          : 0);

  SharedBackwardArgs args{};
  const auto data = [](const Buffer* buffer) { return buffer == nullptr ? nullptr : buffer->get(); };
  args.logits = logits;
  args.kind = wishes.kind;
  args.whole = whole;
  args.packed = packed.get();
  args.packed_rows = packed_rows.get();
  args.tile = tile.get();
  args.tile_type = split.tile_type;
  args.kept_type = wishes.kept_type;
  args.kept_rows = wishes.kept_rows;
  args.dots = dots.get();
  args.grad_prob_sum = wishes.grad_prob_sum;
  args.row_lse = data(wishes.lse);
  args.row_log_scale = data(wishes.log_scale);
  args.row_offset = data(wishes.offset);
  args.row_prob_scale = data(wishes.prob_scale);
  args.row_excess_grad = data(wishes.excess_grad);
  args.row_mean = data(wishes.mean);
  args.row_dot = data(wishes.row_dot);
  if (wishes.grad != nullptr) args.grad = matrix_of(*wishes.grad);
  if (wishes.assignment != nullptr) args.assignment = matrix_of(*wishes.assignment);
  args.parts = partition.parts;
  args.sums = partition.sums;
  args.grad_rows = grad_rows.get();
  args.grad_weight = weight_sums.get();
  args.grad_bias = bias_sums.get();
  for (const Tensor* out : {wishes.grad_context, wishes.grad_input}) {
    if (out == nullptr) continue;
    (out == wishes.grad_input ? args.grad_input : args.grad_context) = out->mutable_data_ptr();
    args.row_type = scalar_of(out->scalar_type());
  }

  for (int64_t begin = 0; begin < logits.rows;) {
    const bool has_logits = begin < split.direct;
    const int64_t end =
        has_logits ? std::min(begin + split.direct_rows, split.direct) : std::min(begin + split.rows, logits.rows);
    args.chunk = chunk_at(problem, begin, end);
    args.has_logits = has_logits;
    args.kept = has_logits ? wishes.kept : nullptr;
    const Counts count(problem, args.chunk);
    if (whole) {
      args.depth_end = logits.channels;
      workers.run(args.sums, count.work * (3 * logits.channels + 32), [&](int64_t item, void* scratch) {
        kernels.gradient_task(args, 0, item, scratch);
      });
      begin = end;
      continue;
    }
    if (!has_logits) {
      for_depth_blocks(logits.channels, logits.depth_block, [&](int64_t depth_begin, int64_t depth_end) {
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
      for_depth_blocks(logits.channels, grad_depth, [&](int64_t depth_begin, int64_t depth_end) {
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
        if (with_rows) {
          workers.run(count.strips, args.chunk.rows * channels * args.parts, [&](int64_t strip, void*) {
            kernels.write_rows(args, strip);
          });
        }
      });
    }
    begin = end;
  }
}

}  // namespace

void run_backward(const SharedProblem& problem, const BackwardWishes& wishes) {
  if (problem.logits.rows == 0) return;
  const Split split(problem, wishes);
  const Workers workers(problem);
  const Sums weight_sums(problem, wishes.grad_weight, split.partition.sums);
  const Sums bias_sums(problem, wishes.grad_bias, split.partition.sums);
  run_chunks(problem, wishes, split, workers, weight_sums, bias_sums);
  weight_sums.write(workers);
  bias_sums.write(workers);
}

}  // namespace fusefeat::cpu
