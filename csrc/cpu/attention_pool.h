// What the torch side of the CPU pools tells the vector kernels, and the table of these kernels.
// Plain data only: the kernels are compiled once per instruction set and see no torch or std code.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fusefeat::cpu {

enum class TokenType { f32, f64, bf16, f16 };

// Elements to the next bag, token (or query, in per-bag tensors) and innermost index.
struct Strides {
  int64_t bag, token, inner;
};

// One unit of work: whole bags, or (part >= 0) the tokens [token_begin, token_end) of one long bag.
struct PoolItem {
  int64_t bag_begin, bag_end;
  int64_t token_begin, token_end;
  int64_t part;
  int64_t split;
};

// A bag that is computed in parts, whose results are combined in the order of the parts.
struct SplitBag {
  int64_t bag, part_begin, part_end;
};

// "acc" below is the accumulation type of the tokens. Pointers to tensors of per-bag or per-token
// results have no strides: these are contiguous, [bags, queries(, channels)] and [tokens..., queries].
struct PoolArgs {
  int64_t bags = 0, tokens = 0, channels = 0, queries = 0;
  bool packed = false;
  const void* x = nullptr;
  Strides x_strides = {};
  const uint8_t* mask = nullptr;  // or null
  int64_t mask_bag = 0, mask_token = 0;
  const void* offsets = nullptr;  // cu_seqlens, or null
  bool offsets_are_64_bit = false;
  int64_t offsets_stride = 0;
  const void* query = nullptr;  // attention_pool: [queries, channels], contiguous, acc; else null
  double scale = 1;
  const void* scores = nullptr;  // softmax_pool, in x's type or in acc; else null
  bool scores_are_acc = false;
  Strides scores_strides = {};
  // The query or the scores have the token type, and so have their gradients: weights may be rounded to it too.
  bool rounds_to_tokens = false;
};

struct ForwardArgs : PoolArgs {
  void* out = nullptr;
  double* lse = nullptr;
  void* weights = nullptr;  // or null
  // Per part: running maximum, sum and unnormalised result; per split bag: the combined maximum and sum.
  void* part_peak = nullptr;
  void* part_sum = nullptr;
  void* part_out = nullptr;
  void* split_peak = nullptr;
  void* split_sum = nullptr;
};

struct BackwardArgs : PoolArgs {
  const void* grad_out = nullptr;  // acc
  Strides grad_out_strides = {};
  const void* grad_weights = nullptr;  // acc, or null
  Strides grad_weights_strides = {};
  const void* out = nullptr;
  const double* lse = nullptr;
  const void* weights = nullptr;
  void* grad_x = nullptr;  // or null
  bool stream_grad_x = false;
  void* grad_scores = nullptr;       // in the scores' type, or null
  void* grad_query_parts = nullptr;  // [items, queries, channels] in acc, or null
  void* part_weight_dots = nullptr;  // per part: sum over its tokens of weight times grad_weight
  void* split_weight_dots = nullptr;
};

constexpr int64_t kProductBlock = 64;  // rows and columns of a product that are one piece of work

// out = a b, [rows, depth] times [depth, columns], in acc. Either b's rows lie in memory one after the other, or its
// columns and a's rows do.
struct ProductArgs {
  const void *a, *b;
  void* out;
  int64_t rows, depth, columns;
  int64_t a_row, a_column, b_row, b_column;
};

struct PoolKernels {
  // `rows` x `count` elements of the token type to contiguous acc.
  void (*to_acc)(const void* from, int64_t row_stride, int64_t stride, int64_t rows, int64_t count, void* to);
  size_t (*forward_scratch)(const ForwardArgs&);
  void (*forward_item)(const ForwardArgs&, const PoolItem&, void* scratch);
  // Channels [begin, end) of one query of a split bag.
  void (*combine)(const ForwardArgs&, const SplitBag*, int64_t split, int64_t query, int64_t begin, int64_t end);
  void (*normalise_part)(const ForwardArgs&, const PoolItem&, void* scratch);
  size_t (*backward_scratch)(const BackwardArgs&);
  void (*weight_dots_part)(const BackwardArgs&, const PoolItem&);
  void (*weight_dots_sum)(const BackwardArgs&, const SplitBag*, int64_t split);
  void (*backward_item)(const BackwardArgs&, const PoolItem&, int64_t item, void* scratch);
  // Sums elements [begin, end) of grad_query_parts over `items` and stores them in x's type or in acc.
  void (*sum_query)(
      const void* parts, int64_t items, int64_t length, int64_t begin, int64_t end, bool to_acc, void* grad_query);
  // The block of a product that begins at a row and a column.
  void (*multiply)(const ProductArgs&, int64_t row, int64_t column);
};

const PoolKernels* pool_kernels_generic(TokenType type);
const PoolKernels* pool_kernels_avx2(TokenType type);
const PoolKernels* pool_kernels_avx512(TokenType type);
const PoolKernels* pool_kernels_avx512_bf16(TokenType type);  // of bf16 alone

}  // namespace fusefeat::cpu
