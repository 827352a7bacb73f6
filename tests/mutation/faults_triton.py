"""Faults in the Triton kernels of the pools, which run in the interpreter here."""

from __future__ import annotations

from .table import rows

FILE = "tests/test_triton_attention_pool.py"
CASES = "tests/test_gpu_kernels_on_shared_cases.py -k triton"
RECIPE = f"{CASES} and recipe"
PADDED = f"{FILE} -k test_padded"
LONG = f"{FILE} -k long_bag"
STRIDES = f"{FILE} -k any_strides"
DROPPED = f"{FILE} -k minus_infinity"
PIECES = f"{FILE} -k more_pieces"

FAULTS = [
    *rows(
        "python/fusefeat/triton/_attention_pool_forward.py",
        LONG,
        ("output not rescaled", "pooled = pooled * fade[:, None] +", "pooled = pooled +"),
        ("mask dropped", "kept = in_range & (tl.load(mask_ptr", "kept = in_range | (tl.load(mask_ptr", PADDED),
        ("stride of the mask", "base + tokens * m_token, mask", "base + tokens, mask", STRIDES),
        ("pieces not rescaled", "piece = piece * fade.to(ACC) +", "piece = piece +"),
        (
            "value of a dropped token touched",
            'present = tl.where((score == float("-inf"))[:, :, None], 0.0, x)',
            "present = x",
            DROPPED,
        ),
        ("first pieces only", "in range(first, block, BLOCK_S):", "in range(first, first + 1, BLOCK_S):", PIECES),
        ("lse in single precision", "tl.exp(score - high - low))", "tl.exp(score - high))", f"{CASES} and far"),
        ("log of the sum subtracted", "peak.to(tl.float64) + log_total)", "peak.to(tl.float64) - log_total)", RECIPE),
    ),
    *rows(
        "python/fusefeat/triton/_attention_pool_backward.py",
        RECIPE,
        ("sign of delta", "weight * (dp - delta[None, :])", "weight * (dp + delta[None, :])"),
        ("scale left out", "term += (ds * scale)[:, :, None] * query", "term += ds[:, :, None] * query"),
        (
            "value of a dropped token touched",
            "* tl.where(absent[:, :, None], 0.0, x), axis=0)",
            "* x, axis=0)",
            DROPPED,
        ),
        (
            "carried part of delta left out",
            "delta += tl.sum(carried, axis=0) + tl.load(ends_ptr + at)",
            "delta += tl.load(ends_ptr + at)",
            LONG,
        ),
        ("first carried parts only", "in range(first, last, BLOCK_S):", "in range(first, first + 1, BLOCK_S):", PIECES),
        (
            "first partials only",
            "for tile in range(0, count, BLOCK_S):",
            "for tile in range(0, BLOCK_S, BLOCK_S):",
            PIECES,
        ),
        (
            "query stride of grad_weights",
            "(token * w_token)[:, None] + (index * w_query)[None, :]",
            "(token * w_token)[:, None] + index[None, :]",
            STRIDES,
        ),
    ),
    *rows(
        "python/fusefeat/triton/_partition.py",
        STRIDES,
        ("stride of the offsets", "tl.load(cu_ptr + index * cu_step).to", "tl.load(cu_ptr + index).to"),
        (
            "tokens before the first bag",
            "inside = inside & (rows >= start)",
            "inside = inside & (rows >= 0)",
            f"{FILE} -k outside_of",
        ),
        (
            "item on a border",
            "middle + 1, tokens) + middle < item",
            "middle + 1, tokens) + middle <= item",
            f"{FILE} -k block_boundaries",
        ),
    ),
    *rows(
        "python/fusefeat/triton/attention_pool.py",
        PADDED,
        ("bag stride in elements", "bag // self.vec, token // self.vec, self.x", "bag, token // self.vec, self.x"),
    ),
]
