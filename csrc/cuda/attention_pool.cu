// Operators of both pools on CUDA tensors: checks, memory and the order of launches.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>

#include "../common/attention_pool.h"
#include "attention_pool.cuh"
#include "device_scope.h"

namespace fusefeat::cuda {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using MaybeTensor = std::optional<Tensor>;

template <typename Body>
void with_type(ScalarType type, Body body) {
  if (type == ScalarType::Half) return body(Half());
  if (type == ScalarType::BFloat16) return body(BFloat16());
  if (type == ScalarType::Float) return body(float());
  return body(double());
}

template <Access kAccess>
using AccessTag = std::integral_constant<Access, kAccess>;

// float64 is for checking gradients: it has the general kernels only.
template <typename T, typename Body>
void with_access(bool packs, bool many, Body body) {
  if constexpr (!std::is_same_v<T, double>) {
    if (packs) return many ? body(AccessTag<Access::kMany>()) : body(AccessTag<Access::kOne>());
  }
  body(AccessTag<Access::kAny>());
}

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// For tensors without a token axis: contiguous, and on a 16-byte boundary.
Tensor dense(const Tensor& tensor) {
  const Tensor result = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return aligned(result) ? result : torch::stable::clone(result);
}

// The per-bag tensors, per-token tensors and launches of one call share these.
struct Pool {
  PoolSizes sizes;
  Tensor tokens;
  MaybeTensor mask, offsets;
  cudaStream_t stream;

  Pool(PoolSizes pool_sizes, const Tensor& x, const MaybeTensor& mask_, const MaybeTensor& cu_seqlens, cudaStream_t s)
      : sizes(pool_sizes), tokens(x), mask(mask_), stream(s) {
    if (cu_seqlens.has_value()) offsets = dense(*cu_seqlens);
  }

  ScalarType acc() const { return acc_type(tokens.scalar_type()); }

  Tensor scratch(const std::vector<int64_t>& shape) const { return new_tensor(tokens, shape, acc()); }

  Bags bags() const {
    Bags bags;
    if (offsets.has_value()) {
      bags.offsets = offsets->const_data_ptr();
      bags.offsets_64bit = offsets->scalar_type() == ScalarType::Long;
    }
    bags.count = sizes.bags;
    bags.tokens_each = sizes.packed ? 0 : sizes.tokens;
    bags.tokens = sizes.all_tokens();
    return bags;
  }

  TokenLayout layout(const Tensor& tensor, bool has_inner) const {
    const TokenStrides strides = token_strides(tensor, sizes, has_inner);
    return {strides.bag, strides.token, strides.inner};
  }

  // Of a contiguous [tokens, queries] tensor.
  TokenLayout dense_layout() const { return {sizes.packed ? 0 : sizes.tokens * sizes.queries, sizes.queries, 1}; }

  Mask keep() const {
    Mask keep;
    if (mask.has_value()) keep = {static_cast<const bool*>(mask->const_data_ptr()), layout(*mask, false)};
    return keep;
  }

  TokenRows token_rows() const {
    TokenRows rows;
    rows.data = tokens.const_data_ptr();
    rows.layout = layout(tokens, true);
    return rows;
  }

  // Every row of x is whole packs on 16-byte boundaries.
  bool packs() const {
    const TokenLayout rows = layout(tokens, true);
    const int64_t pack = 16 / static_cast<int64_t>(tokens.element_size());
    return rows.inner == 1 && sizes.channels % pack == 0 && rows.token % pack == 0 && rows.bag % pack == 0 &&
           aligned(tokens);
  }

  QueryRows query_rows(const Tensor& rows) const { return {rows.const_data_ptr(), rows.scalar_type() == acc()}; }

  ScoreRows score_rows(const Tensor& scores) const {
    return {scores.const_data_ptr(), layout(scores, sizes.query_axis), scores.scalar_type() == acc()};
  }

