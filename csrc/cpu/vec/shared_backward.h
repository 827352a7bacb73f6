// Backward: the gradient of a block of logits for a group of rows, and from it, while it is in cache, its share of
// the gradients of rows, weight and bias.
#pragma once

#include "logits.h"

namespace fusefeat {
namespace {

using cpu::Gradient;
using cpu::SharedBackwardArgs;

// Two vectors of per-row values of one strip; zeros without an array.
template <typename A>
struct Lanes {
  VecOf<A> v[2];

  Lanes(const void* array, int64_t row) {
    for (int j = 0; j < 2; ++j) {
      v[j] = array == nullptr ? VecOf<A>{} : load(static_cast<const A*>(array) + row + j * kLanes<A>);
    }
  }
};

// A tile of logits (or of probabilities) of one strip, rows of it `stride` apart.
template <typename T>
struct Tile {
  const T* data;
  int64_t stride;
};

// Calls body with the tile of logits. Kept rows that do not fill their strip are copied to `scratch`.
template <typename A, typename Body>
inline void with_logits(
    const SharedBackwardArgs& args, int64_t strip, int64_t begin, int64_t features, A* scratch, const Body& body) {
  constexpr int width = kStrip<A>, lanes = kLanes<A>;
  if (args.kept == nullptr) {
    const A* tile = static_cast<const A*>(args.tile) + (strip * args.logits.features + begin) * width;
    return body(Tile<A>{tile, width});
  }
  const KeptStrip<A> at(args.logits.features, args.kept_rows, args.chunk.begin + strip * width, begin);
  const int64_t rows = rows_of_strip<A>(args.chunk, strip);
  with_kept<A>(args.kept_type, const_cast<void*>(args.kept), at.offset, [&]<typename T>(const T* kept) {
    if (rows == width) return body(Tile<T>{kept, at.width});
    for (int64_t f = 0; f < features; ++f) {
      for (int j = 0; j < 2; ++j) {
        const int64_t left = rows - j * lanes;
        const T* from = kept + f * at.width + j * lanes;
        const VecOf<A> v = left >= lanes ? load(from) : left > 0 ? load_part(from, static_cast<int>(left)) : VecOf<A>{};
        store(scratch + f * width + j * lanes, v);
      }
    }
    body(Tile<A>{scratch, width});
  });
}

template <typename A>
inline void matrix_block(
    const SharedBackwardArgs& args, const Matrix& matrix, int64_t strip, int64_t begin, int64_t features, A* tile) {
  const int64_t row = args.chunk.begin + strip * kStrip<A>;
  matrix_to_tile<A>(matrix, row, rows_of_strip<A>(args.chunk, strip), begin, features, tile);
}

// Where a block's sums of a strip begin; those of the next kind come after all blocks of this one.
template <typename A>
struct Dots {
  A *of_terms, *of_grads, *of_probs;

