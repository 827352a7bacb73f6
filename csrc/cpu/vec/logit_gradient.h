// Backward: logits again where they were not kept, sums over their probabilities, and their gradient.
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

// Calls body with a typed pointer to where a strip's logits of a block of features lie that were not kept.
template <typename A, typename Body>
inline void with_tile(
    const SharedBackwardArgs& args, int64_t strip, int64_t begin, int64_t features, const Body& body) {
  constexpr int width = kStrip<A>;
  const int64_t row = strip * width;
  if (row < args.loan_end) {
    char* loan = static_cast<char*>(args.loan) + begin * args.loan_row_bytes;
    return with_kept<A>(args.tile_type, loan, (row - args.kept_end) * features, body);
  }
  with_kept<A>(args.tile_type, args.tile, (row - args.loan_end) * args.logits.features + begin * width, body);
}

// Calls body with the tile of logits. Kept rows that do not fill their strip are copied to `scratch`.
template <typename A, typename Body>
inline void with_logits(
    const SharedBackwardArgs& args, int64_t strip, int64_t begin, int64_t features, A* scratch, const Body& body) {
  constexpr int width = kStrip<A>, lanes = kLanes<A>;
  if (strip * width >= args.kept_end) {
    return with_tile<A>(args, strip, begin, features, [&]<typename T>(const T* tile) { body(Tile<T>{tile, width}); });
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

// Logits of a strip that nobody stores, of all channels.
template <typename A, bool kPairs>
inline void compute_strip(
    const SharedBackwardArgs& args, const WeightBlock<A, kPairs>& block, int64_t strip, bool pack, A* z) {
  logits_tile<A, kPairs>(block, pack, packed_strip<A, kPairs>(args.logits, args.packed, strip), nullptr, true, z);
  if (args.kept_type == Scalar::f16) round_tile<A>(block.features, z);
}

// Logits of a block of features for a group of rows, into the chunk's tile, but for those that were kept.
template <typename A, bool kPairs>
void logits_task(const SharedBackwardArgs& args, int64_t block, int64_t group, void* scratch) {
  const Logits& logits = args.logits;
  const int64_t begin = block * logits.block, features = min_of(logits.block, logits.features - begin);
  const int64_t group_strips = logits.group / kStrip<A>;
  const bool last = args.depth_end == logits.channels, rounded = last && args.kept_type == Scalar::f16;
  A* weights = static_cast<A*>(scratch);
  A* z = weights + packed_weight_length<A, kPairs>(logits);
  const WeightBlock<A, kPairs> weight_block(logits, begin, features, args.depth_begin, args.depth_end, weights);
  const int64_t first = max_of(group * group_strips, args.kept_end / kStrip<A>);
  const int64_t end = min_of((group + 1) * group_strips, args.chunk.strips);
  for (int64_t s = first; s < end; ++s) {
    if (s * kStrip<A> >= args.tile_end) {
      compute_strip<A, kPairs>(args, weight_block, s, s == first, z);
      logits_dots<A>(args, s, begin, features, Tile<A>{z, kStrip<A>}, Dots<A>(args, block, s));
      continue;
    }
    with_tile<A>(args, s, begin, features, [&]<typename T>(T* tile) {
      const A* earlier = nullptr;
      if constexpr (sizeof(T) == sizeof(A)) earlier = args.depth_begin == 0 ? nullptr : tile;
      logits_tile<A, kPairs>(
          weight_block, s == first, packed_strip<A, kPairs>(logits, args.packed, s), earlier, last, z);
      // By way of a tile in cache: stores that miss hold up the products. And the sums are over what is read again.
      for (int64_t i = 0; i < features * kStrip<A>; i += kLanes<A>) {
        if (sizeof(T) == sizeof(A) && rounded) store(z + i, in_float16<A>(load(z + i)));
        store(tile + i, load(z + i));
        if constexpr (sizeof(T) < sizeof(A)) store(z + i, load(tile + i));
      }
    });
    if (last && args.dots != nullptr) {
      logits_dots<A>(args, s, begin, features, Tile<A>{z, kStrip<A>}, Dots<A>(args, block, s));
    }
  }
}

// The sums over probabilities of which there are logits.
template <typename A, bool kPairs>
void dots_task(const SharedBackwardArgs& args, int64_t block, int64_t group, void* scratch) {
  const Logits& logits = args.logits;
  const int64_t begin = block * logits.block, features = min_of(logits.block, logits.features - begin);
  const int64_t group_strips = logits.group / kStrip<A>;
  const int64_t rows = args.kind == Gradient::assignment ? args.chunk.rows : args.kept_end;
  const int64_t end = min_of((group + 1) * group_strips, blocks_of(rows, kStrip<A>));
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
    VecOf<A> dot{}, terms{}, probs{};
    for (int64_t b = 0; b < blocks; ++b) dot += load(Dots<A>(args, b, strip).of_grads + lane);
    store(static_cast<A*>(args.row_dot) + at, dot);
    if (args.kind == Gradient::assignment) continue;
    // The mean over the very probabilities that it is taken off from, whose sum is 1 but for the rounding of lse:
    // what is left of that would tilt all gradients of a row the same way.
    for (int64_t b = 0; b < blocks; ++b) {
      terms += load(Dots<A>(args, b, strip).of_terms + lane);
      probs += load(Dots<A>(args, b, strip).of_probs + lane);
    }
    A* mean = static_cast<A*>(args.row_mean) + at;
    store(mean, terms / probs - load(mean));
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
  const Lanes<A> prob_scale(args.row_prob_scale, row), mean(args.row_mean, row);
  const A* prob_grads = args.grad_prob_sum == nullptr ? nullptr : static_cast<const A*>(args.grad_prob_sum) + begin;
  for (int64_t f = 0; f < features; ++f) {
    const VecOf<A> g = prob_grads == nullptr ? VecOf<A>{} : splat<A>(prob_grads[f]);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const VecOf<A> v = load(z.data + f * z.stride + j * lanes);
      const VecOf<A> log_p = bounded_below<A>(v - lse.v[j]);
      const VecOf<A> p = exp_bounded<A>(log_p);
      // The very term that the mean was taken of: where one feature has all of P nothing is left.
      const VecOf<A> t = fma(prob_scale.v[j], g, fma(log_scale.v[j], log_p, offset.v[j])) - mean.v[j];
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
    const Lanes<A> dot(args.row_dot, row), scale(args.row_prob_scale, row);
    for (int64_t i = 0; i < features * kStrip<A>; i += kStrip<A>) {
      for (int j = 0; j < 2; ++j) {
        const VecOf<A> p = load(scratch + i + j * lanes);
        const VecOf<A> d = p * scale.v[j] * (load(grads + i + j * lanes) - dot.v[j]);
        store(to + i + j * lanes, p == 0 ? VecOf<A>{} : d);
      }
    }
    return;
  }
  with_logits<A>(args, strip, begin, features, scratch, [&](auto z) {
    gradient_from_logits<A>(args, strip, begin, features, z, grads, to);
  });
}

}  // namespace
}  // namespace fusefeat
