#include <algorithm>

#include "shared_split.h"

namespace fusefeat::cpu {
namespace {

// One gradient that is summed in several arrays first, unless a single one in acc can be the output itself.
class Sums {
 public:
  Sums(const SharedProblem& problem, const Tensor* out, int64_t count, bool written_once = false)
      : problem_(problem), out_(out), count_(count), buffer_(0) {
    if (out == nullptr) return;
    const auto type = problem.is_double ? ScalarType::Double : ScalarType::Float;
    direct_ = count == 1 && (written_once || out->scalar_type() == type);
    if (direct_) {
      advise_huge_pages(out->mutable_data_ptr(), out->numel() * out->element_size());
    } else {
      buffer_ = Buffer(count * out->numel() * problem.acc_bytes());
    }
  }

  void* get() const { return out_ == nullptr ? nullptr : direct_ ? out_->mutable_data_ptr() : buffer_.get(); }
  Scalar type() const {
    return direct_ ? scalar_of(out_->scalar_type()) : problem_.is_double ? Scalar::f64 : Scalar::f32;
  }

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

// The chunks of one backward.
class Backward {
 public:
  Backward(const SharedProblem& problem, const BackwardWishes& wishes)
      : problem_(problem),
        wishes_(wishes),
        kernels_(*problem.kernels),
        logits_(problem.logits),
        split_(problem, wishes),
        partition_(problem, wishes, split_.first_rows()),
        workers_(problem, split_.sweep.rows),
        weight_sums_(problem, wishes.grad_weight, partition_.sums, split_.at_once),
        bias_sums_(problem, wishes.grad_bias, partition_.sums),
        tile_(tile_bytes(std::max(split_.sweep.in_tile, split_.at_once ? 0 : split_.rows))) {}

  void run() {
    set_args();
    int64_t begin = split_.sweep.rows;
    if (begin > 0) sweep();
    if (begin < logits_.rows) run_chunks(begin);
    weight_sums_.write(workers_);
    bias_sums_.write(workers_);
  }

 private:
  bool with_rows() const { return wishes_.grad_context != nullptr || wishes_.grad_input != nullptr; }
  bool with_dots() const { return wishes_.row_dot != nullptr; }

  void set_args() {
    const auto data = [](const Buffer* buffer) { return buffer == nullptr ? nullptr : buffer->get(); };
    args_.logits = logits_;
    args_.kind = wishes_.kind;
    args_.tile_type = split_.tile_type;
    args_.kept = wishes_.kept;
    args_.kept_type = wishes_.kept_type;
    args_.kept_rows = wishes_.kept_rows;
    args_.tile_end = logits_.rows;
    args_.grad_prob_sum = wishes_.grad_prob_sum;
    args_.row_lse = data(wishes_.lse);
    args_.row_log_scale = data(wishes_.log_scale);
    args_.row_offset = data(wishes_.offset);
    args_.row_prob_scale = data(wishes_.prob_scale);
    args_.row_excess_grad = data(wishes_.excess_grad);
    args_.row_mean = data(wishes_.mean);
    args_.row_dot = data(wishes_.row_dot);
    if (wishes_.grad != nullptr) args_.grad = matrix_of(*wishes_.grad);
    if (wishes_.assignment != nullptr) args_.assignment = matrix_of(*wishes_.assignment);
    args_.tile = tile_.get();
    args_.grad_weight = weight_sums_.get();
    args_.grad_bias = bias_sums_.get();
    for (const Tensor* out : {wishes_.grad_context, wishes_.grad_input}) {
      if (out == nullptr) continue;
      (out == wishes_.grad_input ? args_.grad_input : args_.grad_context) = out->mutable_data_ptr();
      args_.row_type = scalar_of(out->scalar_type());
    }
  }

  int64_t tile_bytes(int64_t rows) const {
    return blocks_of(rows, kernels_.strip) * kernels_.strip * logits_.features * split_.tile_bytes;
  }

