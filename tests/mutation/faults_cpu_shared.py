"""Faults in the CPU kernels of the shared-penalty family."""

from __future__ import annotations

from .table import rows

KERNELS = "tests/test_cpu_shared_kernels.py -k {isa}"
ROUNDED = "tests/test_cpu_shared_kernels.py -k rounded_logits"
POISONED = f"FUSEFEAT_POISON=1 {KERNELS}"
SWEEP = "tests/test_cpu_sweep.py"

LOGITS = rows(
    "csrc/cpu/vec/logits.h",
    KERNELS,
    ("bias outside of the margin", "sum[r][0] = margin * (sum[r][0] + b);", "sum[r][0] = margin * sum[r][0] + b;"),
    ("bias of the tile's first feature", "splat<A>(bias[f + r]);", "splat<A>(bias[f]);"),
    (
        "earlier channels of the wrong rows",
        "sum[r][1] += load(earlier + r * strip + kLanes<A>);",
        "sum[r][1] += load(earlier + r * strip);",
    ),
    (
        "all channels summed in one go",
        "constexpr int64_t kSummed = 256;",
        "constexpr int64_t kSummed = 1024;",
        f"{KERNELS} and long_sums",
    ),
    ("odd channels as pairs", "if ((end - begin) % pair != 0 || stride", "if (stride"),
    ("rows of odd stride as pairs", "|| stride % pair != 0 ||", "||"),
    (
        "a row too many",
        "lane + j * kLanes<A> < static_cast<int>(rows);",
        "lane + j * kLanes<A> <= static_cast<int>(rows);",
    ),
    (
        "first lane without a row not cleared",
        "for (int64_t i = rows; i < kStrip<A>; ++i)",
        "for (int64_t i = rows + 1; i < kStrip<A>; ++i)",
    ),
)

PACKING = rows(
    "csrc/cpu/vec/pack.h",
    KERNELS,
    (
        "rows behind the last eight not packed",
        "first + kPackedRows < count ? first + kPackedRows : count;",
        "first + kPackedRows < count ? first + kPackedRows : first;",
    ),
    ("pairs of rows half as far apart", "at + r / pair * strip);", "at + r / pair * strip / 2);"),
    (
        "operands that are to be rounded taken as they are",
        "if (logits->operand != 0 && matrix.type != Scalar::bf16) return nullptr;",
        "",
    ),
)

FORWARD = rows(
    "csrc/cpu/vec/shared_forward.h",
    KERNELS,
    ("entropy of the wrong lanes", "dot0 = fma(e0, d0, dot0);", "dot0 = fma(e0, d1, dot0);"),
    (
        "entropy not shifted",
        "dot = fma(factor, fma(block_sum, shift, block_dot), dot);",
        "dot = fma(factor, block_dot, dot);",
    ),
    ("blocks' sums not rescaled", "sum = fma(factor, block_sum, sum);", "sum += block_sum;"),
    (
        "margin not subtracted",
        "sum0 += z0 <= margin ? VecOf<A>{} : z0 - margin;",
        "sum0 += z0 <= margin ? VecOf<A>{} : z0;",
    ),
    ("a tie fires", "(z0 > margin) & valid[0]", "(z0 >= margin) & valid[0]"),
    ("clamped at 0", "v <= margin ? splat<A>(margin) : v", "v <= A(0) ? splat<A>(0) : v"),
    ("fired of the last chunk only", "args.fired_sum[f] += count;", "args.fired_sum[f] = count;"),
    ("prob_sum of the last chunk only", "sums[f + i] += sum_lanes(sum[i]);", "sums[f + i] = sum_lanes(sum[i]);"),
    ("the same of rounded logits", "sums[i] += sum_lanes(sum[i]);", "sums[i] = sum_lanes(sum[i]);", ROUNDED),
    ("statistics of unrounded logits", "store(at, strip.template get<A>(f, j));", "{}", ROUNDED),
    (
        "those of rows not kept",
        "args.kept_type == Scalar::f16) {\n      round_tile",
        "false) {\n      round_tile",
        ROUNDED,
    ),
    ("weight of rounded rows left out", "weight == 0 ? VecOf<A>{} : weight / sum", "VecOf<A>{} + 1 / sum", ROUNDED),
    (
        "prob_sum of the first group only",
        "for (int64_t g = 0; g < groups; ++g) static_cast<A*>",
        "for (int64_t g = 0; g < 1; ++g) static_cast<A*>",
    ),
)

