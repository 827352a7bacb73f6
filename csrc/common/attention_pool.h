// What the CPU and CUDA launchers of both pools share: argument checks, sizes and addressing.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "poison.h"

namespace fusefeat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType acc_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Padded tokens are [bags, tokens, channels]; packed ones are [tokens, channels] with a bag stride
// of 0 and token indices that run through all bags. Strides count elements.
struct TokenStrides {
  int64_t bag = 0, token = 0, inner = 0;
};

struct PoolSizes {
  int64_t bags = 0;
  int64_t tokens = 0;  // per bag when padded, of all bags when packed
  int64_t channels = 0;
  int64_t queries = 1;
  bool packed = false;
  bool query_axis = false;  // results carry a [queries] axis

  int64_t all_tokens() const { return packed ? tokens : bags * tokens; }

  std::vector<int64_t> per_bag(bool with_channels) const {
    std::vector<int64_t> shape{bags};
    if (query_axis) shape.push_back(queries);
    if (with_channels) shape.push_back(channels);
    return shape;
  }

  std::vector<int64_t> per_token() const {
    std::vector<int64_t> shape;
    if (!packed) shape.push_back(bags);
    shape.push_back(tokens);
    if (query_axis) shape.push_back(queries);
    return shape;
  }
};

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double;
}

inline void check_same_device(const Tensor& x, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(other.device() == x.device(), "fusefeat: ", name, " must be on the device of the first argument");
}

inline void check_shape(const Tensor& tensor, const std::vector<int64_t>& want, const char* name) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == want.size();
  for (size_t i = 0; same && i < want.size(); ++i) same = sizes[i] == want[i];
  STD_TORCH_CHECK(same, "fusefeat: ", name, " has the wrong shape");
}

// Strides of a [B,T,...] or packed [S,...] tensor whose last axis may be absent.
inline TokenStrides token_strides(const Tensor& tensor, const PoolSizes& sizes, bool has_inner) {
  const int64_t token_axis = sizes.packed ? 0 : 1;
  return {
      sizes.packed ? 0 : tensor.stride(0), tensor.stride(token_axis), has_inner ? tensor.stride(token_axis + 1) : 0};
}

// Checks x, mask and cu_seqlens and fills all sizes but those of the queries.
inline PoolSizes pool_sizes(
    const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
  PoolSizes sizes;
  sizes.packed = cu_seqlens.has_value();
  STD_TORCH_CHECK(is_floating(x.scalar_type()), "fusefeat: the pooled tensor must be floating point");
  STD_TORCH_CHECK(
      x.dim() == (sizes.packed ? 2 : 3), "fusefeat: the pooled tensor must be [B,T,D], or [S,D] with cu_seqlens");
  sizes.channels = x.size(x.dim() - 1);
  if (sizes.packed) {
    STD_TORCH_CHECK(!mask.has_value(), "fusefeat: mask is not allowed with cu_seqlens");
    const auto type = cu_seqlens->scalar_type();
    STD_TORCH_CHECK(
        (type == ScalarType::Int || type == ScalarType::Long) && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
        "fusefeat: cu_seqlens must be [B+1] int32 or int64");
    check_same_device(x, *cu_seqlens, "cu_seqlens");
    sizes.bags = cu_seqlens->size(0) - 1;
    sizes.tokens = x.size(0);
  } else {
    sizes.bags = x.size(0);
    sizes.tokens = x.size(1);
    if (mask.has_value()) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "fusefeat: mask must be bool");
      check_shape(*mask, {sizes.bags, sizes.tokens}, "mask");
      check_same_device(x, *mask, "mask");
    }
  }
  return sizes;
}

inline void check_score_type(const Tensor& x, const Tensor& other, const char* name) {
  const auto type = other.scalar_type();
  STD_TORCH_CHECK(
      type == x.scalar_type() || type == acc_type(x.scalar_type()), "fusefeat: ", name,
      " must have the dtype of the pooled tensor or its accumulation type");
  check_same_device(x, other, name);
}

inline PoolSizes attention_pool_sizes(
    const Tensor& x, const Tensor& query, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) {
  PoolSizes sizes = pool_sizes(x, mask, cu_seqlens);
  STD_TORCH_CHECK(
      (query.dim() == 1 || query.dim() == 2) && query.size(query.dim() - 1) == sizes.channels,
      "fusefeat: query must be [D] or [K,D]");
  check_score_type(x, query, "query");
  sizes.query_axis = query.dim() == 2;
  sizes.queries = sizes.query_axis ? query.size(0) : 1;
  return sizes;
}

inline PoolSizes softmax_pool_sizes(
    const Tensor& values, const Tensor& scores, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens) {
  PoolSizes sizes = pool_sizes(values, mask, cu_seqlens);
  sizes.query_axis = scores.dim() == values.dim();
  sizes.queries = sizes.query_axis ? scores.size(scores.dim() - 1) : 1;
  check_shape(scores, sizes.per_token(), "scores");
  check_score_type(values, scores, "scores");
  return sizes;
}

// The tensors a backward gets from its forward, and the gradients that come in.
inline void check_backward(
    const Tensor& x, const PoolSizes& sizes, const Tensor& grad_out, const std::optional<Tensor>& grad_weights,
    const Tensor& out, const Tensor& lse, const Tensor& weights) {
  const auto acc = acc_type(x.scalar_type());
  const auto check = [&](const Tensor& tensor, const std::vector<int64_t>& shape, const char* name) {
    const bool is_lse = &tensor == &lse;
    STD_TORCH_CHECK(
        tensor.scalar_type() == (is_lse ? ScalarType::Double : acc), "fusefeat: ", name, " must be ",
        is_lse ? "float64" : "in the accumulation type");
    check_same_device(x, tensor, name);
    check_shape(tensor, shape, name);
  };
  check(grad_out, sizes.per_bag(true), "grad_out");
  check(out, sizes.per_bag(true), "out");
  check(lse, sizes.per_bag(false), "lse");
  if (grad_weights.has_value()) {
    check(*grad_weights, sizes.per_token(), "grad_weights");
    check(weights, sizes.per_token(), "weights");
  }
}

// Contiguous, on the device of `like`. Not by torch::stable::new_empty, which looks an operator up by its name: that
// takes longer than a small kernel.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    step *= shape[i] > 1 ? shape[i] : 1;
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type, device_index, &handle));
  Tensor tensor(handle);
  poison(tensor);
  return tensor;
}

}  // namespace fusefeat
