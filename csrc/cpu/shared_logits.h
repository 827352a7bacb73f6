// What the torch side of the shared-logits operators tells the vector kernels, and the table of these kernels.
// Plain data only: the kernels are compiled once per instruction set and see no torch or std code.
//
// Rows are processed in strips as wide as two vectors, one lane per row, and features in blocks. A chunk is
// the rows whose logits are in scratch at one time. "acc" is the accumulation type.
#pragma once

#include <stdint.h>

namespace fusefeat::cpu {

enum class Scalar : int { f32, f64, bf16, f16 };

struct Matrix {
  const void* data;
  int64_t row_stride, col_stride;
  Scalar type;
};

struct Logits {
  Matrix context, input, weight;
  int64_t context_rows;
  const int64_t* used;  // which rows of (context | input) take part; null: all of them
  int64_t rows, features, channels;
  const void* bias;  // acc [features], or null
  double margin;
  int operand;          // as in the schema
  int64_t block;        // features per block
  int64_t group;        // rows per group: the rows of one task at most
  int64_t depth_block;  // channels that are multiplied at a time for logits
  int64_t grad_depth;   // and for gradients, unless a task sees all of them
};

struct Chunk {
  int64_t begin, rows, strips;
};

struct SharedForwardArgs {
  Logits logits;
  Chunk chunk;
  int64_t depth_begin, depth_end;
  // One task sees all features and channels of its rows: it packs them and finishes what is wanted of them.
  bool whole;
  void* packed;  // the chunk's rows, channels [depth_begin, depth_end), transposed
  // [strips][features][strip]; null: only clamp statistics are wanted. In acc partial sums, then exponentials; in
  // float16 the logits, but for those of kept rows.
  void* tile;
  Scalar tile_type;
  // Per feature block and lane of the chunk.
  void* peak;
  void* sum;
  void* dot;
  void* excess;      // or null
  int32_t* fired;    // [groups of the chunk][features], or null
  void* prob_sums;   // acc [groups of the chunk][features], where tasks see whole rows
  void* kept;        // logits of the first rows, in strips that are 128 bytes wide in acc: [rows / 32][features][32]
  Scalar kept_type;  // acc; f16: all logits are rounded to it first
  int64_t kept_rows;
  // acc [rows], padded to whole strips
  const void* row_weight;
  void* row_entropy;
  void* row_lse;
  void* row_excess;
  void* prob_sum;      // acc [features]
  int64_t* fired_sum;  // [features]
  void* matrix;        // [rows, features] contiguous, of the matrix-valued operators
  Scalar matrix_type;
};

enum class Gradient : int { penalty, clamp, assignment, activation };

struct SharedBackwardArgs {
  Logits logits;
  Chunk chunk;
  Gradient kind;
  int64_t depth_begin, depth_end;
  bool whole;       // as in the forward
  bool has_logits;  // kept ones, or the matrices
  // One sweep over the blocks of features finishes the gradients of all rows of the chunk. Their logits are kept for
  // the first kept_end rows, then on loan up to loan_end, then in `tile`, and from tile_end on computed once more.
  bool sweep;
  int64_t kept_end, loan_end, tile_end;
  void* loan;              // where grad_weight is yet to come: a block's logits lie where its gradient will
  int64_t loan_row_bytes;  // per feature
  void* packed;            // as in the forward
  void* packed_rows;       // [channels / strip][rows of the chunk][strip]
  void* tile;              // logits of the chunk in whole strips, unless kept
  Scalar tile_type;        // acc, or as those kept when all channels are multiplied at a time
  const void* kept;        // logits of the first kept_rows rows as the forward left them; null: in tile
  Scalar kept_type;        // acc; f16: all logits are rounded to it, as in the forward
  int64_t kept_rows;
  void* dots;                 // three sums per feature block and lane, over the probabilities; or null
  const void* grad_prob_sum;  // acc [features], or null
  // acc [rows], padded to whole strips: dz = P (log_scale log P + offset + prob_scale grad_prob_sum) + excess_grad
  // where z > margin. Given dots, row_mean holds the gradient of lse, and then what is taken off each term: their mean
  // over P less that gradient.
  const void* row_lse;
  const void* row_log_scale;
  const void* row_offset;
  const void* row_prob_scale;
  const void* row_excess_grad;  // or null
  void* row_mean;               // null without dots
  void* row_dot;                // sum of P grad_prob_sum
  Matrix grad;                  // of the matrix-valued operators
  Matrix assignment;            // of shared_assignment
  // Partition of the gradient phase: `parts` ranges of feature blocks times `sums` ranges of groups.
  int64_t parts, sums;
  void* grad_rows;    // [parts][channels of the depth block / strip][rows of the chunk][strip] in acc, or null
  void* grad_weight;  // [sums][features][channels] in acc, or null; of a sweep, in weight_type
  Scalar weight_type;
  void* grad_bias;                  // [sums][features] in acc, or null
  void *grad_context, *grad_input;  // contiguous, or null: rows whose gradient nobody wants
  Scalar row_type;
};

struct SharedKernels {
  int64_t strip;        // rows
  int64_t pack_factor;  // operands per packed element: 2 for pairs of bfloat16
  int64_t accumulator_bytes;
  // Bytes of scratch that one worker needs in any of the tasks, of a sweep over so many rows (0: none), too.
  int64_t (*worker_bytes)(const Logits&, int64_t sweep_rows);
  void (*pack_transposed)(const Logits&, const Chunk&, int64_t strip, int64_t begin, int64_t end, void* to);
  void (*pack_rows)(const Logits&, const Chunk&, int64_t strip, int64_t begin, int64_t end, void* to);
  void (*forward_task)(const SharedForwardArgs&, int64_t block, int64_t group, void* scratch);
  void (*combine_strip)(const SharedForwardArgs&, int64_t strip);
  void (*column_sums)(const SharedForwardArgs&, int64_t begin, int64_t end);
  void (*write_assignment)(const SharedForwardArgs&, int64_t block, int64_t group, void* scratch);
  void (*logits_task)(const SharedBackwardArgs&, int64_t block, int64_t group, void* scratch);
  void (*dots_task)(const SharedBackwardArgs&, int64_t block, int64_t group, void* scratch);
  void (*combine_dots)(const SharedBackwardArgs&, int64_t strip);
  void (*gradient_task)(const SharedBackwardArgs&, int64_t part, int64_t sum, void* scratch);
  void (*sweep_task)(const SharedBackwardArgs&, int64_t part, void* scratch);
  void (*write_rows)(const SharedBackwardArgs&, int64_t strip);  // sums their parts
  // Sums `count` arrays that lie `stride` apart over [0, length).
  void (*write_sums)(const void* from, int64_t count, int64_t stride, int64_t length, void* to, Scalar type);
};

// pairs: operands are bfloat16, multiplied two at a time; only where the machine can.
const SharedKernels* shared_kernels_generic(bool is_double);
const SharedKernels* shared_kernels_avx2(bool is_double);
const SharedKernels* shared_kernels_avx512(bool is_double);
const SharedKernels* shared_kernels_avx512_bf16();

}  // namespace fusefeat::cpu
