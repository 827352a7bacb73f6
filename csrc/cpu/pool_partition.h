// How the tokens of all bags are cut into work items: by the shapes and offsets alone. A long bag is cut into
// even parts of its own, so its result does not depend on where in the batch it stands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_pool.h"

namespace fusefeat::cpu {

struct PoolPartition {
  std::vector<PoolItem> items;
  std::vector<SplitBag> splits;
  int64_t parts = 0;
  bool covers = true;  // every token lies in a bag

  // Tokens per item: enough bytes to make taking an item cheap, items enough for some dozen threads, and enough tokens
  // per query that what the parts leave behind stays small beside the tokens themselves.
  static int64_t block_tokens(const PoolArgs& args, int64_t element_bytes) {
    const int64_t row_bytes = std::max<int64_t>(args.channels * element_bytes, 16);
    const int64_t total_bytes = args.tokens * (args.packed ? 1 : args.bags) * row_bytes;
    // Readers of wide rows ask for more bytes ahead, which at the end of an item are another's.
    const int64_t most = row_bytes > 4096 ? 2 << 20 : 1 << 20;
    const int64_t block_bytes = std::clamp<int64_t>(total_bytes / 32, most / 4, most);
    return std::max({block_bytes / row_bytes, 16 * args.queries, int64_t{16}});
  }

  PoolPartition(const PoolArgs& args, int64_t element_bytes) : block_(block_tokens(args, element_bytes)) {
    if (args.packed) {
      cut_packed(args);
    } else {
      cut_padded(args);
    }
  }

 private:
  int64_t block_;

  void cut_padded(const PoolArgs& args) {
    if (args.tokens > block_) {
      for (int64_t bag = 0; bag < args.bags; ++bag) split(bag, 0, args.tokens);
      return;
    }
    const int64_t step = std::max<int64_t>(1, block_ / std::max<int64_t>(args.tokens, 1));
    for (int64_t bag = 0; bag < args.bags; bag += step) whole(bag, std::min(bag + step, args.bags));
  }

  void cut_packed(const PoolArgs& args) {
    // What a bag costs by itself, in tokens: many empty bags are work too.
    constexpr int64_t per_bag = 4;
    int64_t first = 0, cost = 0, previous = 0;
    for (int64_t bag = 0; bag < args.bags; ++bag) {
      const int64_t raw_begin = raw_offset(args, bag), raw_end = raw_offset(args, bag + 1);
      covers = covers && raw_begin == previous && raw_end >= raw_begin;
      previous = raw_end;
      const int64_t begin = std::clamp<int64_t>(raw_begin, 0, args.tokens);
      const int64_t end = std::clamp<int64_t>(raw_end, begin, std::max(begin, args.tokens));
      const bool is_long = end - begin > block_;
      if (is_long || cost >= block_) {
        if (first < bag) whole(first, bag);
        first = bag;
        cost = 0;
      }
      if (is_long) {
        split(bag, begin, end);
        first = bag + 1;
      } else {
        cost += end - begin + per_bag;
      }
    }
    if (first < args.bags) whole(first, args.bags);
    covers = covers && previous == args.tokens;
  }

  static int64_t raw_offset(const PoolArgs& args, int64_t i) {
    return args.offsets_are_64_bit ? static_cast<const int64_t*>(args.offsets)[i * args.offsets_stride]
                                   : static_cast<const int32_t*>(args.offsets)[i * args.offsets_stride];
  }

  void whole(int64_t begin, int64_t end) { items.push_back({begin, end, 0, 0, -1, -1}); }

  void split(int64_t bag, int64_t begin, int64_t end) {
    const int64_t tokens = end - begin, count = (tokens + block_ - 1) / block_;
    const int64_t index = static_cast<int64_t>(splits.size());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = begin + tokens / count * i + std::min(i, tokens % count);
      const int64_t to = from + tokens / count + (i < tokens % count ? 1 : 0);
      items.push_back({bag, bag + 1, from, to, parts + i, index});
    }
    splits.push_back({bag, parts, parts + count});
    parts += count;
  }
};

}  // namespace fusefeat::cpu
