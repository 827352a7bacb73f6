// Forward: statistics of one feature block at a time, relative to the block's own peak, then combined per row.
#pragma once

#include "logits.h"

namespace fusefeat {
namespace {

using cpu::SharedForwardArgs;

// max(z - margin, 0) per lane and, per feature, how many of the strip's rows have z > margin.
template <typename A>
inline void clamp_statistics(
    const A* z, int64_t features, A margin, const IntOf<A> (&valid)[2], A* excess, int32_t* fired) {
  constexpr int lanes = kLanes<A>;
  VecOf<A> sum0{}, sum1{};
  for (int64_t f = 0; f < features; ++f) {
    const VecOf<A> z0 = load(z + f * kStrip<A>), z1 = load(z + f * kStrip<A> + lanes);
    // "not <=" keeps NaN.
    sum0 += z0 <= margin ? VecOf<A>{} : z0 - margin;
    sum1 += z1 <= margin ? VecOf<A>{} : z1 - margin;
    if (fired != nullptr) {
      fired[f] += count_lanes<A>((z0 > margin) & valid[0]) + count_lanes<A>((z1 > margin) & valid[1]);
    }
  }
  store(excess, sum0);
  store(excess + lanes, sum1);
}

// Per lane: peak, sum of e = exp(z - peak), sum of e (z - peak); e goes to `e`, if wanted.
template <typename A, bool kWrite>
inline void block_statistics(const A* z, int64_t features, A* e, A* peak, A* sum, A* dot) {
  constexpr int lanes = kLanes<A>;
  VecOf<A> peak0 = splat<A>(-kInfinity<A>), peak1 = peak0;
  for (int64_t f = 0; f < features; ++f) {
    const VecOf<A> z0 = load(z + f * kStrip<A>), z1 = load(z + f * kStrip<A> + lanes);
    peak0 = z0 > peak0 ? z0 : peak0;
    peak1 = z1 > peak1 ? z1 : peak1;
  }
  store(peak, peak0);
  store(peak + lanes, peak1);
  // With every feature of the block switched off, all e are 0 whatever is subtracted.
  const VecOf<A> shift0 = peak0 == -kInfinity<A> ? VecOf<A>{} : peak0;
  const VecOf<A> shift1 = peak1 == -kInfinity<A> ? VecOf<A>{} : peak1;
  VecOf<A> sum0{}, sum1{}, dot0{}, dot1{};
  for (int64_t f = 0; f < features; ++f) {
    const VecOf<A> d0 = bounded_below<A>(load(z + f * kStrip<A>) - shift0);
    const VecOf<A> d1 = bounded_below<A>(load(z + f * kStrip<A> + lanes) - shift1);
    const VecOf<A> e0 = exp_bounded<A>(d0), e1 = exp_bounded<A>(d1);
    if constexpr (kWrite) {
      store(e + f * kStrip<A>, e0);
      store(e + f * kStrip<A> + lanes, e1);
    }
    sum0 += e0;
    sum1 += e1;
    dot0 = fma(e0, d0, dot0);
    dot1 = fma(e1, d1, dot1);
  }
  store(sum, sum0);
  store(sum + lanes, sum1);
  store(dot, dot0);
  store(dot + lanes, dot1);
}

template <typename A, bool kPairs>
int64_t worker_bytes(const Logits& logits, int64_t sweep_rows) {
  // The gradient tiles of a group, one more row for an odd feature, and tiles of one strip for the rest. A sweep may
  // have the weights packed in both ways.
  const int64_t strips = blocks_of(sweep_rows > logits.group ? sweep_rows : logits.group, kStrip<A>);
  const int64_t tiles = (strips + 4) * (logits.block + 1) * kStrip<A>;
  return (packed_weight_length<A, kPairs>(logits) * (sweep_rows > 0 ? 2 : 1) + tiles) * static_cast<int64_t>(sizeof(A));
}

// The sums over a group of w P of each feature, a vector for every one of them.
template <typename A>
inline void add_probs(const SharedForwardArgs& args, int64_t strip, const A* e, A* sums) {
  const A* weight = static_cast<const A*>(args.peak) + strip * kStrip<A>;
  const VecOf<A> w0 = load(weight), w1 = load(weight + kLanes<A>);
  for (int64_t f = 0; f < args.logits.features; ++f, e += kStrip<A>, sums += kLanes<A>) {
    store(sums, fma(load(e + kLanes<A>), w1, fma(load(e), w0, load(sums))));
  }
}

template <typename A, bool kPairs>
void combine_strip(const SharedForwardArgs& args, int64_t strip);

// Where a strip's logits are: `rows` of them, `stride` from feature to feature.
template <typename T>
struct Strip {
  T* at;
  int64_t stride, rows;