  Buffer rows_buffer(int64_t rows, int64_t channels) const {
    const int64_t lanes = blocks_of(rows, kernels_.strip) * kernels_.strip;
    return Buffer(
        wishes_.grad_weight == nullptr ? 0
                                       : blocks_of(channels, kernels_.strip) * kernels_.strip *
                                             blocks_of(lanes, kernels_.pack_factor) * problem_.acc_bytes());
  }

  void compute_logits(const Counts& count) {
    for_depth_blocks(logits_.channels, logits_.depth_block, [&](int64_t depth_begin, int64_t depth_end) {
      args_.depth_begin = depth_begin;
      args_.depth_end = depth_end;
      pack_transposed(problem_, workers_, args_, args_.packed);
      workers_.run(
          count.blocks * count.groups, count.work * (depth_end - depth_begin + 16), [&](int64_t item, void* scratch) {
            kernels_.logits_task(args_, item / count.groups, item % count.groups, scratch);
          });
    });
  }

  void sum_dots(const Counts& count) {
    workers_.run(count.blocks * count.groups, count.work * 16, [&](int64_t item, void* scratch) {
      kernels_.dots_task(args_, item / count.groups, item % count.groups, scratch);
    });
  }

  void combine_dots(const Counts& count) {
    workers_.run(
        count.strips, count.lanes * count.blocks, [&](int64_t strip, void*) { kernels_.combine_dots(args_, strip); });
  }

  void pack_rows(const Counts& count) {
    workers_.run(count.strips, count.lanes * (args_.depth_end - args_.depth_begin), [&](int64_t strip, void*) {
      kernels_.pack_rows(logits_, args_.chunk, strip, args_.depth_begin, args_.depth_end, args_.packed_rows);
    });
  }

  void write_rows(const Counts& count) {
    const int64_t work = args_.chunk.rows * (args_.depth_end - args_.depth_begin) * args_.parts;
    workers_.run(count.strips, work, [&](int64_t strip, void*) { kernels_.write_rows(args_, strip); });
  }

  // How many parts of the sums of the rows' gradients there is memory for, `part_bytes` each, beside `held`.
  int64_t sweep_parts(int64_t blocks, int64_t held, int64_t part_bytes) const {
    constexpr int64_t tasks = 16, most = 24 * kMiB;
    if (!with_rows()) return std::min(blocks, tasks);
    int64_t room = kSweepBytes - wishes_.kept_bytes - held;
    // What the sums of the weight's gradient in acc would take beyond the gradient.
    const int64_t size = static_cast<int64_t>(wishes_.grad_weight->element_size());
    if (split_.at_once) room += logits_.features * logits_.channels * (problem_.acc_bytes() - size);
    return std::clamp<int64_t>(std::min(room, most) / part_bytes, 1, std::min(blocks, tasks));
  }

  void sweep() {
    const int64_t rows = split_.sweep.rows, size = problem_.acc_bytes();
    const int64_t channels = blocks_of(logits_.channels, kernels_.strip) * kernels_.strip;
    args_.chunk = chunk_at(problem_, 0, rows);
    const Counts count(problem_, args_.chunk);
    args_.sums = 1;
    args_.kept_end = split_.direct;
    args_.loan_end = split_.direct + split_.sweep.loan;
    args_.loan = weight_sums_.get();
    args_.loan_row_bytes = logits_.channels * (weight_sums_.type() == Scalar::f64   ? 8
                                               : weight_sums_.type() == Scalar::f32 ? 4
                                                                                    : 2);
    args_.weight_type = weight_sums_.type();
    const Buffer packed = packed_buffer(problem_, split_.direct < rows ? rows : 0);
    const Buffer packed_rows = rows_buffer(rows, logits_.channels);
    args_.tile_end = args_.loan_end + split_.sweep.in_tile;
    const Buffer dots(3 * count.blocks * count.lanes * size);
    const int64_t part_bytes = channels * count.lanes * size;
    args_.parts = sweep_parts(count.blocks, tile_.bytes() + 2 * part_bytes + dots.bytes(), part_bytes);
    const Buffer grad_rows(with_rows() ? args_.parts * part_bytes : 0);
    args_.packed = packed.get();
    args_.packed_rows = packed_rows.get();
    args_.dots = dots.get();
    args_.grad_rows = grad_rows.get();
    if (split_.direct > 0) sum_dots(count);
    if (split_.direct < rows) compute_logits(count);
    combine_dots(count);
    args_.depth_begin = 0;
    args_.depth_end = logits_.channels;
    pack_rows(count);
    workers_.run(args_.parts, count.work * (2 * logits_.channels + 16), [&](int64_t part, void* scratch) {
      kernels_.sweep_task(args_, part, scratch);
    });
    if (with_rows()) write_rows(count);
    args_.loan_end = 0;
    args_.tile_end = logits_.rows;
  }

