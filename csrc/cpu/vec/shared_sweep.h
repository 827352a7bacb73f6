// Backward of all rows of a chunk in one sweep over the blocks of features: a block's gradient of the weight is summed
// over all these rows in registers and written once, and until then its memory may hold the block's logits.
#pragma once

#include "shared_backward.h"

namespace fusefeat {
namespace {

template <typename A, bool kPairs>
inline void write_weight_gradient(
    const SharedBackwardArgs& args, const GradientTiles<A, kPairs>& tiles, int64_t begin) {
  constexpr int strip = kStrip<A>, lanes = kLanes<A>, run = GradientTiles<A, kPairs>::run;
  const int64_t channels = args.logits.channels, depth = args.chunk.strips * run;
  for (int64_t c = 0; c < channels; c += strip) {
    const int columns = static_cast<int>(min_of(strip, channels - c));
    const A* rows = static_cast<const A*>(args.packed_rows) + c / strip * depth * strip;
    for_row_tiles(tiles.features, [&]<int kRows>(int64_t f) {
      VecOf<A> total[kRows][2], sum[kRows][2];
      clear_tile<A, kRows>(total);
      for (int64_t k = 0; k < depth; k += kSummed) {
        clear_tile<A, kRows>(sum);
        multiply_rows<A, kPairs, kRows, run>(
            tiles.by_row + k * tiles.features + f * run, tiles.features * run, run, rows + k * strip,
            min_of(kSummed, depth - k), sum, [](int64_t) {});
        for (int r = 0; r < kRows; ++r) {
          for (int j = 0; j < 2; ++j) total[r][j] += sum[r][j];
        }
      }
      with_type<A>(args.weight_type, args.grad_weight, (begin + f) * channels + c, [&](auto* to) {
        for (int r = 0; r < kRows; ++r, to += channels) {
          for (int j = 0; j * lanes < columns; ++j) {
            const int left = columns - j * lanes;
            if (left >= lanes) {
              store(to + j * lanes, total[r][j]);
            } else {
              store_part(to + j * lanes, total[r][j], left);
            }
          }
        }
      });
    });
  }
}

template <typename A, bool kPairs>
void sweep_task(const SharedBackwardArgs& args, int64_t part, void* scratch) {
  constexpr int strip = kStrip<A>;
  const Logits& logits = args.logits;
  const int64_t group_strips = logits.group / strip, strips = args.chunk.strips;
  const int64_t blocks = blocks_of(logits.features, logits.block);
  const int64_t first_block = blocks * part / args.parts, end_block = blocks * (part + 1) / args.parts;
  const bool with_rows = args.grad_context != nullptr || args.grad_input != nullptr;
  const int64_t first_computed = blocks_of(args.tile_end, strip);
  A* weights = static_cast<A*>(scratch);
  A* bias_sums = weights + packed_weight_length<A, kPairs>(logits);
  A* staging = bias_sums + logits.block * kLanes<A>;
  A* dz = staging + 2 * logits.block * strip;
  A* by_feature = dz + (logits.block + 1) * strip;
  A* weights_by_row = by_feature + strips * (logits.block + 1) * strip;
  A* by_row = kPairs ? by_feature + strips * ((logits.block + 1) / 2) * strip : by_feature;
  for (int64_t b = first_block; b < end_block; ++b) {
    const int64_t begin = b * logits.block, features = min_of(logits.block, logits.features - begin);
    const GradientTiles<A, kPairs> tiles{by_feature, by_row, features};
    const WeightBlock<A, kPairs> weight_block(logits, begin, features, 0, logits.channels, weights_by_row);
    if (with_rows) {
      const RowRange rows{&logits, true, begin, features};
      pack_along_rows<A, kPairs>(rows, features, 0, logits.channels, tiles.feature_pairs() * strip, weights);
    }
    for (int64_t i = 0; i < features * kLanes<A>; i += kLanes<A>) store(bias_sums + i, VecOf<A>{});
    for (int64_t first = 0; first < strips; first += group_strips) {
      const int64_t end = min_of(first + group_strips, strips);
      for (int64_t s = first; s < end; ++s) {
        A* to = kPairs ? dz : tiles.strip_by_row(s);
        if (s * strip < args.tile_end) {
          logit_gradient<A>(args, s, begin, features, staging, to);
        } else {
          compute_strip<A, kPairs>(args, weight_block, s, s == first_computed, staging);
          gradient_from_logits<A>(args, s, begin, features, Tile<A>{staging, strip}, nullptr, to);
        }
        clear_lanes<A>(to, features, rows_of_strip<A>(args.chunk, s));
        if (args.grad_bias != nullptr) add_to_bias<A>(to, features, bias_sums);
        tiles.put(s, to);
      }
      if (!with_rows) continue;
      const GradientTiles<A, kPairs> group{tiles.strip_by_feature(first), tiles.strip_by_row(first), features};
      const int64_t next = begin + features, last = b + 1 < end_block && end == strips ? next + logits.block : next;
      const Ahead ahead(logits.weight, next, min_of(last, logits.features), 0, logits.channels);
      add_row_gradients<A, kPairs>(args, group, weights, part, first, end, b == first_block, ahead);
    }
    for (int64_t f = 0; args.grad_bias != nullptr && f < features; ++f) {
      static_cast<A*>(args.grad_bias)[begin + f] = sum_lanes(load(bias_sums + f * kLanes<A>));
    }
    write_weight_gradient<A, kPairs>(args, tiles, begin);
  }
}

}  // namespace
}  // namespace fusefeat