  template <typename A>
  VecOf<A> get(int64_t feature, int j) const {
    const int64_t left = rows - j * kLanes<A>;
    const T* from = at + feature * stride + j * kLanes<A>;
    return left >= kLanes<A> ? load(from) : left > 0 ? load_part(from, static_cast<int>(left)) : VecOf<A>{};
  }

  template <typename A>
  void put(int64_t feature, int j, VecOf<A> v) const {
    const int64_t left = rows - j * kLanes<A>;
    T* to = at + feature * stride + j * kLanes<A>;
    if (left >= kLanes<A>) {
      store(to, v);
    } else if (left > 0) {
      store_part(to, v, static_cast<int>(left));
    }
  }
};

// Calls body with where the logits of a kept strip of rows go, from a feature on.
template <typename A, typename Body>
inline void with_kept_strip(const SharedForwardArgs& args, int64_t row, int64_t feature, const Body& body) {
  const KeptStrip<A> at(args.logits.features, args.kept_rows, row, feature);
  with_kept<A>(args.kept_type, args.kept, at.offset, [&]<typename T>(T* kept) {
    body(Strip<T>{kept, at.width, min_of(kStrip<A>, args.kept_rows - row)});
  });
}

// The same of any strip whose logits are in float16.
template <typename A, typename Body>
inline void with_rounded_strip(const SharedForwardArgs& args, int64_t strip, int64_t feature, const Body& body) {
  const int64_t row = args.chunk.begin + strip * kStrip<A>;
  if (row < args.kept_rows) return with_kept_strip<A>(args, row, feature, body);
  if constexpr (sizeof(A) == sizeof(float)) {
    Half* tile = static_cast<Half*>(args.tile) + (strip * args.logits.features + feature) * kStrip<A>;
    body(Strip<Half>{tile, kStrip<A>, kStrip<A>});
  }
}

// Writes a tile of logits, and has it as it was written.
template <typename A, typename T>
inline void put_tile(const Strip<T>& strip, int64_t features, A* z) {
  for (int64_t f = 0; f < features; ++f) {
    for (int j = 0; j < 2; ++j) {
      A* at = z + f * kStrip<A> + j * kLanes<A>;
      strip.template put<A>(f, j, load(at));
      if constexpr (sizeof(T) < sizeof(A)) store(at, strip.template get<A>(f, j));
    }
  }
}

// The logits of a block of features for a group of rows, and with the last channels what is wanted of them.
template <typename A, bool kPairs>
void forward_task(const SharedForwardArgs& args, int64_t block, int64_t group, void* scratch) {
  constexpr int strip = kStrip<A>;
  const Logits& logits = args.logits;
  const int64_t begin = block * logits.block, features = min_of(logits.block, logits.features - begin);
  const int64_t group_strips = logits.group / strip;
  const bool last = args.depth_end == logits.channels;
  const bool rounded = sizeof(A) == sizeof(float) && args.tile_type == Scalar::f16;
  const A margin = static_cast<A>(logits.margin);
  A* weights = static_cast<A*>(scratch);
  A* z = weights + packed_weight_length<A, kPairs>(logits);
  const WeightBlock<A, kPairs> weight_block(logits, begin, features, args.depth_begin, args.depth_end, weights);
  int32_t* fired = args.fired == nullptr ? nullptr : args.fired + group * logits.features + begin;
  for (int64_t f = 0; last && fired != nullptr && f < features; ++f) fired[f] = 0;
  A* probs = args.prob_sums == nullptr ? nullptr : z + logits.block * strip;
  for (int64_t i = 0; probs != nullptr && i < features * kLanes<A>; i += kLanes<A>) store(probs + i, VecOf<A>{});
  const int64_t end = min_of((group + 1) * group_strips, args.chunk.strips);
  for (int64_t s = group * group_strips; s < end; ++s) {
    A* tile = args.tile == nullptr || rounded ? z : static_cast<A*>(args.tile) + (s * logits.features + begin) * strip;
    if (args.whole) pack_transposed<A, kPairs>(logits, args.chunk, s, 0, logits.channels, args.packed);
    logits_tile<A, kPairs>(
        weight_block, s == group * group_strips, packed_strip<A, kPairs>(logits, args.packed, s),
        args.depth_begin == 0 ? nullptr : tile, last, last ? z : tile);
    if (!last) continue;
    const int64_t row = args.chunk.begin + s * strip;
    const int64_t lane = (block * args.chunk.strips + s) * strip;
    const auto put = [&](const auto& to) { put_tile<A>(to, features, z); };
    if (rounded) {
      with_rounded_strip<A>(args, s, begin, put);
    } else if (row < args.kept_rows) {
      with_kept_strip<A>(args, row, begin, put);
    } else if (args.kept_type == Scalar::f16) {
      round_tile<A>(features, z);
    }
    if (args.excess != nullptr) {
      IntOf<A> valid[2] = {};
      valid_lanes<A>(rows_of_strip<A>(args.chunk, s), valid);
      clamp_statistics<A>(z, features, margin, valid, static_cast<A*>(args.excess) + lane, fired);
    }
    if (args.peak != nullptr) {
      A *peak = static_cast<A*>(args.peak) + lane, *sum = static_cast<A*>(args.sum) + lane;
      A* dot = static_cast<A*>(args.dot) + lane;
      if (rounded) {
        block_statistics<A, false>(z, features, nullptr, peak, sum, dot);
      } else {
        block_statistics<A, true>(z, features, tile, peak, sum, dot);
        clear_lanes<A>(tile, features, rows_of_strip<A>(args.chunk, s));
      }
    }
    if (args.whole) combine_strip<A, kPairs>(args, s);
    if (probs != nullptr) add_probs<A>(args, s, tile, probs);
    if (args.matrix != nullptr && args.peak == nullptr) {
      for (int64_t i = 0; i < features * strip; i += kLanes<A>) {
        const VecOf<A> v = load(z + i);
        store(z + i, v <= margin ? splat<A>(margin) : v);
      }
      with_type<A>(args.matrix_type, args.matrix, row * logits.features + begin, [&](auto* to) {
        tile_to_matrix<A>(z, rows_of_strip<A>(args.chunk, s), features, to, logits.features);
      });
    }
  }
  for (int64_t f = 0; probs != nullptr && f < features; ++f) {
    static_cast<A*>(args.prob_sums)[group * features + f] = sum_lanes(load(probs + f * kLanes<A>));
  }
}

// Rows' entropy and lse from the blocks; afterwards `peak` holds what turns a block's e into w P. With logits in
// float16 there are no e: `peak` begins with the rows' peaks, `sum` with what turns exponentials less these into w P.
template <typename A, bool kPairs>
void combine_strip(const SharedForwardArgs& args, int64_t strip) {
  const Logits& logits = args.logits;
  const int64_t blocks = blocks_of(logits.features, logits.block), step = args.chunk.strips * kStrip<A>;
  for (int j = 0; j < 2; ++j) {
    const int64_t lane = strip * kStrip<A> + j * kLanes<A>, row = args.chunk.begin + lane;
    if (args.excess != nullptr) {
      VecOf<A> excess{};
      for (int64_t b = 0; b < blocks; ++b) excess += load(static_cast<const A*>(args.excess) + b * step + lane);
      store(static_cast<A*>(args.row_excess) + row, excess);
    }
    if (args.peak == nullptr) continue;
    A* peaks = static_cast<A*>(args.peak) + lane;
    VecOf<A> peak = splat<A>(-kInfinity<A>), sum{}, dot{};
    for (int64_t b = 0; b < blocks; ++b) {
      const VecOf<A> p = load(peaks + b * step);
      peak = p > peak ? p : peak;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const VecOf<A> block_peak = load(peaks + b * step);
      const VecOf<A> shift = block_peak == -kInfinity<A> ? VecOf<A>{} : block_peak - peak;
      const VecOf<A> factor = exp_bounded<A>(bounded_below<A>(shift));
      const VecOf<A> block_sum = load(static_cast<const A*>(args.sum) + b * step + lane);
      const VecOf<A> block_dot = load(static_cast<const A*>(args.dot) + b * step + lane);
      sum = fma(factor, block_sum, sum);
      dot = fma(factor, fma(block_sum, shift, block_dot), dot);
    }
    // peak - peak is 0, or NaN when the peak is infinite.
    VecOf<A> log_sum;
    for (int i = 0; i < kLanes<A>; ++i) log_sum[i] = log_one(sum[i]);
    log_sum += peak - peak;
    const VecOf<A> lse = peak + log_sum;
    const VecOf<A> weight = load(static_cast<const A*>(args.row_weight) + row);
    store(static_cast<A*>(args.row_lse) + row, lse);
    store(static_cast<A*>(args.row_entropy) + row, log_sum - dot / sum);
    if (args.tile_type == Scalar::f16) {
      store(peaks, peak);
      store(static_cast<A*>(args.sum) + lane, weight == 0 ? VecOf<A>{} : weight / sum);
      continue;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const VecOf<A> scale = weight * exp_bounded<A>(bounded_below<A>(load(peaks + b * step) - peak)) / sum;
      store(peaks + b * step, weight == 0 ? VecOf<A>{} : scale);  // lanes without a row
    }
  }
}

// Adds the sums over the chunk's rows of w P of kCount features from rounded logits, while those of the next features
// are on their way.
template <typename A, int kCount>
inline void sum_rounded(const SharedForwardArgs& args, int64_t feature, A* sums) {
  VecOf<A> sum[kCount] = {};
  for (int64_t s = 0; s < args.chunk.strips; ++s) {
    with_rounded_strip<A>(args, s, feature, [&]<typename T>(const Strip<T>& logits) {
      const auto add = [&](int j, const auto& get) {
        const VecOf<A> peak = load(static_cast<const A*>(args.peak) + s * kStrip<A> + j * kLanes<A>);
        const VecOf<A> scale = load(static_cast<const A*>(args.sum) + s * kStrip<A> + j * kLanes<A>);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
          const VecOf<A> e = exp_bounded<A>(bounded_below<A>(get(i, j) - peak));
          sum[i] += scale == 0 ? VecOf<A>{} : scale * e;  // lanes without a row
        }
      };
      for (int i = 0; i < kCount; ++i) __builtin_prefetch(logits.at + (kCount + i) * logits.stride);
      for (int j = 0; j < 2; ++j) {
        if (logits.rows == kStrip<A>) {
          add(j, [&](int i, int k) { return load(logits.at + i * logits.stride + k * kLanes<A>); });
        } else {
          add(j, [&](int i, int k) { return logits.template get<A>(i, k); });
        }
      }
    });
  }
  for (int i = 0; i < kCount; ++i) sums[i] += sum_lanes(sum[i]);
}

// prob_sum and fired_sum of features [begin, end), which lie in one block.
template <typename A, bool kPairs>
void column_sums(const SharedForwardArgs& args, int64_t begin, int64_t end) {
  constexpr int strip = kStrip<A>, lanes = kLanes<A>, step = 8;
  const Logits& logits = args.logits;
  const int64_t groups = blocks_of(args.chunk.strips * strip, logits.group);
  if (args.fired != nullptr) {
    for (int64_t f = begin; f < end; ++f) {
      int64_t count = 0;
      for (int64_t g = 0; g < groups; ++g) count += args.fired[g * logits.features + f];
      args.fired_sum[f] += count;
    }
  }
  if (args.peak == nullptr) return;
  if (args.prob_sums != nullptr) {
    const A* from = static_cast<const A*>(args.prob_sums);
    for (int64_t f = begin; f < end; ++f) {
      for (int64_t g = 0; g < groups; ++g) static_cast<A*>(args.prob_sum)[f] += from[g * logits.features + f];
    }
    return;
  }
  A* sums = static_cast<A*>(args.prob_sum);
  if (sizeof(A) == sizeof(float) && args.tile_type == Scalar::f16) {
    int64_t f = begin;
    for (; f + step <= end; f += step) sum_rounded<A, step>(args, f, sums + f);
    for (; f < end; ++f) sum_rounded<A, 1>(args, f, sums + f);
    return;
  }
  const A* weights = static_cast<const A*>(args.peak) + begin / logits.block * args.chunk.strips * strip;
  for (int64_t f = begin; f < end; f += step) {
    const int count = static_cast<int>(min_of(step, end - f));
    VecOf<A> sum[step] = {};
    for (int64_t s = 0; s < args.chunk.strips; ++s) {
      const A* e = static_cast<const A*>(args.tile) + (s * logits.features + f) * strip;
      const VecOf<A> w0 = load(weights + s * strip), w1 = load(weights + s * strip + lanes);
      if (count == step) {
#pragma GCC unroll 8
        for (int i = 0; i < step; ++i)
          sum[i] = fma(load(e + i * strip + lanes), w1, fma(load(e + i * strip), w0, sum[i]));
      } else {
        for (int i = 0; i < count; ++i)
          sum[i] = fma(load(e + i * strip + lanes), w1, fma(load(e + i * strip), w0, sum[i]));
      }
    }
    for (int i = 0; i < count; ++i) sums[f + i] += sum_lanes(sum[i]);
  }
}

template <typename A, bool kPairs>
void write_assignment(const SharedForwardArgs& args, int64_t block, int64_t group, void* scratch) {
  constexpr int strip = kStrip<A>;
  const Logits& logits = args.logits;
  const int64_t begin = block * logits.block, features = min_of(logits.block, logits.features - begin);
  const int64_t group_strips = logits.group / strip;
  const int64_t end = min_of((group + 1) * group_strips, args.chunk.strips);
  A* probs = static_cast<A*>(scratch);
  for (int64_t s = group * group_strips; s < end; ++s) {
    const A* e = static_cast<const A*>(args.tile) + (s * logits.features + begin) * strip;
    const A* weight = static_cast<const A*>(args.peak) + (block * args.chunk.strips + s) * strip;
    const VecOf<A> w0 = load(weight), w1 = load(weight + kLanes<A>);
    for (int64_t i = 0; i < features * strip; i += strip) {
      store(probs + i, load(e + i) * w0);
      store(probs + i + kLanes<A>, load(e + i + kLanes<A>) * w1);
    }
    const int64_t row = args.chunk.begin + s * strip;
    with_type<A>(args.matrix_type, args.matrix, row * logits.features + begin, [&](auto* to) {
      tile_to_matrix<A>(probs, rows_of_strip<A>(args.chunk, s), features, to, logits.features);
    });
  }
}

}  // namespace
}  // namespace fusefeat