  template <typename T, Access kAccess>
  PoolPlan plan() const {
    return plan_pool<PoolTraits<T, kAccess>>(sizes.all_tokens(), sizes.channels, sizes.queries);
  }
};

// Allocates the partial states and runs the pass; args.plan is set here.
template <typename T, Access kAccess, bool kAttention>
void run_forward(const Pool& pool, ForwardArgs args) {
  args.plan = plan_pool<PoolTraits<T, kAccess>>(args.bags.tokens, args.channels, args.queries);
  const int64_t slots = args.plan.blocks * kSlots;
  const Tensor stats = pool.scratch({slots, args.queries, 2});
  const Tensor sums = pool.scratch({slots, args.queries, args.plan.padded_channels});
  const Tensor crossing = new_tensor(pool.tokens, {args.plan.blocks}, ScalarType::Long);
  args.slot_stats = stats.mutable_data_ptr();
  args.slot_sums = sums.mutable_data_ptr();
  args.crossing = static_cast<int64_t*>(crossing.mutable_data_ptr());
  launch_forward<T, kAccess, kAttention>(args, pool.stream);
}

template <typename T>
void dots_per_token(const Pool& pool, const QueryRows& rows, bool per_bag, double scale, const Tensor& out) {
  RowDotArgs args;
  args.bags = pool.bags();
  args.channels = pool.sizes.channels;
  args.queries = pool.sizes.queries;
  args.tokens = pool.token_rows();
  args.mask = pool.keep();
  args.rows = rows;
  args.per_bag = per_bag;
  args.scale = scale;
  args.out = out.mutable_data_ptr();
  launch_row_dots<T>(args, pool.stream);
}

struct Pooled {
  Tensor out, lse, weights;
};

// query for the attention pool, scores for the softmax pool.
Pooled forward(const Pool& pool, const MaybeTensor& query, const MaybeTensor& scores, double scale, bool need_weights) {
  const PoolSizes& sizes = pool.sizes;
  Pooled result{
      pool.scratch(sizes.per_bag(true)), new_tensor(pool.tokens, sizes.per_bag(false), ScalarType::Double),
      pool.scratch(need_weights ? sizes.per_token() : std::vector<int64_t>{0})};
  if (sizes.bags == 0 || sizes.queries == 0) {
    if (need_weights) torch::stable::zero_(result.weights);
    return result;
  }

  ForwardArgs args;
  args.bags = pool.bags();
  args.channels = sizes.channels;
  args.queries = sizes.queries;
  args.tokens = pool.token_rows();
  args.mask = pool.keep();
  args.scale = scale;
  args.out = result.out.mutable_data_ptr();
  args.lse = static_cast<double*>(result.lse.mutable_data_ptr());
  if (scores.has_value()) args.scores = pool.score_rows(*scores);

  with_type(pool.tokens.scalar_type(), [&](auto type) {
    using T = decltype(type);
    with_access<T>(pool.packs(), sizes.queries > 1, [&](auto access) {
      constexpr Access kAccess = decltype(access)::value;
      if (!query.has_value()) {
        run_forward<T, kAccess, false>(pool, args);
      } else if (pool.plan<T, kAccess>().slices == 1) {
        args.query = pool.query_rows(*query);
        if (need_weights) args.keep_scores = result.weights.mutable_data_ptr();
        run_forward<T, kAccess, true>(pool, args);
      } else {
        const Tensor dots = need_weights ? result.weights : pool.scratch(sizes.per_token());
        if (sizes.all_tokens() > 0) dots_per_token<T>(pool, pool.query_rows(*query), false, scale, dots);
        args.scores = {dots.const_data_ptr(), pool.dense_layout(), true};
        run_forward<T, kAccess, false>(pool, args);
      }
    });
    if (sizes.packed) launch_refuse_bad_offsets<AccOf<T>>(args, pool.stream);
    if (need_weights && sizes.all_tokens() > 0) {
      WeightArgs weights;
      weights.bags = args.bags;
      weights.queries = sizes.queries;
      weights.mask = args.mask;
      weights.scores = args.scores;
      if (query.has_value()) weights.scores = {result.weights.const_data_ptr(), pool.dense_layout(), true};
      weights.lse = args.lse;
      weights.weights = result.weights.mutable_data_ptr();
      launch_weights<T>(weights, pool.stream);
    }
  });
  check_launch("the pool's forward");
  return result;
}

// [bags, queries]: <grad_out, out> + sum over tokens of weight * grad_weight.
template <typename A>
Tensor delta_of(
    const Pool& pool, const Tensor& grad_out, const MaybeTensor& grad_weights, const Tensor& out,
    const Tensor& weights) {
  const PoolSizes& sizes = pool.sizes;
  const int64_t rows = sizes.bags * sizes.queries;
  const Tensor delta = pool.scratch({rows});
  Tensor weighted = delta;
  if (grad_weights.has_value()) {
    weighted = pool.scratch({rows});
    // A plain sum of one-channel tokens, which are other ones for each query.
    const TokenLayout layout = pool.layout(*grad_weights, sizes.query_axis);
    ForwardArgs args;
    args.bags = pool.bags();
    args.channels = 1;
    args.queries = sizes.queries;
    args.tokens = {grad_weights->const_data_ptr(), {layout.bag, layout.token, 1}, layout.inner};
    args.scores = {weights.const_data_ptr(), pool.dense_layout(), true};
    args.plain_sum = true;
    args.out = weighted.mutable_data_ptr();
    run_forward<A, Access::kAny, false>(pool, args);
  }
  launch_delta<A>(
      static_cast<const A*>(grad_out.const_data_ptr()), static_cast<const A*>(out.const_data_ptr()),
      grad_weights.has_value() ? static_cast<const A*>(weighted.const_data_ptr()) : nullptr,
      static_cast<A*>(delta.mutable_data_ptr()), rows, sizes.channels, pool.stream);
  return delta;
}

// With many queries the sums over ds_tk x_t would not fit the backward pass: a pass of their own.
template <typename T, Access kAccess>
Tensor query_sums(const Pool& pool, const Tensor& grad_scores, int64_t& count) {
  const PoolSizes& sizes = pool.sizes;
  ForwardArgs args;
  args.bags = pool.bags();
  args.channels = sizes.channels;
  args.queries = sizes.queries;
  args.tokens = pool.token_rows();
  args.scores = {grad_scores.const_data_ptr(), pool.dense_layout(), true};
  args.plain_sum = true;
  TokenLayout& layout = args.tokens.layout;
  if (sizes.packed || layout.bag == sizes.tokens * layout.token) {
    // All tokens at one stride: a single bag of them all.
    args.bags.offsets = nullptr;
    args.bags.count = 1;
    args.bags.tokens_each = args.bags.tokens;
  }
  count = args.bags.count;
  const Tensor sums = pool.scratch({count, sizes.queries, sizes.channels});
  args.out = sums.mutable_data_ptr();
  run_forward<T, kAccess, false>(pool, args);
  return sums;
}

struct Incoming {
  Tensor grad_out;
  MaybeTensor grad_weights;
  Tensor out, lse, weights;
};

struct Gradients {
  Tensor tokens, other;
};

// Gradients of the tokens and of the query (attention pool) or the scores (softmax pool).
Gradients backward(
    const Pool& pool, const MaybeTensor& query, const MaybeTensor& scores, double scale, const Incoming& incoming,
    bool need_tokens, bool need_other) {
  const PoolSizes& sizes = pool.sizes;
  const Tensor& like = query.has_value() ? *query : *scores;
  const auto shape_if = [](bool needed, const auto& sizes_of) {
    return needed ? std::vector<int64_t>(sizes_of.begin(), sizes_of.end()) : std::vector<int64_t>{0};
  };
  Gradients result{
      new_tensor(pool.tokens, shape_if(need_tokens, pool.tokens.sizes()), pool.tokens.scalar_type()),
      new_tensor(pool.tokens, shape_if(need_other, like.sizes()), like.scalar_type())};
  if (!need_tokens && !need_other) return result;
  if (sizes.all_tokens() == 0 || sizes.bags == 0 || sizes.queries == 0) {
    torch::stable::zero_(result.tokens);
    torch::stable::zero_(result.other);
    return result;
  }

  const Tensor grad_out = dense(incoming.grad_out), out = dense(incoming.out);
  const Tensor lse = dense(incoming.lse);
  const Tensor weights = incoming.grad_weights.has_value() ? dense(incoming.weights) : lse;

  BackwardArgs args;
  args.bags = pool.bags();
  args.channels = sizes.channels;
  args.queries = sizes.queries;
  args.tokens = pool.token_rows();
  args.mask = pool.keep();
  args.scale = scale;
  args.grad_out = grad_out.const_data_ptr();
  args.lse = static_cast<const double*>(lse.const_data_ptr());
  if (incoming.grad_weights.has_value()) args.grad_weights = pool.score_rows(*incoming.grad_weights);
  if (scores.has_value()) args.scores = pool.score_rows(*scores);
  if (need_tokens) args.grad_tokens = result.tokens.mutable_data_ptr();

  with_type(pool.tokens.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Tensor delta = delta_of<AccOf<T>>(pool, grad_out, incoming.grad_weights, out, weights);
    args.delta = delta.const_data_ptr();
    with_access<T>(pool.packs(), sizes.queries > 1, [&](auto access) {
      constexpr Access kAccess = decltype(access)::value;
      args.plan = pool.plan<T, kAccess>();

      // Rows too long for one team: their products come first, then slices of the channels.
      Tensor given_scores, given_dots;
      if (args.plan.slices > 1) {
        given_dots = pool.scratch(sizes.per_token());
        dots_per_token<T>(pool, pool.query_rows(grad_out), true, 1.0, given_dots);
        args.given_dots = given_dots.const_data_ptr();
        if (query.has_value()) {
          given_scores = pool.scratch(sizes.per_token());
          dots_per_token<T>(pool, pool.query_rows(*query), false, scale, given_scores);
          args.given_scores = given_scores.const_data_ptr();
        }
      }

      if (!query.has_value()) {
        if (need_other) args.grad_scores = result.other.mutable_data_ptr();
        args.grad_scores_in_acc = like.scalar_type() == pool.acc();
        launch_backward<T, kAccess, false>(args, pool.stream);
        return;
      }
      args.query = pool.query_rows(*query);
      QueryGradArgs sums;
      Tensor parts, grad_scores;
      const bool separate = sizes.queries > 1;
      if (need_other && separate) {
        grad_scores = pool.scratch(sizes.per_token());
        args.grad_scores = grad_scores.mutable_data_ptr();
        args.grad_scores_in_acc = true;
      } else if (need_other) {
        parts = pool.scratch({args.plan.blocks, args.plan.padded_channels});
        args.grad_query = parts.mutable_data_ptr();
        sums.count = args.plan.blocks;
        sums.row_channels = args.plan.padded_channels;
      }
      launch_backward<T, kAccess, true>(args, pool.stream);
      if (!need_other) return;
      if (separate) {
        parts = query_sums<T, kAccess>(pool, grad_scores, sums.count);
        sums.row_channels = sizes.channels;
      }
      sums.parts = parts.const_data_ptr();
      sums.queries = sizes.queries;
      sums.channels = sizes.channels;
      sums.scale = scale;
      sums.out = result.other.mutable_data_ptr();
      sums.out_in_acc = like.scalar_type() == pool.acc();
      launch_query_grads<T>(sums, pool.stream);
    });
  });
  check_launch("the pool's backward");
  return result;
}