  // The gradients of weight and bias are left in their sums.
  void run_chunks(int64_t begin) {
    const int64_t size = problem_.acc_bytes();
    const bool with_gradients = with_rows() || wishes_.grad_weight != nullptr || wishes_.grad_bias != nullptr;
    const bool whole = logits_.block >= logits_.features && logits_.depth_block >= logits_.channels && with_gradients;
    const int64_t grad_depth = whole ? logits_.depth_block : logits_.grad_depth;
    const int64_t direct = std::max(begin, split_.direct);
    const Counts most(problem_, chunk_at(problem_, 0, split_.most_rows()));
    const Buffer packed = packed_buffer(problem_, split_.rows);
    const Buffer packed_rows = rows_buffer(most.lanes, grad_depth);
    const Buffer dots(with_dots() ? 3 * most.blocks * most.lanes * size : 0);
    const Buffer grad_rows(
        with_rows() && !whole
            ? partition_.parts * blocks_of(grad_depth, kernels_.strip) * kernels_.strip * most.lanes * size
            : 0);
    args_.whole = whole;
    args_.packed = packed.get();
    args_.packed_rows = packed_rows.get();
    args_.dots = dots.get();
    args_.parts = partition_.parts;
    args_.sums = partition_.sums;
    args_.grad_rows = grad_rows.get();
    while (begin < logits_.rows) {
      const bool has_logits = begin < direct;
      const int64_t end =
          has_logits ? std::min(begin + split_.direct_rows, direct) : std::min(begin + split_.rows, logits_.rows);
      args_.chunk = chunk_at(problem_, begin, end);
      args_.has_logits = has_logits;
      args_.kept = has_logits ? wishes_.kept : nullptr;
      args_.kept_end = has_logits ? args_.chunk.rows : 0;
      const Counts count(problem_, args_.chunk);
      begin = end;
      if (whole) {
        args_.depth_end = logits_.channels;
        workers_.run(args_.sums, count.work * (3 * logits_.channels + 32), [&](int64_t item, void* scratch) {
          kernels_.gradient_task(args_, 0, item, scratch);
        });
        continue;
      }
      if (!has_logits) {
        compute_logits(count);
      } else if (with_dots()) {
        sum_dots(count);
      }
      if (with_dots()) combine_dots(count);
      if (!with_gradients) continue;
      for_depth_blocks(logits_.channels, grad_depth, [&](int64_t depth_begin, int64_t depth_end) {
        args_.depth_begin = depth_begin;
        args_.depth_end = depth_end;
        if (wishes_.grad_weight != nullptr) pack_rows(count);
        const int64_t work = count.work * (2 * (depth_end - depth_begin) + 16);
        workers_.run(args_.parts * args_.sums, work, [&](int64_t item, void* scratch) {
          kernels_.gradient_task(args_, item % args_.parts, item / args_.parts, scratch);
        });
        if (with_rows()) write_rows(count);
      });
    }
  }

  const SharedProblem& problem_;
  const BackwardWishes& wishes_;
  const SharedKernels& kernels_;
  const Logits& logits_;
  const Split split_;
  const Partition partition_;
  const Workers workers_;
  const Sums weight_sums_, bias_sums_;
  const Buffer tile_;  // of the sweep and of the chunks: what the C library keeps of one is not there for the other
  SharedBackwardArgs args_{};
};

}  // namespace

void run_backward(const SharedProblem& problem, const BackwardWishes& wishes) {
  if (problem.logits.rows > 0) Backward(problem, wishes).run();
}

}  // namespace fusefeat::cpu
