"""Tools for vmap rules: turn the mapped axis into more bags of one call, or call once per entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def to_front(value: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped axis first; a tensor that is not mapped is expanded."""
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def fold(value: Tensor, dim: int | None, size: int) -> Tensor:
    """[..., size, ...] -> [size * first axis, ...]."""
    return to_front(value, dim, size).flatten(0, 1)


def unfold(value: Tensor, size: int) -> Tensor:
    """The inverse: [size * n, ...] -> [size, n, ...]."""
    return value.unflatten(0, (size, value.shape[0] // size))


def loop(call: Callable[..., Sequence[Tensor]], size: int, dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """One call per entry of the mapped axis; results stacked in front."""
    results = [
        call(*(arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, dims, strict=True)))
        for index in range(size)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