std::tuple<Tensor, Tensor, Tensor> attention_pool(
    const Tensor& x, const Tensor& query, const MaybeTensor& mask, const MaybeTensor& cu_seqlens, double scale,
    bool need_weights) {
  const PoolSizes sizes = attention_pool_sizes(x, query, mask, cu_seqlens);
  const DeviceScope device(x);
  const Pool pool(sizes, x, mask, cu_seqlens, device.stream());
  const Pooled pooled = forward(pool, dense(query), std::nullopt, scale, need_weights);
  return {pooled.out, pooled.lse, pooled.weights};
}

std::tuple<Tensor, Tensor> attention_pool_backward(
    const Tensor& grad_out, const MaybeTensor& grad_weights, const Tensor& x, const Tensor& query,
    const MaybeTensor& mask, const MaybeTensor& cu_seqlens, double scale, const Tensor& out, const Tensor& lse,
    const Tensor& weights, bool need_grad_x, bool need_grad_query) {
  const PoolSizes sizes = attention_pool_sizes(x, query, mask, cu_seqlens);
  check_backward(x, sizes, grad_out, grad_weights, out, lse, weights);
  const DeviceScope device(x);
  const Pool pool(sizes, x, mask, cu_seqlens, device.stream());
  const Gradients gradients = backward(
      pool, dense(query), std::nullopt, scale, {grad_out, grad_weights, out, lse, weights}, need_grad_x,
      need_grad_query);
  return {gradients.tokens, gradients.other};
}

