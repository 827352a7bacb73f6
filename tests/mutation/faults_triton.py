"""Faults in the Triton kernels, which run in the interpreter here."""

from __future__ import annotations

from .table import rows

KERNELS = "tests/test_triton_attention_pool.py"
CASES = "tests/test_gpu_kernels_on_shared_cases.py -k triton"

FAULTS = [
    *rows(
        "python/fusefeat/triton/_attention_pool_forward.py",
        CASES,
        ("output not rescaled", "pooled = pooled * fade[:, None] +", "pooled = pooled +"),
        ("masked tokens read", "mask=keep[:, None, None] & (channel", "mask=(tokens >= 0)[:, None, None] & (channel"),
        ("stride of the mask", "base + tokens * m_token, mask", "base + tokens, mask"),
        ("pieces not rescaled", "piece = piece * fade.to(ACC) +", "piece = piece +"),
        (
            "value of a dropped token touched",
            'present = tl.where((score == float("-inf"))[:, :, None], 0.0, x)',
            "present = x",
        ),
        ("lse in single precision", "tl.exp(score - high - low))", "tl.exp(score - high))", f"{CASES} and far"),
        (
            "lse of an empty bag",
            'lse = tl.where(empty, float("-inf"), peak.to(tl.float64) + log_total)',
            "lse = peak.to(tl.float64) + log_total",
            KERNELS,
        ),
    ),
    *rows(
        "python/fusefeat/triton/_attention_pool_backward.py",
        CASES,
        ("sign of delta", "weight * (dp - delta[None, :])", "weight * (dp + delta[None, :])"),
        ("scale left out", "term += (ds * scale)[:, :, None] * query", "term += ds[:, :, None] * query"),
        ("value of a dropped token touched", "* tl.where(absent[:, :, None], 0.0, x), axis=0)", "* x, axis=0)"),
        (
            "carried part of delta left out",
            "delta += tl.sum(carried, axis=0) + tl.load(ends_ptr + at)",
            "delta += tl.load(ends_ptr + at)",
        ),
        ("first partials only", "for tile in range(0, count, BLOCK_S):", "for tile in range(0, BLOCK_S, BLOCK_S):"),
        (
            "query stride of grad_weights",
            "(token * w_token)[:, None] + (index * w_query)[None, :]",
            "(token * w_token)[:, None] + index[None, :]",
        ),
    ),
    *rows(
        "python/fusefeat/triton/_partition.py",
        CASES,
        ("stride of the offsets", "tl.load(cu_ptr + index * cu_step).to", "tl.load(cu_ptr + index).to"),
        ("tokens before the first bag", "inside = inside & (rows >= start)", "inside = inside & (rows >= 0)", KERNELS),
        ("item on a border", "middle + 1, tokens) + middle < item", "middle + 1, tokens) + middle <= item"),
    ),
    *rows(
        "python/fusefeat/triton/attention_pool.py",
        CASES,
        ("bag stride in elements", "bag // self.vec, token // self.vec, self.x", "bag, token // self.vec, self.x"),
    ),
]
