"""Runs the operators, compiled with the address sanitizer, over shapes and strides; see test_cuda_on_cpu_memory.py."""

from __future__ import annotations

import ctypes
import math
import sys

import torch

BAD_OFFSETS = [
    [0, 30, 1000],
    [-9, -3, 40, 2**40, 90],
    [0, 70, 30, 50, 40, 90],
    [90, 0, 90, 0],
    [-(2**62), 2**62, -1, 2**63 - 1],
]


def run(ops, tokens, queries, offsets=None, mask=None) -> None:
    query_axis = () if queries is None else (queries,)
    acc = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    attention = tokens, torch.randn(*query_axis, tokens.shape[-1], dtype=acc), mask, offsets, 1.0
    softmax = tokens, torch.randn(*tokens.shape[:-1], *query_axis, dtype=acc), mask, offsets
    results = ops.attention_pool(*attention, True)
    grads = torch.randn_like(results[0]), torch.randn_like(results[2])
    ops.attention_pool_backward(*grads, *attention, *results, True, True)
    results = ops.softmax_pool(*softmax, True)
    ops.softmax_pool_backward(*grads, *softmax, *results, True, True)


def check_pools(ops) -> None:
    for channels in (10, 64, 97, 600):
        for queries, dtype in ((None, torch.bfloat16), (3, torch.float32), (None, torch.float64)):
            # No spare bytes behind the last token.
            tokens = torch.empty(90 * channels, dtype=dtype).normal_().view(90, channels)
            for offsets in BAD_OFFSETS:
                run(ops, tokens, queries, torch.tensor(offsets))
            run(ops, tokens.view(2, 45, channels), queries, None, torch.rand(2, 45) > 0.2)
            run(ops, tokens.view(2, 45, channels)[:, 1::4], queries)


def exact(*shape, dtype):
    """No spare bytes behind the last element."""
    return torch.empty(math.prod(shape), dtype=dtype).normal_().view(shape)


def run_shared(ops, rows, weight, split, operand=0) -> None:
    acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
    count, features = rows.shape[0], weight.shape[0]
    logits = rows[:split], rows[split:], weight, exact(features, dtype=rows.dtype), 1.0
    for keep in (0, count):
        entropy, lse, *_, kept = ops.shared_penalty(*logits, torch.rand(count).to(acc), operand, True, keep)
        grads = [torch.randn(n, dtype=acc) for n in (count, count, features, count)]
        saved = entropy, lse, kept
        ops.shared_penalty_backward(*grads, *logits, torch.rand(count).to(acc), operand, *saved, [True] * 5)
    matrix = ops.shared_assignment(*logits, operand)
    ops.shared_assignment_backward(matrix, *logits, operand, matrix, [True] * 4)
    matrix = ops.clamped_activation(*logits, operand)
    ops.clamped_activation_backward(matrix, *logits, operand, [True] * 4)


def check_shared(ops) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for count, channels, features in ((131, 24, 130), (20, 7, 129), (2, 16, 1100)):
            weight = exact(features, channels, dtype=dtype)
            run_shared(ops, exact(count, channels, dtype=dtype), weight, count // 3)
        run_shared(ops, exact(channels, count, dtype=dtype).t(), weight, count // 3)
    for operand in (1, 2):
        run_shared(ops, exact(50, 24, dtype=torch.float32), exact(140, 24, dtype=torch.float32), 20, operand)


def plant(library: str, fault: int) -> None:
    source, out = torch.ones(65), torch.empty(64)
    ctypes.CDLL(library).run_planted(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()), fault)


if __name__ == "__main__":
    if sys.argv[1] == "planted":
        plant(sys.argv[2], int(sys.argv[3]))
    else:
        torch.set_num_threads(1)
        torch.ops.load_library(sys.argv[2])
        {"pools": check_pools, "shared": check_shared}[sys.argv[1]](getattr(torch.ops, sys.argv[3]))
    print("done")
