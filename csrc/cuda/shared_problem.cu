// The inputs of a shared-logits operator as its kernels see them.
#include "shared_elements.cuh"
#include "shared_problem.h"

namespace fusefeat::cuda {

// Logits in scratch at one time; tests set less.
#ifndef FUSEFEAT_CHUNK_BYTES
#define FUSEFEAT_CHUNK_BYTES (32 << 20)
#endif

namespace {

// Rows are whole vectors of the type that the product takes, or floats.
bool is_fast(const Matrix& matrix, int64_t cols, Scalar type) {
  const int64_t size = matrix.type == Scalar::f32 ? 4 : 2, vector = type == Scalar::f32 ? 4 : 8;
  return (matrix.type == type || matrix.type == Scalar::f32) && matrix.col_stride == 1 && cols % vector == 0 &&
         matrix.row_stride * size % 16 == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
}

}  // namespace

Scalar scalar_of(ScalarType type) {
  if (type == ScalarType::Double) return Scalar::f64;
  if (type == ScalarType::BFloat16) return Scalar::bf16;
  if (type == ScalarType::Half) return Scalar::f16;
  return Scalar::f32;
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
      is_double(input.scalar_type() == ScalarType::Double),
      margin(margin),
      device_(input),
      input_(input),
      input_matrix_(matrix_of(input)),
      weight_matrix_(matrix_of(weight)),
      operand_(static_cast<int>(operand)),
      bias_(values(bias)),
      row_weight_(values(row_weight)) {
  std::vector<Matrix> operands{input_matrix_, weight_matrix_};
  if (context.has_value()) {
    context_matrix_ = matrix_of(*context);
    operands.push_back(context_matrix_);
  }
  const auto all = [&](auto predicate) { return std::all_of(operands.begin(), operands.end(), predicate); };
  const auto come_as = [&](Scalar type, int rounded) {
    return operand == rounded || (operand == 0 && all([&](const Matrix& m) { return m.type == type; }));
  };
  Scalar type = Scalar::f32;
  if (is_double) {
    products.compute = Compute::f64;
    return;
  }
  if (come_as(Scalar::bf16, 1)) {
    products.compute = Compute::bf16;
    type = Scalar::bf16;
  } else if (come_as(Scalar::f16, 2)) {
    products.compute = Compute::f16;
    type = Scalar::f16;
  }
  products.fast = all([&](const Matrix& m) { return is_fast(m, sizes.channels, type); });
}

RowMatrix SharedProblem::rows(int64_t begin, int64_t count) const {
  return {context_matrix_, input_matrix_, sizes.context_rows, begin, count, sizes.channels, row_weight(), operand_};
}

RowMatrix SharedProblem::weight() const {
  return {weight_matrix_, weight_matrix_, 0, 0, sizes.features, sizes.channels, nullptr, operand_};
}

LogitsArgs SharedProblem::logits(const Chunk& chunk, void* z, int64_t stride) const {
  LogitsArgs args;
  args.rows = rows(chunk.begin, chunk.rows);
  args.weight = weight();
  args.bias = pointer(bias_);
  args.margin = margin;
  args.z = z;
  args.stride = stride;
  return args;
}

int64_t SharedProblem::chunk_rows(int64_t kept_rows) const {
  constexpr int64_t most = 1 << 16, tile = 128;
  const int64_t bytes = kept_rows > 0 ? FUSEFEAT_CHUNK_BYTES / 2 : FUSEFEAT_CHUNK_BYTES;
  const int64_t rows = std::clamp<int64_t>(bytes / (stride() * acc_bytes()), 1, most);
  return std::min(rows >= tile ? rows / tile * tile : rows, sizes.rows());
}

Chunk SharedProblem::chunk(int64_t begin, int64_t kept_rows) const {
  const int64_t end = begin < kept_rows ? kept_rows : sizes.rows();
  return {begin, std::min(chunk_rows(kept_rows), end - begin), sizes.features};
}

OptionalTensor SharedProblem::values(const OptionalTensor& tensor) const {
  if (!tensor.has_value()) return tensor;
  if (tensor->scalar_type() == acc() && tensor->is_contiguous()) return tensor;
  const int64_t count = tensor->numel();
  const Tensor to = scratch(count);
  if (count == 0) return to;
  with_acc(*this, [&](auto zero) {
    using A = decltype(zero);
    LAUNCH(
        (gather_values<A>), blocks_for(count, kVectorThreads), kVectorThreads, 0, stream(), tensor->const_data_ptr(),
        scalar_of(tensor->scalar_type()), tensor->stride(0), count, static_cast<A*>(to.mutable_data_ptr()));
  });
  return to;
}

}  // namespace fusefeat::cuda
