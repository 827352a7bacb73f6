"""Runs the pools, compiled with the address sanitizer, over shapes and offsets; see test_cuda_on_cpu_memory.py."""

from __future__ import annotations

import ctypes
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


def check_pools(library: str, namespace: str) -> None:
    torch.ops.load_library(library)
    ops = getattr(torch.ops, namespace)
    torch.set_num_threads(1)
    for channels in (10, 64, 97, 600):
        for queries, dtype in ((None, torch.bfloat16), (3, torch.float32), (None, torch.float64)):
            # No spare bytes behind the last token.
            tokens = torch.empty(90 * channels, dtype=dtype).normal_().view(90, channels)
            for offsets in BAD_OFFSETS:
                run(ops, tokens, queries, torch.tensor(offsets))
            run(ops, tokens.view(2, 45, channels), queries, None, torch.rand(2, 45) > 0.2)
            run(ops, tokens.view(2, 45, channels)[:, 1::4], queries)


def plant(library: str, fault: int) -> None:
    source, out = torch.ones(65), torch.empty(64)
    ctypes.CDLL(library).run_planted(ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()), fault)


if __name__ == "__main__":
    if sys.argv[1] == "pools":
        check_pools(*sys.argv[2:])
    else:
        plant(sys.argv[2], int(sys.argv[3]))
    print("done")
