// The inputs of a shared-logits operator as its kernels see them.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "isa.h"
#include "shared_phases.h"

namespace fusefeat::cpu {

namespace {

const SharedKernels* kernels_for(bool is_double, bool pairs) {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      if (pairs && __builtin_cpu_supports("avx512bf16")) return shared_kernels_avx512_bf16();
      return shared_kernels_avx512(is_double);
    case Isa::avx2:
      return shared_kernels_avx2(is_double);
#endif
    default:
      return shared_kernels_generic(is_double);
  }
}

// Calls f with a typed pointer to the data.
template <typename F>
void with_data(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return f(static_cast<double*>(tensor.data_ptr()));
    case ScalarType::BFloat16:
      return f(static_cast<c10::BFloat16*>(tensor.data_ptr()));
    case ScalarType::Half:
      return f(static_cast<c10::Half*>(tensor.data_ptr()));
    default:
      return f(static_cast<float*>(tensor.data_ptr()));
  }
}

template <typename A>
void gather_values(
    const OptionalTensor& tensor, const int64_t* used, int64_t rows, int64_t padded, double otherwise, double scale,
    A* to) {
  if (tensor.has_value()) {
    const int64_t stride = tensor->stride(0);
    with_data(*tensor, [&](const auto* from) {
      for (int64_t i = 0; i < rows; ++i) {
        to[i] = static_cast<A>(scale) * static_cast<A>(from[(used == nullptr ? i : used[i]) * stride]);
      }
    });
  } else {
    std::fill_n(to, rows, static_cast<A>(scale * otherwise));
  }
  std::fill(to + rows, to + padded, A{});
}

template <typename A>
void scatter_values(const A* from, const int64_t* used, int64_t rows, const Tensor& to) {
  with_data(to, [&](auto* out) {
    using T = std::remove_reference_t<decltype(*out)>;
    if (used != nullptr) std::fill_n(out, to.numel(), T(0));
    for (int64_t i = 0; i < rows; ++i) out[used == nullptr ? i : used[i]] = static_cast<T>(from[i]);
  });
}

}  // namespace

Scalar scalar_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Scalar::f64;
    case ScalarType::BFloat16:
      return Scalar::bf16;
    case ScalarType::Half:
      return Scalar::f16;
    default:
      return Scalar::f32;
  }
}

Matrix matrix_of(const Tensor& tensor) {
  Matrix matrix{tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), scalar_of(tensor.scalar_type())};
  if (tensor.size(1) <= 1) matrix.col_stride = 1;
  return matrix;
}

SharedProblem::SharedProblem(
    const OptionalTensor& context, const Tensor& input, const Tensor& weight, const OptionalTensor& bias, double margin,
    const OptionalTensor& row_weight, int64_t operand)
    : sizes(shared_sizes(context, input, weight, bias, margin, row_weight, operand)),
      is_double(input.scalar_type() == ScalarType::Double) {
  const auto bfloat16 = [&](const Tensor& tensor) {
    return operand == 1 || (operand == 0 && tensor.scalar_type() == ScalarType::BFloat16);
  };
  const bool pairs = !is_double && bfloat16(input) && bfloat16(weight) && (!context.has_value() || bfloat16(*context));
  kernels = kernels_for(is_double, pairs);
  logits.input = matrix_of(input);
  if (context.has_value()) logits.context = matrix_of(*context);
  logits.context_rows = sizes.context_rows;
  logits.weight = matrix_of(weight);
  logits.rows = sizes.rows();
  logits.features = sizes.features;
  logits.channels = sizes.channels;
  logits.margin = margin;
  logits.operand = static_cast<int>(operand);
  if (bias.has_value()) {
    bias_ = feature_values(*bias);
    logits.bias = bias_.get();
  }
  if (row_weight.has_value()) {
    const int64_t stride = row_weight->stride(0), rows = logits.rows;
    used_.reserve(static_cast<size_t>(rows));  // so that data() is not null when no row takes part
    with_data(*row_weight, [&](const auto* values) {
      for (int64_t i = 0; i < rows; ++i) {
        if (static_cast<double>(values[i * stride]) != 0) used_.push_back(i);
      }
    });
    logits.rows = static_cast<int64_t>(used_.size());
    if (logits.rows < rows) logits.used = used_.data();
  }
  // A product that goes on with the next channels reads its tile again. Gradients have more arrays to keep in cache.
  constexpr int64_t block = 128, depth_block = 1024, grad_depth = 512;
  logits.block = std::min(block, (logits.features + 1) / 2 * 2);
  logits.group = 256;
  logits.depth_block = std::clamp<int64_t>(logits.channels, 1, depth_block);
  logits.grad_depth = std::min(logits.depth_block, grad_depth);
}

int64_t SharedProblem::kept_rows(int64_t keep_rows) const {
  if (keep_rows >= logits.rows) return logits.rows;
  return keep_rows / 32 * 32;
}

Buffer SharedProblem::gather(const OptionalTensor& tensor, double otherwise, double scale) const {
  Buffer buffer(std::max<int64_t>(1, padded_rows()) * acc_bytes());
  const auto fill = [&](auto* to) {
    gather_values(tensor, logits.used, logits.rows, padded_rows(), otherwise, scale, to);
  };
  if (is_double) {
    fill(reinterpret_cast<double*>(buffer.get()));
  } else {
    fill(reinterpret_cast<float*>(buffer.get()));
  }
  return buffer;
}

void SharedProblem::scatter(const Buffer& from, const Tensor& to) const {
  if (is_double) {
    scatter_values(reinterpret_cast<const double*>(from.get()), logits.used, logits.rows, to);
  } else {
    scatter_values(reinterpret_cast<const float*>(from.get()), logits.used, logits.rows, to);
  }
}

Buffer SharedProblem::feature_values(const Tensor& tensor) const {
  Buffer buffer(std::max<int64_t>(1, tensor.numel()) * acc_bytes());
  const auto fill = [&](auto* to) { gather_values(tensor, nullptr, tensor.numel(), tensor.numel(), 0, 1, to); };
  if (is_double) {
    fill(reinterpret_cast<double*>(buffer.get()));
  } else {
    fill(reinterpret_cast<float*>(buffer.get()));
  }
  return buffer;
}

}  // namespace fusefeat::cpu
