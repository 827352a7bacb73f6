"""What the machine can do at best, measured in the same rounds as the contenders: read, copy, multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

READ, COPY_WARM, COPY_FRESH, MATMUL = "read", "copy warm", "copy fresh", "matmul"


@dataclass(frozen=True)
class Floor:
    call: Callable[[], Tensor]
    bytes: int
    flops: int


def floors(tokens: Tensor, matmul: tuple[int, int, int] | None = None) -> dict[str, Floor]:
    """By name: read the tokens once; copy them into memory in use already, or into new memory, which on a CPU
    costs the page faults that any newly made gradient costs; one [m,k] x [k,n] product."""
    source = tokens.detach()
    size = source.numel() * source.element_size()
    warm = torch.empty_like(source).copy_(source)
    found = {
        READ: Floor(source.sum, size, 0),
        COPY_WARM: Floor(lambda: warm.copy_(source), 2 * size, 0),
        COPY_FRESH: Floor(source.clone, 2 * size, 0),
    }
    if matmul is not None:
        m, k, n = matmul
        left = torch.ones(m, k, dtype=source.dtype, device=source.device)
        right = torch.ones(k, n, dtype=source.dtype, device=source.device)
        traffic = source.element_size() * (m * k + k * n + m * n)
        found[MATMUL] = Floor(lambda: left @ right, traffic, 2 * m * k * n)
    return found