  Dots(const SharedBackwardArgs& args, int64_t block, int64_t strip) {
    const int64_t step = blocks_of(args.logits.features, args.logits.block) * args.chunk.strips * kStrip<A>;
    of_grads = static_cast<A*>(args.dots) + (block * args.chunk.strips + strip) * kStrip<A>;
    of_terms = of_grads + step;
    of_probs = of_terms + step;
  }
};

// Per lane: sums over the features of P t, P g and P, of logits, where dz = P (t - mean of t).
template <typename A, typename T>
inline void logits_dots(
    const SharedBackwardArgs& args, int64_t strip, int64_t begin, int64_t features, Tile<T> z, Dots<A> dots) {
  constexpr int lanes = kLanes<A>;
  const int64_t row = args.chunk.begin + strip * kStrip<A>;
  const Lanes<A> lse(args.row_lse, row), log_scale(args.row_log_scale, row), offset(args.row_offset, row);
  const Lanes<A> prob_scale(args.row_prob_scale, row);
  const A* grads = args.grad_prob_sum == nullptr ? nullptr : static_cast<const A*>(args.grad_prob_sum) + begin;
  VecOf<A> terms[2] = {}, products[2] = {}, probs[2] = {};
  for (int64_t f = 0; f < features; ++f) {
    const VecOf<A> g = grads == nullptr ? VecOf<A>{} : splat<A>(grads[f]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const VecOf<A> log_p = bounded_below<A>(load(z.data + f * z.stride + j * lanes) - lse.v[j]);
      const VecOf<A> p = exp_bounded<A>(log_p);
      const VecOf<A> t = fma(prob_scale.v[j], g, fma(log_scale.v[j], log_p, offset.v[j]));
      terms[j] += p == 0 ? VecOf<A>{} : p * t;
      products[j] += p == 0 ? VecOf<A>{} : p * g;
      probs[j] += p;
    }
  }
  for (int j = 0; j < 2; ++j) {
    store(dots.of_terms + j * lanes, terms[j]);
    store(dots.of_grads + j * lanes, products[j]);
    store(dots.of_probs + j * lanes, probs[j]);
  }
}

// sum_f P g of a given assignment and gradient matrix.
template <typename A>
inline void matrix_dots(
    const SharedBackwardArgs& args, int64_t strip, int64_t begin, int64_t features, A* scratch, A* dots) {
  constexpr int lanes = kLanes<A>;
  A* grads = scratch + features * kStrip<A>;
  matrix_block<A>(args, args.assignment, strip, begin, features, scratch);
  matrix_block<A>(args, args.grad, strip, begin, features, grads);
  for (int j = 0; j < 2; ++j) {
    VecOf<A> sum{};
    for (int64_t i = j * lanes; i < features * kStrip<A>; i += kStrip<A>) {
      const VecOf<A> p = load(scratch + i);
      sum += p == 0 ? VecOf<A>{} : p * load(grads + i);
    }
    store(dots + j * lanes, sum);
  }
}

// Logits of a block of features for a group of rows, into the chunk's tile.
template <typename A, bool kPairs>
void logits_task(const SharedBackwardArgs& args, int64_t block, int64_t group, void* scratch) {
  const Logits& logits = args.logits;
  const int64_t begin = block * logits.block, features = min_of(logits.block, logits.features - begin);
  const int64_t group_strips = logits.group / kStrip<A>;
  const bool last = args.depth_end == logits.channels;
  A* weights = static_cast<A*>(scratch);
  A* z = weights + packed_weight_length<A, kPairs>(logits);
  pack_by_rows<A, kPairs>(RowRange{&logits, true, begin, features}, args.depth_begin, args.depth_end, weights);
  const int64_t end = min_of((group + 1) * group_strips, args.chunk.strips);
  for (int64_t s = group * group_strips; s < end; ++s) {
    A* tile = static_cast<A*>(args.tile) + (s * logits.features + begin) * kStrip<A>;
    logits_tile<A, kPairs>(
        logits, weights, packed_strip<A, kPairs>(logits, args.packed, s),
        packed_depth<A, kPairs>(args.depth_end - args.depth_begin), begin, features,
        args.depth_begin == 0 ? nullptr : tile, last, z);
    // By way of a tile in cache: stores that miss hold up the products.
    for (int64_t i = 0; i < features * kStrip<A>; i += kLanes<A>) store(tile + i, load(z + i));
    if (last && args.dots != nullptr) {
      logits_dots<A>(args, s, begin, features, Tile<A>{z, kStrip<A>}, Dots<A>(args, block, s));
    }
  }
}

template <typename A, bool kPairs>
void dots_task(const SharedBackwardArgs& args, int64_t block, int64_t group, void* scratch) {
  const Logits& logits = args.logits;
  const int64_t begin = block * logits.block, features = min_of(logits.block, logits.features - begin);
  const int64_t group_strips = logits.group / kStrip<A>;
  const int64_t end = min_of((group + 1) * group_strips, args.chunk.strips);
  for (int64_t s = group * group_strips; s < end; ++s) {
    const Dots<A> to(args, block, s);
    if (args.kind == Gradient::assignment) {
      matrix_dots<A>(args, s, begin, features, static_cast<A*>(scratch), to.of_grads);
    } else {
      with_logits<A>(args, s, begin, features, static_cast<A*>(scratch), [&](auto z) {
        logits_dots<A>(args, s, begin, features, z, to);
      });
    }
  }
}

template <typename A, bool kPairs>
void combine_dots(const SharedBackwardArgs& args, int64_t strip) {
  const int64_t blocks = blocks_of(args.logits.features, args.logits.block), row = args.chunk.begin + strip * kStrip<A>;
  for (int j = 0; j < 2; ++j) {
    const int64_t at = row + j * kLanes<A>, lane = j * kLanes<A>;
    A* offset = static_cast<A*>(args.row_offset) + at;
    VecOf<A> dot{}, terms{}, probs{};
    for (int64_t b = 0; b < blocks; ++b) dot += load(Dots<A>(args, b, strip).of_grads + lane);
    store(static_cast<A*>(args.row_dot) + at, dot);
    if (args.kind == Gradient::assignment) {
      store(offset, -load(static_cast<const A*>(args.row_prob_scale) + at) * dot);
      continue;
    }
    // The mean over the very probabilities that it is taken off from, whose sum is 1 but for the rounding of lse:
    // what is left of that would tilt all gradients of a row the same way.
    for (int64_t b = 0; b < blocks; ++b) {
      terms += load(Dots<A>(args, b, strip).of_terms + lane);
      probs += load(Dots<A>(args, b, strip).of_probs + lane);
    }
    const VecOf<A> lse_grad = load(static_cast<const A*>(args.row_lse_grad) + at);
    store(offset, load(offset) - terms / probs + lse_grad);
  }
}

// The gradient of the logits times margin, of one strip, from given logits; `grads` for activation.
template <typename A, typename T>
inline void gradient_from_logits(
    const SharedBackwardArgs& args, int64_t strip, int64_t begin, int64_t features, Tile<T> z, const A* grads, A* to) {
  constexpr int lanes = kLanes<A>;
  const int64_t row = args.chunk.begin + strip * kStrip<A>;
  const A margin = static_cast<A>(args.logits.margin);
  if (args.kind == Gradient::activation) {
    for (int64_t f = 0; f < features; ++f) {
      for (int j = 0; j < 2; ++j) {
        const VecOf<A> g = margin * load(grads + f * kStrip<A> + j * lanes);
        store(to + f * kStrip<A> + j * lanes, load(z.data + f * z.stride + j * lanes) > margin ? g : VecOf<A>{});
      }
    }
    return;
  }
  const Lanes<A> excess(args.row_excess_grad, row);
  if (args.kind == Gradient::clamp) {
    for (int64_t f = 0; f < features; ++f) {
      for (int j = 0; j < 2; ++j) {
        const VecOf<A> v = load(z.data + f * z.stride + j * lanes);
        store(to + f * kStrip<A> + j * lanes, v > margin ? excess.v[j] : VecOf<A>{});
      }
    }
    return;
  }
  const Lanes<A> lse(args.row_lse, row), log_scale(args.row_log_scale, row), offset(args.row_offset, row);
  const Lanes<A> prob_scale(args.row_prob_scale, row);
  const A* prob_grads = args.grad_prob_sum == nullptr ? nullptr : static_cast<const A*>(args.grad_prob_sum) + begin;
  for (int64_t f = 0; f < features; ++f) {
    const VecOf<A> g = prob_grads == nullptr ? VecOf<A>{} : splat<A>(prob_grads[f]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const VecOf<A> v = load(z.data + f * z.stride + j * lanes);
      const VecOf<A> log_p = bounded_below<A>(v - lse.v[j]);
      const VecOf<A> p = exp_bounded<A>(log_p);
      const VecOf<A> t = fma(prob_scale.v[j], g, fma(log_scale.v[j], log_p, offset.v[j]));
      VecOf<A> d = p == 0 ? VecOf<A>{} : p * t;
      if (args.row_excess_grad != nullptr) d += v > margin ? excess.v[j] : VecOf<A>{};
      store(to + f * kStrip<A> + j * lanes, d);
    }
  }
}

// The same from whatever there is.
template <typename A>
inline void logit_gradient(
    const SharedBackwardArgs& args, int64_t strip, int64_t begin, int64_t features, A* scratch, A* to) {
  constexpr int lanes = kLanes<A>;
  A* grads = scratch + features * kStrip<A>;
  if (args.kind == Gradient::assignment || args.kind == Gradient::activation) {
    matrix_block<A>(args, args.grad, strip, begin, features, grads);
  }
  if (args.kind == Gradient::assignment) {
    matrix_block<A>(args, args.assignment, strip, begin, features, scratch);
    const int64_t row = args.chunk.begin + strip * kStrip<A>;
    const Lanes<A> offset(args.row_offset, row), scale(args.row_prob_scale, row);
    for (int64_t i = 0; i < features * kStrip<A>; i += kStrip<A>) {
      for (int j = 0; j < 2; ++j) {
        const VecOf<A> p = load(scratch + i + j * lanes);
        const VecOf<A> d = p * fma(scale.v[j], load(grads + i + j * lanes), offset.v[j]);
        store(to + i + j * lanes, p == 0 ? VecOf<A>{} : d);
      }
    }
    return;
  }
  with_logits<A>(args, strip, begin, features, scratch, [&](auto z) {
    gradient_from_logits<A>(args, strip, begin, features, z, grads, to);
  });
}

// The gradient tiles of a group: as operand of the rows' gradient (pairs along features) and of the weight's
// (pairs along rows); the same without pairs.
template <typename A, bool kPairs>
struct GradientTiles {
  static constexpr int run = kPairs ? kStrip<A> / 2 : kStrip<A>;
  A *by_feature, *by_row;
  int64_t features;

