// The pools' operators on the CPU: checks, allocation and the order of the kernels.
#include "attention_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "../common/attention_pool.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "pool_partition.h"

namespace fusefeat {
namespace {

using cpu::BackwardArgs;
using cpu::Buffer;
using cpu::ForwardArgs;
using cpu::PoolArgs;
using cpu::PoolItem;
using cpu::PoolKernels;
using cpu::PoolPartition;
using std::optional;

const PoolKernels& kernels_for(ScalarType type) {
  const auto token_type = type == ScalarType::Double     ? cpu::TokenType::f64
                          : type == ScalarType::BFloat16 ? cpu::TokenType::bf16
                          : type == ScalarType::Half     ? cpu::TokenType::f16
                                                         : cpu::TokenType::f32;
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      if (token_type == cpu::TokenType::bf16 && __builtin_cpu_supports("avx512bf16")) {
        return *cpu::pool_kernels_avx512_bf16(token_type);
      }
      return *cpu::pool_kernels_avx512(token_type);
    case Isa::avx2:
      return *cpu::pool_kernels_avx2(token_type);
#endif
    default:
      return *cpu::pool_kernels_generic(token_type);
  }
}

cpu::Strides to_cpu(const TokenStrides& strides) {
  return {strides.bag, strides.token, strides.inner};
}

int64_t acc_bytes(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? 8 : 4;
}

// What both passes need of the inputs.
PoolArgs pool_args(
    const PoolSizes& sizes, const Tensor& x, const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens) {
  PoolArgs args;
  args.bags = sizes.bags;
  args.tokens = sizes.tokens;
  args.channels = sizes.channels;
  args.queries = sizes.queries;
  args.packed = sizes.packed;
  args.x = x.const_data_ptr();
  args.x_strides = to_cpu(token_strides(x, sizes, true));
  if (args.channels <= 1) args.x_strides.inner = 1;
  if (mask.has_value()) {
    args.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    args.mask_bag = mask->stride(0);
    args.mask_token = mask->stride(1);
  }
  if (cu_seqlens.has_value()) {
    args.offsets = cu_seqlens->const_data_ptr();
    args.offsets_are_64_bit = cu_seqlens->scalar_type() == ScalarType::Long;
    args.offsets_stride = cu_seqlens->stride(0);
  }
  return args;
}

// The query as the kernels read it: contiguous and in the accumulation type.
Buffer set_query(PoolArgs& args, const Tensor& x, const Tensor& query, double scale) {
  const auto acc = acc_type(x.scalar_type());
  args.scale = scale;
  args.rounds_to_tokens = query.scalar_type() == x.scalar_type();
  if (query.scalar_type() == acc && query.is_contiguous()) {
    args.query = query.const_data_ptr();
    if (args.query != nullptr) return Buffer(0);
  }
  Buffer buffer(std::max<int64_t>(1, args.queries * args.channels) * acc_bytes(x));
  const int64_t row_stride = query.dim() == 2 ? query.stride(0) : 0;
  kernels_for(query.scalar_type())
      .to_acc(
          query.const_data_ptr(), row_stride, query.stride(query.dim() - 1), args.queries, args.channels, buffer.get());
  args.query = buffer.get();
  return buffer;
}

void set_scores(PoolArgs& args, const PoolSizes& sizes, const Tensor& values, const Tensor& scores) {
  args.scores = scores.const_data_ptr();
  args.scores_are_acc = scores.scalar_type() == acc_type(values.scalar_type());
  args.rounds_to_tokens = !args.scores_are_acc;
  args.scores_strides = to_cpu(token_strides(scores, sizes, sizes.query_axis));
}

int64_t token_bytes(const PoolArgs& args, const Tensor& x) {
  const int64_t tokens = args.packed ? args.tokens : args.bags * args.tokens;
  return tokens * std::max<int64_t>(args.channels, 1) * static_cast<int64_t>(x.element_size());
}

Tensor new_or_none(const Tensor& like, bool needed, const std::vector<int64_t>& shape, ScalarType type) {
  Tensor tensor = new_tensor(like, needed ? shape : std::vector<int64_t>{0}, type);
  if (needed) cpu::advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const PoolArgs& inputs, const PoolSizes& sizes, const Tensor& x, bool need_weights) {
  const auto acc = acc_type(x.scalar_type());
  Tensor out = new_tensor(x, sizes.per_bag(true), acc);
  Tensor lse = new_tensor(x, sizes.per_bag(false), ScalarType::Double);
  Tensor weights = new_or_none(x, need_weights, sizes.per_token(), acc);

  ForwardArgs args{inputs};
  const PoolKernels& kernels = kernels_for(x.scalar_type());
  const PoolPartition partition(args, static_cast<int64_t>(x.element_size()));
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<double*>(lse.mutable_data_ptr());
  args.weights = need_weights && weights.numel() > 0 ? weights.mutable_data_ptr() : nullptr;
  if (args.weights != nullptr && !partition.covers) torch::stable::zero_(weights);

  const int64_t per_query = args.queries * acc_bytes(x), parts = partition.parts;
  const int64_t splits = static_cast<int64_t>(partition.splits.size());
  const Buffer buffer(per_query * (parts * (args.channels + 2) + splits * 2));
  char* next = buffer.get();
  const auto take = [&](int64_t bytes) { return std::exchange(next, next + bytes); };
  args.part_out = take(per_query * parts * args.channels);
  args.part_peak = take(per_query * parts);
  args.part_sum = take(per_query * parts);
  args.split_peak = take(per_query * splits);
  args.split_sum = take(per_query * splits);

  const auto& items = partition.items;
  const int64_t num_items = static_cast<int64_t>(items.size());
  const int64_t workers = cpu::worker_count(num_items, token_bytes(args, x));
  const int64_t scratch_bytes = static_cast<int64_t>(kernels.forward_scratch(args));
  const Buffer scratch(workers * scratch_bytes);
  cpu::for_each_item(num_items, workers, [&](int64_t item, int64_t worker) {
    kernels.forward_item(args, items[item], scratch.get() + worker * scratch_bytes);
  });
  if (parts == 0) return {out, lse, weights};

  constexpr int64_t columns = 256;
  const int64_t column_blocks = std::max<int64_t>(1, (args.channels + columns - 1) / columns);
  const int64_t units = splits * args.queries * column_blocks;
  cpu::for_each_item(units, cpu::worker_count(units, per_query * parts * args.channels), [&](int64_t unit, int64_t) {
    const int64_t begin = unit % column_blocks * columns, row = unit / column_blocks;
    kernels.combine(
        args, partition.splits.data(), row / args.queries, row % args.queries, begin,
        std::min(begin + columns, args.channels));
  });
  if (args.weights == nullptr) return {out, lse, weights};
  cpu::for_each_item(num_items, workers, [&](int64_t item, int64_t worker) {
    if (items[item].part >= 0) kernels.normalise_part(args, items[item], scratch.get() + worker * scratch_bytes);
  });
  return {out, lse, weights};
}

// What a forward made is contiguous; other layouts are copied.
Tensor make_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The gradients that one backward fills in.
struct Wanted {
  optional<Tensor> tokens, scores, query;
};

optional<Tensor> if_needed(bool needed, const Tensor& tensor) {
  return needed ? optional<Tensor>(tensor) : std::nullopt;
}

void backward(
    const PoolArgs& inputs, const PoolSizes& sizes, const Tensor& x, const Tensor& grad_out,
    const optional<Tensor>& grad_weights, const Tensor& out, const Tensor& lse, const Tensor& weights, Wanted wanted) {
  if (!wanted.tokens && !wanted.scores && !wanted.query) return;
  BackwardArgs args{inputs};
  const Tensor dense_out = make_contiguous(out), dense_lse = make_contiguous(lse);
  const Tensor dense_weights = make_contiguous(weights);
  args.out = dense_out.const_data_ptr();
  args.lse = static_cast<const double*>(dense_lse.const_data_ptr());
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_strides = {
      grad_out.stride(0), sizes.query_axis ? grad_out.stride(1) : 0, grad_out.stride(grad_out.dim() - 1)};
  if (args.channels <= 1) args.grad_out_strides.inner = 1;
  if (grad_weights.has_value()) {
    args.grad_weights = grad_weights->const_data_ptr();
    args.grad_weights_strides = to_cpu(token_strides(*grad_weights, sizes, sizes.query_axis));
    args.weights = dense_weights.const_data_ptr();
  }

  const PoolKernels& kernels = kernels_for(x.scalar_type());
  const PoolPartition partition(args, static_cast<int64_t>(x.element_size()));
  const auto& items = partition.items;
  const int64_t num_items = static_cast<int64_t>(items.size());
  const int64_t row_bytes = args.channels * static_cast<int64_t>(x.element_size());
  if (wanted.tokens) {
    args.grad_x = wanted.tokens->mutable_data_ptr();
    args.stream_grad_x =
        cpu::stream_output(args.grad_x, row_bytes, wanted.tokens->numel() * wanted.tokens->element_size());
    if (!partition.covers) torch::stable::zero_(*wanted.tokens);
  }
  if (wanted.scores) {
    args.grad_scores = wanted.scores->mutable_data_ptr();
    if (!partition.covers) torch::stable::zero_(*wanted.scores);
  }

  const int64_t per_query = args.queries * acc_bytes(x), query_length = args.queries * args.channels;
  const int64_t splits = static_cast<int64_t>(partition.splits.size());
  const Buffer query_parts(wanted.query ? num_items * query_length * acc_bytes(x) : 0);
  const Buffer weight_dots(grad_weights.has_value() ? per_query * (partition.parts + splits) : 0);
  args.grad_query_parts = query_parts.get();
  args.part_weight_dots = weight_dots.get();
  args.split_weight_dots = weight_dots.get() == nullptr ? nullptr : weight_dots.get() + per_query * partition.parts;

  const int64_t workers = cpu::worker_count(num_items, token_bytes(args, x));
  if (grad_weights.has_value() && splits > 0) {
    cpu::for_each_item(num_items, workers, [&](int64_t item, int64_t) {
      if (items[item].part >= 0) kernels.weight_dots_part(args, items[item]);
    });
    for (int64_t split = 0; split < splits; ++split) kernels.weight_dots_sum(args, partition.splits.data(), split);
  }
  const int64_t scratch_bytes = static_cast<int64_t>(kernels.backward_scratch(args));
  const Buffer scratch(workers * scratch_bytes);
  cpu::for_each_item(num_items, workers, [&](int64_t item, int64_t worker) {
    kernels.backward_item(args, items[item], item, scratch.get() + worker * scratch_bytes);
  });
  if (!wanted.query) return;

  constexpr int64_t columns = 128;
  const int64_t units = (query_length + columns - 1) / columns;
  const bool as_acc = wanted.query->scalar_type() == acc_type(x.scalar_type());
  void* grad_query = wanted.query->mutable_data_ptr();
  cpu::for_each_item(
      units, cpu::worker_count(units, num_items * query_length * acc_bytes(x)), [&](int64_t unit, int64_t) {
        kernels.sum_query(
            query_parts.get(), num_items, query_length, unit * columns, std::min((unit + 1) * columns, query_length),
            as_acc, grad_query);
      });
}

std::tuple<Tensor, Tensor, Tensor> attention_pool(
    const Tensor& x, const Tensor& query, const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens,
    double scale, bool need_weights) {
  const PoolSizes sizes = attention_pool_sizes(x, query, mask, cu_seqlens);
  PoolArgs args = pool_args(sizes, x, mask, cu_seqlens);
  const Buffer acc_query = set_query(args, x, query, scale);
  return forward(args, sizes, x, need_weights);
}

std::tuple<Tensor, Tensor, Tensor> softmax_pool(
    const Tensor& values, const Tensor& scores, const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens,
    bool need_weights) {
  const PoolSizes sizes = softmax_pool_sizes(values, scores, mask, cu_seqlens);
  PoolArgs args = pool_args(sizes, values, mask, cu_seqlens);
  set_scores(args, sizes, values, scores);
  return forward(args, sizes, values, need_weights);
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

std::tuple<Tensor, Tensor> attention_pool_backward(
    const Tensor& grad_out, const optional<Tensor>& grad_weights, const Tensor& x, const Tensor& query,
    const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens, double scale, const Tensor& out,
    const Tensor& lse, const Tensor& weights, bool need_grad_x, bool need_grad_query) {
  const PoolSizes sizes = attention_pool_sizes(x, query, mask, cu_seqlens);
  check_backward(x, sizes, grad_out, grad_weights, out, lse, weights);
  PoolArgs args = pool_args(sizes, x, mask, cu_seqlens);
  const Buffer acc_query = set_query(args, x, query, scale);
  Tensor grad_x = new_or_none(x, need_grad_x, shape_of(x), x.scalar_type());
  Tensor grad_query = new_or_none(query, need_grad_query, shape_of(query), query.scalar_type());
  backward(
      args, sizes, x, grad_out, grad_weights, out, lse, weights,
      {.tokens = if_needed(need_grad_x, grad_x), .scores = {}, .query = if_needed(need_grad_query, grad_query)});
  return {grad_x, grad_query};
}

std::tuple<Tensor, Tensor> softmax_pool_backward(
    const Tensor& grad_out, const optional<Tensor>& grad_weights, const Tensor& values, const Tensor& scores,
    const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens, const Tensor& out, const Tensor& lse,
    const Tensor& weights, bool need_grad_values, bool need_grad_scores) {
  const PoolSizes sizes = softmax_pool_sizes(values, scores, mask, cu_seqlens);
  check_backward(values, sizes, grad_out, grad_weights, out, lse, weights);
  PoolArgs args = pool_args(sizes, values, mask, cu_seqlens);
  set_scores(args, sizes, values, scores);
  Tensor grad_values = new_or_none(values, need_grad_values, shape_of(values), values.scalar_type());
  Tensor grad_scores = new_or_none(scores, need_grad_scores, shape_of(scores), scores.scalar_type());
  backward(
      args, sizes, values, grad_out, grad_weights, out, lse, weights,
      {.tokens = if_needed(need_grad_values, grad_values),
       .scores = if_needed(need_grad_scores, grad_scores),
       .query = {}});
  return {grad_values, grad_scores};
}

// A library's product would depend on the number of threads.
Tensor mm(Tensor a, Tensor b) {
  const auto type = a.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Float || type == ScalarType::Double) && b.scalar_type() == type,
      "fusefeat: mm takes two matrices of float32 or of float64");
  STD_TORCH_CHECK(
      a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), "fusefeat: mm takes matrices [M,N] and [N,K]");
  // A row that is alone lies in order whatever its stride.
  const auto in_order = [](const Tensor& t, int64_t dim) { return t.size(dim) <= 1 || t.stride(dim) == 1; };
  if (!in_order(b, 1)) {
    if (!in_order(b, 0))
      b = torch::stable::contiguous(b);
    else if (!in_order(a, 1))
      a = torch::stable::contiguous(a);
  }
  Tensor out = new_tensor(a, {a.size(0), b.size(1)}, type);
  cpu::ProductArgs args;
  args.a = a.const_data_ptr();
  args.b = b.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.rows = a.size(0);
  args.depth = a.size(1);
  args.columns = b.size(1);
  args.a_row = a.stride(0);
  args.a_column = a.stride(1);
  args.b_row = b.stride(0);
  args.b_column = in_order(b, 1) ? 1 : b.stride(1);
  constexpr int64_t block = cpu::kProductBlock;
  const PoolKernels& kernels = kernels_for(type);
  const int64_t across = (args.columns + block - 1) / block, units = across * ((args.rows + block - 1) / block);
  const int64_t bytes = args.rows * args.depth * args.columns / 8 * static_cast<int64_t>(a.element_size());
  cpu::for_each_item(units, cpu::worker_count(units, bytes), [&](int64_t unit, int64_t) {
    kernels.multiply(args, unit / across * block, unit % across * block);
  });
  return out;
}

}  // namespace
}  // namespace fusefeat

STABLE_TORCH_LIBRARY_IMPL(fusefeat, CPU, m) {
  m.impl("attention_pool", TORCH_BOX(&fusefeat::attention_pool));
  m.impl("attention_pool_backward", TORCH_BOX(&fusefeat::attention_pool_backward));
  m.impl("softmax_pool", TORCH_BOX(&fusefeat::softmax_pool));
  m.impl("softmax_pool_backward", TORCH_BOX(&fusefeat::softmax_pool_backward));
  m.impl("mm", TORCH_BOX(&fusefeat::mm));
}
