"""What the machine can do at best, measured in the same rounds as the contenders: read, copy, multiply."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

READ, COPY_WARM, COPY_FRESH, COPY_HUGE, MATMUL = "read", "copy warm", "copy fresh", "copy huge", "matmul"

_HUGE_PAGE = 2 << 20
_WORTHWHILE = 2 * _HUGE_PAGE

# Ways of doing the same thing, of which the fastest bounds a contender's time: one way each, then both of them.
Groups = tuple[tuple[str, ...], ...]
NEW_COPY = (COPY_FRESH, COPY_HUGE)


@dataclass(frozen=True)
class Floor:
    call: Callable[[], Tensor]
    bytes: int
    flops: int


def bound_ms(groups: Groups, medians: Mapping[str, float | None]) -> float:
    """The sum over the groups of the fastest measured floor in each."""
    fastest = (min((ms for name in group if (ms := medians.get(name)) is not None), default=0.0) for group in groups)
    return sum(fastest)


def _can_ask_for_huge_pages(source: Tensor) -> bool:
    return source.device.type == "cpu" and source.nbytes >= _WORTHWHILE and hasattr(mmap, "MADV_HUGEPAGE")


def _copy_into_huge_pages(source: Tensor) -> Tensor:
    """A copy in new memory whose page faults are few, as fusefeat's gradients are."""
    copy = torch.empty_like(source)
    begin = -(-copy.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (copy.data_ptr() + copy.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    # Advice: where the kernel does not take it, this is one more copy into new memory.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(max(end - begin, 0)), mmap.MADV_HUGEPAGE)
    return copy.copy_(source)


def floors(tokens: Tensor, matmul: tuple[int, int, int] | None = None) -> dict[str, Floor]:
    """By name: read the tokens once; copy them into memory in use already, or into new memory, which on a CPU
    costs the page faults that any newly made gradient costs, few with huge pages; one [m,k] x [k,n] product."""
    source = tokens.detach()
    size = source.numel() * source.element_size()
    warm = torch.empty_like(source).copy_(source)
    found = {
        READ: Floor(source.sum, size, 0),
        COPY_WARM: Floor(lambda: warm.copy_(source), 2 * size, 0),
        COPY_FRESH: Floor(source.clone, 2 * size, 0),
    }
    if _can_ask_for_huge_pages(source):
        found[COPY_HUGE] = Floor(lambda: _copy_into_huge_pages(source), 2 * size, 0)
    if matmul is not None:
        m, k, n = matmul
        # Numbers that differ: a GPU multiplies equal ones faster, since that takes less power.
        left = torch.empty(m, k, dtype=source.dtype, device=source.device).normal_()
        right = torch.empty(k, n, dtype=source.dtype, device=source.device).normal_()
        traffic = source.element_size() * (m * k + k * n + m * n)
        found[MATMUL] = Floor(lambda: left @ right, traffic, 2 * m * k * n)
    return found