  int64_t feature_pairs() const { return kPairs ? (features + 1) / 2 : features; }
  A* strip_by_feature(int64_t s) const { return by_feature + s * feature_pairs() * kStrip<A>; }
  A* strip_by_row(int64_t s) const { return by_row + s * features * run; }

  void put(int64_t s, A* dz) const {
#if defined(FUSEFEAT_BF16)
    if constexpr (kPairs) {
      A *to_feature = strip_by_feature(s), *to_row = strip_by_row(s);
      if (features & 1) {
        for (int i = 0; i < kStrip<A>; ++i) dz[features * kStrip<A> + i] = 0;
      }
      for (int64_t f = 0; f < features; ++f) store(to_row + f * run, to_pairs(dz + f * kStrip<A>));
      for (int64_t f = 0; f < features; f += 2) {
        for (int j = 0; j < 2; ++j) {
          const float* a = dz + f * kStrip<A> + j * 16;
          const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(a + kStrip<A>), (__m512)load(a));
          const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
          const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
          store(to_feature + f / 2 * kStrip<A> + j * 16, (FloatVec)_mm512_or_si512(low, high));
        }
      }
    }
#else
    (void)s, (void)dz;
#endif
  }
};

// Where the gradient of a row of the chunk goes, from the depth block's first channel on; null: nobody wants it.
inline void* row_output(const SharedBackwardArgs& args, int64_t row, int64_t size) {
  const Logits& logits = args.logits;
  int64_t index = args.chunk.begin + row;
  if (logits.used != nullptr) index = logits.used[index];
  void* out = index < logits.context_rows ? args.grad_context : args.grad_input;
  if (index >= logits.context_rows) index -= logits.context_rows;
  return out == nullptr ? out : static_cast<char*>(out) + (index * logits.channels + args.depth_begin) * size;
}

template <typename A, typename Body>
inline void with_row_type(Scalar type, const Body& body) {
  with_type<A>(type, nullptr, 0, [&](auto* like) { body(like, static_cast<int64_t>(sizeof *like)); });
}

// Finished rows of a tile, `columns` channels from `channel` on.
template <typename A, int kRows>
inline void write_tile(
    const SharedBackwardArgs& args, int64_t row, int64_t channel, int columns, VecOf<A> (&sum)[kRows][2]) {
  with_row_type<A>(args.row_type, [&]<typename T>(const T*, int64_t size) {
    for (int r = 0; r < kRows; ++r) {
      T* to = static_cast<T*>(row_output(args, row + r, size));
      for (int j = 0; to != nullptr && j * kLanes<A> < columns; ++j) {
        const int left = columns - j * kLanes<A>;
        T* at = to + channel + j * kLanes<A>;
        if (left >= kLanes<A>) {
          store(at, sum[r][j]);
        } else {
          store_part(at, sum[r][j], left);
        }
      }
    }
  });
}

template <typename A, bool kPairs>
inline void add_row_gradients(
    const SharedBackwardArgs& args, const GradientTiles<A, kPairs>& tiles, const A* weights, int64_t part,
    int64_t begin_strip, int64_t end_strip, bool first) {
  constexpr int strip = kStrip<A>;
  const int64_t rows = args.chunk.strips * strip, depth = tiles.feature_pairs();
  const int64_t channel_strips = blocks_of(args.depth_end - args.depth_begin, strip);
  const Logits& logits = args.logits;
  for (int64_t c = 0; c < channel_strips; ++c) {
    for (int64_t s = begin_strip; s < end_strip; ++s) {
      const int64_t row = args.chunk.begin + s * strip, count = rows_of_strip<A>(args.chunk, s);
      const int64_t head = logits.used == nullptr ? row : logits.used[row];
      const int64_t tail = logits.used == nullptr ? row + count - 1 : logits.used[row + count - 1];
      const bool wanted =
          (args.grad_context != nullptr && head < logits.context_rows) || (args.grad_input != nullptr && tail >= logits.context_rows);
      if (!wanted) continue;
      const A* dz = tiles.strip_by_feature(s - begin_strip);
      A* to = static_cast<A*>(args.grad_rows) + ((part * channel_strips + c) * rows + s * strip) * strip;
      if (args.whole) {
        const int columns = static_cast<int>(min_of(strip, args.depth_end - args.depth_begin - c * strip));
        for_row_tiles(count, [&]<int kRows>(int64_t r) {
          VecOf<A> sum[kRows][2];
          clear_tile<A, kRows>(sum);
          multiply_columns<A, kPairs, kRows>(dz + r, weights + c * depth * strip, depth, sum);
          write_tile<A, kRows>(args, s * strip + r, c * strip, columns, sum);
        });
        continue;
      }
      for_row_tiles(count, [&]<int kRows>(int64_t r) {
        VecOf<A> sum[kRows][2];
        prefetch_tile<A, kRows>(to + r * strip, strip);
        clear_tile<A, kRows>(sum);
        multiply_columns<A, kPairs, kRows>(dz + r, weights + c * depth * strip, depth, sum);
        store_tile<A, kRows>(to + r * strip, strip, strip, !first, sum);
      });
    }
  }
}

template <typename A, bool kPairs>
inline void add_weight_gradient(
    const SharedBackwardArgs& args, const GradientTiles<A, kPairs>& tiles, int64_t begin, int64_t sum_index,
    int64_t begin_strip, int64_t end_strip, bool first) {
  constexpr int strip = kStrip<A>, run = GradientTiles<A, kPairs>::run;
  const Logits& logits = args.logits;
  const int64_t packed_rows = args.chunk.strips * run, depth = (end_strip - begin_strip) * run;
  A* sums = static_cast<A*>(args.grad_weight) + (sum_index * logits.features + begin) * logits.channels;
  for (int64_t c = args.depth_begin; c < args.depth_end; c += strip) {
    const int columns = static_cast<int>(min_of(strip, args.depth_end - c));
    const A* rows = static_cast<const A*>(args.packed_rows) +
                    ((c - args.depth_begin) / strip * packed_rows + begin_strip * run) * strip;
    for_row_tiles(tiles.features, [&]<int kRows>(int64_t f) {
      VecOf<A> sum[kRows][2];
      A* to = sums + f * logits.channels + c;
      prefetch_tile<A, kRows>(to, logits.channels);
      clear_tile<A, kRows>(sum);
      multiply_rows<A, kPairs, kRows, run>(tiles.by_row + f * run, tiles.features * run, rows, depth, sum);
      store_tile<A, kRows>(to, logits.channels, columns, !first, sum);
    });
  }
}

// What other phases do where a task does not see whole rows.
template <typename A, bool kPairs>
inline void prepare_group(
    const SharedBackwardArgs& args, int64_t group, int64_t begin_strip, int64_t end_strip, void* scratch) {
  const Logits& logits = args.logits;
  for (int64_t s = begin_strip; s < end_strip; ++s) {
    if (!args.has_logits) pack_transposed<A, kPairs>(logits, args.chunk, s, 0, logits.channels, args.packed);
    if (args.grad_weight != nullptr) {
      pack_rows<A, kPairs>(logits, args.chunk, s, 0, logits.channels, args.packed_rows);
    }
  }
  if (!args.has_logits) {
    logits_task<A, kPairs>(args, 0, group, scratch);
  } else if (args.dots != nullptr) {
    dots_task<A, kPairs>(args, 0, group, scratch);
  }
  for (int64_t s = begin_strip; args.dots != nullptr && s < end_strip; ++s) combine_dots<A, kPairs>(args, s);
}

template <typename A, bool kPairs>
void gradient_task(const SharedBackwardArgs& args, int64_t part, int64_t sum, void* scratch) {
  constexpr int strip = kStrip<A>;
  const Logits& logits = args.logits;
  const int64_t group_strips = logits.group / strip, groups = blocks_of(args.chunk.strips, group_strips);
  const int64_t blocks = blocks_of(logits.features, logits.block);
  const int64_t first_group = groups * sum / args.sums, end_group = groups * (sum + 1) / args.sums;
  const int64_t first_block = blocks * part / args.parts, end_block = blocks * (part + 1) / args.parts;
  A* weights = static_cast<A*>(scratch);
  A* bias_sums = weights + 2 * packed_weight_length<A, kPairs>(logits);
  A* staging = bias_sums + logits.block * kLanes<A>;
  A* dz = staging + 2 * logits.block * strip;
  A* tiles_begin = dz + (logits.block + 1) * strip;
  const int64_t tile_length = group_strips * logits.block * strip;
  for (int64_t g = first_group; g < end_group; ++g) {
    const int64_t begin_strip = g * group_strips, end_strip = min_of(begin_strip + group_strips, args.chunk.strips);
    const bool first_rows = args.chunk.begin == 0 && g == first_group;
    if (args.whole) prepare_group<A, kPairs>(args, g, begin_strip, end_strip, scratch);
    for (int64_t b = first_block; b < end_block; ++b) {
      const int64_t begin = b * logits.block, features = min_of(logits.block, logits.features - begin);
      const GradientTiles<A, kPairs> tiles{tiles_begin, kPairs ? tiles_begin + tile_length / 2 : tiles_begin, features};
      const bool with_bias = args.grad_bias != nullptr && args.depth_begin == 0;
      for (int64_t i = 0; with_bias && i < features * kLanes<A>; i += kLanes<A>) store(bias_sums + i, VecOf<A>{});
      for (int64_t s = begin_strip; s < end_strip; ++s) {
        A* to = kPairs ? dz : tiles.strip_by_row(s - begin_strip);
        logit_gradient<A>(args, s, begin, features, staging, to);
        clear_lanes<A>(to, features, rows_of_strip<A>(args.chunk, s));
        for (int64_t f = 0; with_bias && f < features; ++f) {
          const VecOf<A> both = load(to + f * strip) + load(to + f * strip + kLanes<A>);
          store(bias_sums + f * kLanes<A>, load(bias_sums + f * kLanes<A>) + both);
        }
        tiles.put(s - begin_strip, to);
      }
      if (with_bias) {
        A* sums = static_cast<A*>(args.grad_bias) + sum * logits.features + begin;
        for (int64_t f = 0; f < features; ++f) {
          sums[f] = (first_rows ? A{} : sums[f]) + sum_lanes(load(bias_sums + f * kLanes<A>));
        }
      }
      if (args.grad_context != nullptr || args.grad_input != nullptr) {
        const RowRange weight_rows{&logits, true, begin, features};
        pack_along_rows<A, kPairs>(
            weight_rows, features, args.depth_begin, args.depth_end, tiles.feature_pairs() * strip, weights);
        add_row_gradients<A, kPairs>(args, tiles, weights, part, begin_strip, end_strip, b == first_block);
      }
      if (args.grad_weight != nullptr) {
        add_weight_gradient<A, kPairs>(args, tiles, begin, sum, begin_strip, end_strip, first_rows);
      }
    }
  }
}

template <typename A, bool kPairs>
void write_rows(const SharedBackwardArgs& args, int64_t strip_index) {
  constexpr int strip = kStrip<A>, lanes = kLanes<A>;
  const int64_t rows = args.chunk.strips * strip, channels = args.depth_end - args.depth_begin;
  const int64_t channel_strips = blocks_of(channels, strip), first = strip_index * strip;
  with_row_type<A>(args.row_type, [&]<typename T>(const T*, int64_t size) {
    for (int64_t row = first; row < first + rows_of_strip<A>(args.chunk, strip_index); ++row) {
      T* out = static_cast<T*>(row_output(args, row, size));
      for (int64_t c = 0; out != nullptr && c < channels; c += lanes) {
        VecOf<A> sum{};
        for (int64_t p = 0; p < args.parts; ++p) {
          const int64_t at = ((p * channel_strips + c / strip) * rows + row) * strip + c % strip;
          sum += load(static_cast<const A*>(args.grad_rows) + at);
        }
        if (c + lanes <= channels) {
          store(out + c, sum);
        } else {
          store_part(out + c, sum, static_cast<int>(channels - c));
        }
      }
    }
  });
}

template <typename A, bool kPairs>
void write_sums(const void* from, int64_t count, int64_t stride, int64_t length, void* to, Scalar type) {
  constexpr int lanes = kLanes<A>;
  with_type<A>(type, to, 0, [&](auto* out) {
    for (int64_t i = 0; i < length; i += lanes) {
      const A* at = static_cast<const A*>(from) + i;
      const int left = static_cast<int>(min_of(lanes, length - i));
      VecOf<A> sum{};
      for (int64_t k = 0; k < count; ++k)
        sum += left == lanes ? load(at + k * stride) : load_part(at + k * stride, left);
      if (left == lanes) {
        store(out + i, sum);
      } else {
        store_part(out + i, sum, left);
      }
    }
  });
}

}  // namespace
}  // namespace fusefeat
