"""What benchmarks/triton_resources.py compiles: the operators on tensors of chosen sizes, and who is to see which."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from fusefeat.triton import _attention_pool_tuning as tuning
from fusefeat.triton import attention_pool as pool_operators
from fusefeat.triton import clamped_reg as clamp_operators
from fusefeat.triton import shared_penalty as shared_operators

ARCHS = (80, 90, 100)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def run_pools(dtype: torch.dtype, channels: int, queries: int | None, packed: bool, masked: bool, extras: bool) -> None:
    """Forward and backward of both pools, on fake tensors."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    bags, tokens = 16, 4096
    shape = (bags * tokens,) if packed else (bags, tokens)
    axis = () if queries is None else (queries,)
    x = torch.empty(*shape, channels, dtype=dtype)
    mask = torch.empty(shape, dtype=torch.bool) if masked and not packed else None
    cu = torch.empty(bags + 1, dtype=torch.int32) if packed else None
    query = torch.empty(*axis, channels, dtype=dtype)
    scores = torch.empty(*shape, *axis, dtype=dtype)
    grad_out = torch.empty(bags, *axis, channels, dtype=acc)
    grad_weights = torch.empty(*shape, *axis, dtype=acc) if extras else None
    out, lse, weights = pool_operators.attention_pool(x, query, mask, cu, 0.5, extras)
    pool_operators.attention_pool_backward(
        grad_out, grad_weights, x, query, mask, cu, 0.5, out, lse, weights, True, not (extras and masked)
    )
    out, lse, weights = pool_operators.softmax_pool(x, scores, mask, cu, extras)
    pool_operators.softmax_pool_backward(
        grad_out, grad_weights, x, scores, mask, cu, out, lse, weights, True, not (extras and masked)
    )


def run_shared(dtype: torch.dtype, operand: int, rows: int, channels: int, features: int, extras: bool) -> None:
    """Forward and backward of the shared-logits operators; extras: bias, weights, a context, everything at once."""
    x, weight = torch.empty(rows, channels, dtype=dtype), torch.empty(features, channels, dtype=dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    context = torch.empty(rows, channels, dtype=dtype) if extras else None
    count = 2 * rows if extras else rows
    row_weight = torch.empty(count, dtype=acc) if extras else None
    bias = torch.empty(features, dtype=acc) if extras else None
    args = (context, x, weight, bias, 0.5)
    per_row, per_feature = torch.empty(count, dtype=acc), torch.empty(features, dtype=acc)
    matrix = torch.empty(count, features, dtype=dtype)
    needs = [extras, True, True, extras]
    *_, kept = shared_operators.shared_penalty(*args, row_weight, operand, extras, count if extras else 0)
    incoming = (per_row, per_row if extras else None, per_feature, per_row if extras else None)
    shared_operators.shared_penalty_backward(
        *incoming, *args, row_weight, operand, per_row, per_row, kept, [*needs, extras]
    )
    clamp_operators.clamped_reg(*args, row_weight, operand)
    clamp_operators.clamped_reg_backward(per_row, *args, row_weight, operand, needs)
    shared_operators.shared_assignment(*args, operand)
    shared_operators.shared_assignment_backward(matrix, *args, operand, matrix, needs)
    clamp_operators.clamped_activation(*args, operand)
    clamp_operators.clamped_activation_backward(matrix, *args, operand, needs)


def all_cases(full: bool) -> list[tuple[Any, ...]]:
    """(dtype, channels, queries, packed, masked, extras, the architectures to compile for)."""
    widths = [row.block_d for row in tuning.FORWARD.rows[0]]
    everything = (False, True)
    if full:
        dtypes = DTYPES.values()
        cases = itertools.product(
            dtypes, [10, *widths, 600, 8192], (None, 2, 3, 17), everything, everything, everything
        )
        return [(*case, ARCHS) for case in cases]
    # Every configuration once; the options, dtypes and architectures on a few of them.
    cases = [
        (torch.bfloat16, width, queries, True, False, False, (90,)) for width in widths for queries in (None, 2, 4)
    ]
    cases += [(dtype, 512, None, False, True, False, ARCHS) for dtype in (torch.bfloat16, torch.float32)]
    cases += [(torch.bfloat16, 512, 17, False, True, True, (80,)), (torch.bfloat16, 8192, 3, True, False, True, (90,))]
    cases += [
        (torch.float16, 600, None, False, False, True, (100,)),
        (torch.float64, 256, 2, False, False, False, (90,)),
    ]
    return [
        *cases,
        (torch.float32, 10, 2, True, False, False, (80,)),
        (torch.float32, 1024, 4, True, False, False, (100,)),
    ]


def shared_cases(full: bool) -> list[tuple[Any, ...]]:
    """(dtype, operand, rows, channels, features, extras, the architectures to compile for)."""
    large, small, odd, large_odd = (2048, 256, 1024), (64, 128, 96), (100, 37, 75), (2051, 250, 1030)
    if full:
        types = [*((dtype, 0) for dtype in DTYPES.values()), (torch.float32, 1), (torch.float32, 2)]
        cases = itertools.product(types, (large, small, odd, large_odd), (False, True))
        return [(*kind, *size, extras, ARCHS) for kind, size, extras in cases]
    # Every configuration once; FUSEFEAT_FULL has the rest of types and architectures.
    return [
        (torch.bfloat16, 0, *large, True, (90,)),
        (torch.bfloat16, 0, *small, False, (100,)),
        (torch.bfloat16, 0, *odd, True, (90,)),
        (torch.float32, 2, *large, False, (80,)),
        (torch.float32, 0, *odd, True, (90,)),
        (torch.float64, 0, *small, False, (80,)),
    ]
