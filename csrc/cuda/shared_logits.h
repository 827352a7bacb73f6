// What the torch side of the shared-logits operators tells the kernels: plain data, no torch.
//
// "acc" is the accumulation type: double for double, float for all else. A chunk is the rows whose logits are in
// scratch at one time. Rows of weight 0 are not read: they count as zeros, and everything of theirs is 0.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace fusefeat::cuda {

enum class Scalar : int { f32, f64, bf16, f16 };

struct Matrix {
  const void* data = nullptr;
  int64_t row_stride = 0, col_stride = 1;
  Scalar type = Scalar::f32;
};

// An operand of a product: rows [first, first + rows) of head (up to row `split`) over tail.
struct RowMatrix {
  Matrix head, tail;
  int64_t split = 0;
  int64_t first = 0, rows = 0, cols = 0;
  const void* row_weight = nullptr;  // acc, of all rows of head and tail; null: every row is read
  int operand = 0;                   // as in the schema
};

// How products are computed. Half types keep their own type in the logits' product; the gradients' products take
// float16 as tf32, which holds it exactly and has the range that gradients of logits need.
enum class Compute : int { f32, f64, bf16, f16 };

struct Products {
  Compute compute = Compute::f32;
  bool fast = false;  // rows of context, input and weight are whole 16-byte vectors, in types that the product takes
};

struct Chunk {
  int64_t begin = 0, rows = 0, features = 0;
};

// Which formula gives the gradient of the logits.
enum class Gradient : int { penalty, clamp, assignment, activation };

struct LogitsArgs {
  RowMatrix rows, weight;
  const void* bias = nullptr;  // acc [F], or null
  double margin = 1;
  // acc [rows][stride], or null when the clamped logits go to the matrix [rows, F] at once.
  void* z = nullptr;
  int64_t stride = 0;
  void* matrix = nullptr;
  Scalar matrix_type = Scalar::f32;
};

// Sums over parts of a product's depth, [parts][rows][columns] in acc, added up in order afterwards.
struct Parts {
  int64_t count = 1;
  int64_t depth = 0;     // of one part
  void* sums = nullptr;  // null with one part
};

struct RowGradientArgs {
  RowMatrix dz, weight;
  void *context = nullptr, *input = nullptr;  // contiguous, or null
  Scalar context_type = Scalar::f32, input_type = Scalar::f32;
  int64_t context_rows = 0, first = 0;  // row 0 of dz is row `first` of (context | input)
  const void* row_weight = nullptr;
  Parts parts;
};

// An array that is summed over chunks in acc and stored in its own type with the last one.
struct RunningSum {
  void *sum = nullptr, *out = nullptr;
  Scalar type = Scalar::f32;
  bool first = true, last = true;
};

struct WeightGradientArgs {
  RowMatrix dz, rows;
  RunningSum out;  // [F, D]
  Parts parts;
};

// Parts of the depth that fill the chip, in at most `bytes` of sums.
Parts plan_parts(Products products, int64_t rows, int64_t columns, int64_t depth, int64_t bytes);

void launch_logits(Products products, const LogitsArgs& args, cudaStream_t stream);
void launch_row_gradient(Products products, const RowGradientArgs& args, cudaStream_t stream);
void launch_weight_gradient(Products products, const WeightGradientArgs& args, cudaStream_t stream);

}  // namespace fusefeat::cuda