std::tuple<Tensor, Tensor, Tensor> softmax_pool(
    const Tensor& values, const Tensor& scores, const MaybeTensor& mask, const MaybeTensor& cu_seqlens,
    bool need_weights) {
  const PoolSizes sizes = softmax_pool_sizes(values, scores, mask, cu_seqlens);
  const DeviceScope device(values);
  const Pool pool(sizes, values, mask, cu_seqlens, device.stream());
  const Pooled pooled = forward(pool, std::nullopt, scores, 1.0, need_weights);
  return {pooled.out, pooled.lse, pooled.weights};
}

std::tuple<Tensor, Tensor> softmax_pool_backward(
    const Tensor& grad_out, const MaybeTensor& grad_weights, const Tensor& values, const Tensor& scores,
    const MaybeTensor& mask, const MaybeTensor& cu_seqlens, const Tensor& out, const Tensor& lse, const Tensor& weights,
    bool need_grad_values, bool need_grad_scores) {
  const PoolSizes sizes = softmax_pool_sizes(values, scores, mask, cu_seqlens);
  check_backward(values, sizes, grad_out, grad_weights, out, lse, weights);
  const DeviceScope device(values);
  const Pool pool(sizes, values, mask, cu_seqlens, device.stream());
  const Gradients gradients = backward(
      pool, std::nullopt, scores, 1.0, {grad_out, grad_weights, out, lse, weights}, need_grad_values, need_grad_scores);
  return {gradients.tokens, gradients.other};
}

}  // namespace
}  // namespace fusefeat::cuda

STABLE_TORCH_LIBRARY_IMPL(fusefeat, FUSEFEAT_DEVICE_KEY, m) {
  m.impl("attention_pool", TORCH_BOX(&fusefeat::cuda::attention_pool));
  m.impl("attention_pool_backward", TORCH_BOX(&fusefeat::cuda::attention_pool_backward));
  m.impl("softmax_pool", TORCH_BOX(&fusefeat::cuda::softmax_pool));
  m.impl("softmax_pool_backward", TORCH_BOX(&fusefeat::cuda::softmax_pool_backward));
}
