// Products of two matrices by blocks of the result, each element summed in an order that the shapes alone decide.
#pragma once

#include "../attention_pool.h"
#include "row_blocks.h"

namespace fusefeat {
namespace {

using cpu::kProductBlock;
using cpu::ProductArgs;

// b's columns lie in memory one after the other, and so do a's rows.
template <typename A>
inline void multiply_columns(const ProductArgs& args, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const A *from[kProductBlock], *vectors[kProductBlock] = {};
  for (int64_t j = 0; j < round_up(columns, kRowStep); ++j) {
    from[j] = static_cast<const A*>(args.b) + (column + (j < columns ? j : columns - 1)) * args.b_column;
  }
  for (int64_t i = 0; i < rows; ++i) vectors[i] = static_cast<const A*>(args.a) + (row + i) * args.a_row;
  alignas(64) A products[kProductBlock * kProductBlock];
  dots<A, false>(RowList<A>{from, columns, 0}, vectors, nullptr, rows, args.depth, products, kProductBlock);
  for (int64_t i = 0; i < rows; ++i) {
    A* to = static_cast<A*>(args.out) + (row + i) * args.columns + column;
    for (int64_t j = 0; j < columns; ++j) to[j] = products[i * kProductBlock + j];
  }
}

template <typename A, int kRows, int kColumns, bool kPart>
inline void multiply_tile(const ProductArgs& args, int64_t row, int64_t column, int rest) {
  using V = VecOf<A>;
  constexpr int lanes = kLanes<A>;
  const A* a = static_cast<const A*>(args.a) + row * args.a_row;
  const A* b = static_cast<const A*>(args.b) + column;
  V sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) sum[r][c] = V{};
  }
  for (int64_t k = 0; k < args.depth; ++k, a += args.a_column, b += args.b_row) {
    V v[kColumns];
    for (int c = 0; c < kColumns; ++c) v[c] = kPart ? load_part(b, rest) : load(b + c * lanes);
    for (int r = 0; r < kRows; ++r) {
      const V factor = splat<A>(a[r * args.a_row]);
      for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(v[c], factor, sum[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      A* to = static_cast<A*>(args.out) + (row + r) * args.columns + column + c * lanes;
      if (kPart) {
        store_part(to, sum[r][c], rest);
      } else {
        store(to, sum[r][c]);
      }
    }
  }
}

// b's rows lie in memory one after the other; a is strided.
template <typename A, int kRows>
inline void multiply_rows(const ProductArgs& args, int64_t row, int64_t column, int64_t columns) {
  constexpr int lanes = kLanes<A>, wide = kManyRegisters || kRows == 1 ? 4 : 2;
  const int64_t end = column + columns;
  for (; column + wide * lanes <= end; column += wide * lanes)
    multiply_tile<A, kRows, wide, false>(args, row, column, 0);
  for (; column + lanes <= end; column += lanes) multiply_tile<A, kRows, 1, false>(args, row, column, 0);
  if (column < end) multiply_tile<A, kRows, 1, true>(args, row, column, static_cast<int>(end - column));
}

template <typename A>
void multiply(const ProductArgs& args, int64_t row, int64_t column) {
  const int64_t rows = args.rows - row < kProductBlock ? args.rows - row : kProductBlock;
  const int64_t columns = args.columns - column < kProductBlock ? args.columns - column : kProductBlock;
  const auto by_rows = [&](const ProductArgs& some, int64_t first) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) multiply_rows<A, 4>(some, row + r, first, columns);
    for (; r < rows; ++r) multiply_rows<A, 1>(some, row + r, first, columns);
  };
  if (args.b_column == 1) return by_rows(args, column);
  // Columns of a few numbers leave most lanes of their products empty.
  constexpr int64_t few = 64;
  if (args.depth > few) return multiply_columns<A>(args, row, rows, column, columns);
  alignas(64) A tile[few * kProductBlock];
  for (int64_t j = 0; j < columns; ++j) {
    const A* from = static_cast<const A*>(args.b) + (column + j) * args.b_column;
    for (int64_t k = 0; k < args.depth; ++k) tile[k * kProductBlock + j] = from[k * args.b_row];
  }
  ProductArgs turned = args;
  turned.b = tile;
  turned.b_row = kProductBlock;
  turned.b_column = 1;
  turned.out = static_cast<A*>(args.out) + column;
  by_rows(turned, 0);
}

}  // namespace
}  // namespace fusefeat
