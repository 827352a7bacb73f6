// Backward: the gradient of a block of logits for a group of rows, and from it, while it is in cache, its share of
// the gradients of rows, weight and bias.
#pragma once

#include "logit_gradient.h"

namespace fusefeat {
namespace {

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
    int64_t begin_strip, int64_t end_strip, bool first, Ahead ahead) {
  constexpr int strip = kStrip<A>;
  const int64_t rows = args.chunk.strips * strip, depth = tiles.feature_pairs();
  const int64_t channel_strips = blocks_of(args.depth_end - args.depth_begin, strip);
  const Logits& logits = args.logits;
  const int64_t lines = ahead.lines() / (channel_strips * (end_strip - begin_strip) * (strip / kTileRows)) + 1;
  for (int64_t c = 0; c < channel_strips; ++c) {
    for (int64_t s = begin_strip; s < end_strip; ++s) {
      const int64_t row = args.chunk.begin + s * strip, count = rows_of_strip<A>(args.chunk, s);
      const int64_t head = logits.used == nullptr ? row : logits.used[row];
      const int64_t tail = logits.used == nullptr ? row + count - 1 : logits.used[row + count - 1];
      const bool wanted = (args.grad_context != nullptr && head < logits.context_rows) ||
                          (args.grad_input != nullptr && tail >= logits.context_rows);
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
        ahead.ask(lines);
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
      multiply_rows<A, kPairs, kRows, run>(
          tiles.by_row + f * run, tiles.features * run, run, rows, depth, sum, [](int64_t) {});
      store_tile<A, kRows>(to, logits.channels, columns, !first, sum);
    });
  }
}

// A vector of sums per feature.
template <typename A>
inline void add_to_bias(const A* dz, int64_t features, A* sums) {
  for (int64_t f = 0; f < features; ++f, dz += kStrip<A>, sums += kLanes<A>) {
    store(sums, load(sums) + (load(dz) + load(dz + kLanes<A>)));
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
  A* bias_sums = weights + packed_weight_length<A, kPairs>(logits);
  A* staging = bias_sums + logits.block * kLanes<A>;
  A* dz = staging + 2 * logits.block * strip;
  A* tiles_begin = dz + (logits.block + 1) * strip;
  const int64_t tile_length = group_strips * logits.block * strip;
  // A block of weights and its gradient stay in cache while all groups of rows pass by.
  for (int64_t b = first_block; b < end_block; ++b) {
    const int64_t begin = b * logits.block, features = min_of(logits.block, logits.features - begin);
    const GradientTiles<A, kPairs> tiles{tiles_begin, kPairs ? tiles_begin + tile_length / 2 : tiles_begin, features};
    const bool with_bias = args.grad_bias != nullptr && args.depth_begin == 0;
    const bool with_rows = args.grad_context != nullptr || args.grad_input != nullptr;
    const auto pack_weights = [&] {
      const RowRange weight_rows{&logits, true, begin, features};
      pack_along_rows<A, kPairs>(
          weight_rows, features, args.depth_begin, args.depth_end, tiles.feature_pairs() * strip, weights);
    };
    if (with_rows && !args.whole) pack_weights();
    for (int64_t g = first_group; g < end_group; ++g) {
      const int64_t begin_strip = g * group_strips, end_strip = min_of(begin_strip + group_strips, args.chunk.strips);
      const bool first_rows = args.chunk.begin == 0 && g == first_group;
      if (args.whole) {
        prepare_group<A, kPairs>(args, g, begin_strip, end_strip, scratch);
        if (with_rows) pack_weights();
      }
      for (int64_t i = 0; with_bias && i < features * kLanes<A>; i += kLanes<A>) store(bias_sums + i, VecOf<A>{});
      for (int64_t s = begin_strip; s < end_strip; ++s) {
        A* to = kPairs ? dz : tiles.strip_by_row(s - begin_strip);
        logit_gradient<A>(args, s, begin, features, staging, to);
        clear_lanes<A>(to, features, rows_of_strip<A>(args.chunk, s));
        if (with_bias) add_to_bias<A>(to, features, bias_sums);
        tiles.put(s - begin_strip, to);
      }
      if (with_bias) {
        A* sums = static_cast<A*>(args.grad_bias) + sum * logits.features + begin;
        for (int64_t f = 0; f < features; ++f) {
          sums[f] = (first_rows ? A{} : sums[f]) + sum_lanes(load(bias_sums + f * kLanes<A>));
        }
      }
      if (with_rows) {
        // The weights of the next block, before they are packed.
        const int64_t next = begin + features,
                      end = b + 1 < end_block && g + 1 == end_group ? next + logits.block : next;
        const Ahead ahead(logits.weight, next, min_of(end, logits.features), args.depth_begin, args.depth_end);
        add_row_gradients<A, kPairs>(args, tiles, weights, part, begin_strip, end_strip, b == first_block, ahead);
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
