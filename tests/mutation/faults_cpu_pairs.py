"""Faults in the CPU pools' products of pairs of bfloat16. None where the processor has no such products."""

from __future__ import annotations

from pathlib import Path

from .table import rows

CPUINFO = Path("/proc/cpuinfo")
BORDERS = "tests/test_cpu_kernels.py -k {isa} and bfloat16_borders"
UNROUNDED = "tests/test_cpu_kernels.py -k {isa} and no_bfloat16"
SHARP = "tests/test_attention_pool.py -k eagers_own and bfloat16"

TILES = rows(
    "csrc/cpu/vec/pair_tiles.h",
    BORDERS,
    ("channels behind the last", "const __mmask32 rest = first_bf16(channels - d);", "const __mmask32 rest = ~0u;"),
    (
        "last channels left out",
        "if (d < channels) {\n    const __mmask32 rest",
        "if (false) {\n    const __mmask32 rest",
    ),
    ("a row behind the last", "r + 1 < list.count ? mask : 0;", "r + 1 <= list.count ? mask : 0;"),
    ("channels out of order", "0, 1, 2, 3, 16, 17, 18, 19,", "16, 17, 18, 19, 0, 1, 2, 3,"),
    (
        "rest of a coefficient left out",
        "coefficients[rests + k * ld + r / 2]",
        "coefficients[k * ld + r / 2] & 0",
        SHARP,
    ),
    ("sum not rescaled", "splat<float>(rescale[k]), halves[half]);", "splat<float>(1), halves[half]);"),
    ("first pair of vectors only", "for (int64_t j = 0; j < num_pairs; ++j) {", "for (int64_t j = 0; j < 1; ++j) {"),
    (
        "halves of a row exchanged",
        "sum[r][2 * c + 1], (__m512)sum[r][2 * c]",
        "sum[r][2 * c], (__m512)sum[r][2 * c + 1]",
    ),
    ("odd channel left out", "if (d < channels) add(d,", "if (false) add(d,"),
)

PRODUCTS = rows(
    "csrc/cpu/vec/pair_products.h",
    BORDERS,
    ("gradients that are no bfloat16", "active = !any_lane((IntOf<float>)lost);", "active = true;", UNROUNDED),
    (
        "coefficients behind the last row",
        "lanes_below<float>(r, list.count) ? value : FloatVec{};",
        "lanes_below<float>(r, list.count + 1) ? value : FloatVec{};",
    ),
    (
        "an odd vector's partner",
        "const __m512i high = j + 1 < count ? load_wide(a + width + d) : __m512i{};",
        "const __m512i high = load_wide(a + d);",
    ),
    ("second of a pair of coefficients", "_mm512_permutexvar_epi16(in_turn, both)", "both"),
    ("first sixteen vectors only", "j < count; j += 16) wide_rows(list, j,", "j < count; j += 16) wide_rows(list, 0,"),
)

GRADIENTS = rows(
    "csrc/cpu/vec/pool_backward.h",
    BORDERS,
    (
        "result left out of delta",
        "scratch.delta[k - num_queries] += dot(",
        "scratch.delta[k - num_queries] += 0 * dot(",
    ),
)

FAULTS = [*TILES, *PRODUCTS, *GRADIENTS] if CPUINFO.exists() and "avx512_bf16" in CPUINFO.read_text() else []