LOGIT_GRADIENT = rows(
    "csrc/cpu/vec/logit_gradient.h",
    KERNELS,
    (
        "no term of log P",
        "fma(log_scale.v[j], log_p, offset.v[j])) - mean.v[j];",
        "offset.v[j]) - mean.v[j];",
    ),
    (
        "sign of the mean",
        "store(mean, terms / probs - load(mean));",
        "store(mean, -terms / probs - load(mean));",
    ),
    (
        "gradient at a tie",
        "d += v > margin ? excess.v[j]",
        "d += v >= margin ? excess.v[j]",
        "tests/test_shared_penalty.py -k ties",
    ),
    ("margin left out", "const VecOf<A> g = margin * load(grads", "const VecOf<A> g = load(grads"),
    (
        "sums over unrounded logits",
        "if constexpr (sizeof(T) < sizeof(A)) store(z + i, load(tile + i));",
        "",
        ROUNDED,
    ),
    (
        "logits in acc not rounded",
        "if (sizeof(T) == sizeof(A) && rounded) store(",
        "if (false) store(",
        ROUNDED,
    ),
)

BACKWARD = rows(
    "csrc/cpu/vec/shared_backward.h",
    KERNELS,
    ("bias gradient of the last chunk only", "(first_rows ? A{} : sums[f]) +", "A{} +"),
    (
        "first part of a row's gradient only",
        "for (int64_t p = 0; p < args.parts; ++p) {",
        "for (int64_t p = 0; p < 1; ++p) {",
    ),
    (
        "rows that share a strip with the context",
        "tail >= logits.context_rows",
        "head >= logits.context_rows",
        "tests/test_shared_penalty.py -k share_a_vector",
    ),
)

SWEEPS = [
    *rows(
        "csrc/cpu/vec/shared_sweep.h",
        SWEEP,
        ("gradient of the last partial sum only", "total[r][j] += sum[r][j];", "total[r][j] = sum[r][j];"),
        (
            "columns behind the last",
            "store_part(to + j * lanes, total[r][j], left);",
            "store(to + j * lanes, total[r][j]);",
        ),
        (
            "bias sums of the block before",
            "i < features * kLanes<A>; i += kLanes<A>) store(",
            "i < 0; i += kLanes<A>) store(",
        ),
        ("rows' gradient of one block", "end, b == first_block, ahead);", "end, true, ahead);"),
        ("weights not packed again", "s, s == first_computed, staging);", "s, false, staging);"),
        ("tiles of the first group", "{tiles.strip_by_feature(first), ", "{tiles.strip_by_feature(0), "),
    ),
    *rows(
        "csrc/cpu/vec/logit_gradient.h",
        SWEEP,
        (
            "all blocks' logits on one loan",
            "static_cast<char*>(args.loan) + begin * args.loan_row_bytes;",
            "static_cast<char*>(args.loan);",
        ),
        (
            "logits computed twice rounded once",
            "if (args.kept_type == Scalar::f16) round_tile",
            "if (args.kept_type == Scalar::f16 && pack) round_tile",
            f"{SWEEP} -k rounded_logits",
        ),
    ),
    *rows(
        "csrc/cpu/shared_backward.cpp",
        SWEEP,
        ("no means over kept rows", "if (split_.direct > 0) sum_dots(count);", ""),
        ("no chunks behind the sweep", "if (begin < logits_.rows) run_chunks(begin);", ""),
        ("logits on loan after the sweep", "args_.loan_end = 0;", ""),
    ),
]

HOST = [
    *rows(
        "csrc/cpu/shared_statistics.cpp",
        KERNELS,
        ("sign of the entropy's gradient", "scales[i] = -grad[i];", "scales[i] = grad[i];"),
        ("all logits stand rounding", "<= limit; });", "<= 1e30f; });", "tests/test_shared_loss.py -k offset"),
        ("forward says that it rounded", "(rounded ? 0u : 1u)", "0u", "tests/test_shared_loss.py -k beyond_it"),
    ),
    *rows(
        "csrc/cpu/shared_loss.cpp",
        "tests/test_shared_penalty.py -k finished",
        ("divergence not that of the uniform prior", "std::log(p * static_cast<double>(features))", "std::log(p)"),
        (
            "few rows' logits rounded",
            "rows >= std::min<int64_t>(features, 128);",
            "rows >= 0;",
            "tests/test_cpu_shared_kernels.py -k few_rows",
        ),
        ("regulariser without its floor", ", rows) + reg_shift);", ", rows));"),
        (
            "gradient of the balance without its weight",
            "rows, features, each * balance_weight);",
            "rows, features, each);",
        ),
    ),
    *rows(
        "csrc/cpu/shared_problem.cpp",
        KERNELS,
        ("rows of weight 0 not written", "if (used != nullptr) std::fill_n(out, to.numel(), T(0));", "", POISONED),
        ("stride of row_weight", "(values[i * stride]) != 0", "(values[i]) != 0"),
    ),
    *rows(
        "csrc/cpu/shared_gradients.h",
        KERNELS,
        (
            "gradient of rows of weight 0",
            "torch::stable::zero_(context);\n      torch::stable::zero_(input);",
            "torch::stable::zero_(context);",
            POISONED,
        ),
    ),
]

FAULTS = [*LOGITS, *PACKING, *FORWARD, *LOGIT_GRADIENT, *BACKWARD, *SWEEPS, *HOST]
