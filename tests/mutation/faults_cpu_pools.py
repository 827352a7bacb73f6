"""Faults in the CPU kernels of the pools."""

from __future__ import annotations

from .table import rows

KERNELS = "tests/test_cpu_kernels.py -k {isa}"
MANY_ITEMS = f"{KERNELS} and many_work_items"
POISONED = f"FUSEFEAT_POISON=1 {KERNELS}"
MASKED = "tests/test_pool_semantics.py -k cpu and masked_weight"
FAR = "tests/test_attention_pool.py -k cpu and far and float32"
NUMBERS = "tests/test_cpu_simd.py -k {isa}"

FORWARD = rows(
    "csrc/cpu/vec/pool_forward.h",
    KERNELS,
    ("no rescale of the sum", "sum = sum * rescale + sum_lanes(total);", "sum = sum + sum_lanes(total);"),
    ("no rescale of the output", "  return rescale;\n}", "  return rescale * 0 + 1;\n}"),
    ("last channel not normalised", "d < channels; ++d) row[d] *= factor;", "d < channels - 1; ++d) row[d] *= factor;"),
    ("empty bag not written", "if (first) fill(out,", "if (false) fill(out,", POISONED),
    ("log of the sum subtracted", "static_cast<double>(peak) + log_one(", "static_cast<double>(peak) - log_one("),
    ("parts' sums not rescaled", "sum += part_sum * factor;", "sum += part_sum;"),
    ("parts' outputs not rescaled", "out[d] += part_out[d] * factor;", "out[d] += part_out[d];"),
    ("weights by the peak of query 0", "base[i] = peak[i % num_queries];", "base[i] = peak[0];"),
    (
        "weight of a dropped token",
        "if (block.count < end - begin) fill(weights, (end - begin) * num_queries, -kInfinity<A>);",
        "if (block.count < end - begin) fill(weights, (end - begin) * num_queries, A(0));",
    ),
    (
        "a token dropped by one query is read",
        "const bool may_drop = args.query != nullptr || num_queries > 1;",
        "const bool may_drop = args.query != nullptr;",
    ),
    ("scale dropped", "scores[k * block.ld + r] *= scale;", "scores[k * block.ld + r] += scale * 0;"),
)

BLOCKS = rows(
    "csrc/cpu/vec/pool_block.h",
    KERNELS,
    ("token stride of the mask", "mask[t * args.mask_token] == 0", "mask[t] == 0"),
    ("bag stride of the mask", "args.mask + bag * args.mask_bag", "args.mask + bag * args.tokens"),
    (
        "stride of the offsets",
        "const int32_t*>(args.offsets)[i * args.offsets_stride]",
        "const int32_t*>(args.offsets)[i]",
    ),
    ("rows behind the last not set", "++r) rows[r] = rows[count - 1];", "++r) rows[r] = rows[r];", POISONED),
    ("kept by the last query alone", "kept |= score != -kInfinity<A>;", "kept = score != -kInfinity<A>;"),
    ("stride of the scores", "offset + k * strides.inner;", "offset + k;"),
)

ROWS = rows(
    "csrc/cpu/vec/row_blocks.h",
    KERNELS,
    ("tail not centred", "? load_part(centre[j] + d, rest) : V{};", "? load_part(centre[j] + d, 0) : V{};"),
)

BACKWARD = rows(
    "csrc/cpu/vec/pool_backward.h",
    KERNELS,
    ("sign of delta", "(load(dots + i) - delta) * scale;", "(load(dots + i) + delta) * scale;"),
    ("lse in single precision", "exp_lanes<A>(score - high - low);", "exp_lanes<A>(score - high);", FAR),
    ("dropped tokens' gradient not written", "  zero_until(end);\n", "", POISONED),
    ("gradient of a weight of 0 counts", "if (weight != 0) sum +=", "sum +=", MASKED),
    (
        "query's gradient of no token not written",
        "if (grad_query != nullptr && first) fill(",
        "if (false) fill(",
        POISONED,
    ),
    ("centre of query 0", "(bag * num_queries + k) * channels;", "bag * num_queries * channels;"),
    (
        "an item left out of the sum",
        "item < items && item < i + group;",
        "item < items && item + 1 < i + group;",
        MANY_ITEMS,
    ),
    ("query stride of grad_weights", "+ query * strides.inner];", "+ query];"),
    (
        "a dropped row counts",
        "return scratch.kept[k * block.ld + r] != 0; });",
        "return scratch.kept[k * block.ld + r] < 2; });",
    ),
)

HOST = [
    *rows(
        "csrc/cpu/attention_pool.cpp",
        KERNELS,
        (
            "gradient of tokens in no bag",
            "if (!partition.covers) torch::stable::zero_(*wanted.tokens);",
            "",
        ),
        ("weights of tokens in no bag", "if (args.weights != nullptr && !partition.covers)", "if (false)"),
    ),
    *rows(
        "csrc/cpu/pool_partition.h",
        KERNELS,
        ("tokens lost between parts", "tokens / count + (i < tokens % count ? 1 : 0);", "tokens / count;"),
        (
            "last part of a split bag",
            "splits.push_back({bag, parts, parts + count});",
            "splits.push_back({bag, parts, parts + count - 1});",
        ),
    ),
    *rows(
        "csrc/cpu/vec/simd.h",
        NUMBERS,
        (
            "bfloat16 ties not to even",
            "const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
            "const U rounded = (bits + 0x8000u) >> 16;",
        ),
        ("exp without the low part of ln 2", "ln2_low = 0x1.7f7d1cp-20f;", "ln2_low = 0.0f;"),
    ),
]

FAULTS = [*FORWARD, *BLOCKS, *ROWS, *BACKWARD, *HOST]
