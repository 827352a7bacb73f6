"""Cold caches: every call gets the next of several copies of its inputs, more of them than the caches hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from .case import Bound, Case, Contender, Inputs
from .floor import Floor

_MOST_COPIES = 64
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; a generous guess where nobody tells."""
    guess = 64 << 20
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", guess))
    try:
        sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
        units = {"K": 1 << 10, "M": 1 << 20}
        return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=guess)
    except (OSError, KeyError, ValueError):
        return guess


def copies(inputs: Inputs, cache: int) -> list[Inputs]:
    """The inputs and as many copies of them as take two caches together: the last use of each is then evicted."""
    count = min(max(-(-2 * cache // max(_size(inputs), 1)), 2), _MOST_COPIES)
    return [inputs] + [
        {name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in inputs.items()}
        for _ in range(count - 1)
    ]


def _size(inputs: Inputs) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())


def are_evicted(all_inputs: Sequence[Inputs], device: torch.device) -> bool:
    """Whether so many copies are more than the caches hold. The smallest inputs would need thousands."""
    return _size(all_inputs[0]) * len(all_inputs) > cache_bytes(device)


def rotation(bounds: Sequence[Bound]) -> Bound:
    """Bounds in turn: each forward is the next one's, and the leaves are always those of the last forward."""
    turns, leaves = cycle(bounds), dict(bounds[0].leaves)

    def forward() -> Tensor:
        bound = next(turns)
        leaves.update(bound.leaves)
        return bound.forward()

    return Bound(forward, leaves)


def _bind_all(bind: Callable[[Inputs], Bound], all_inputs: Sequence[Inputs], inputs: Inputs) -> Bound:
    return rotation([bind(inputs), *(bind(other) for other in all_inputs[1:])])


def rotating(case: Case, all_inputs: Sequence[Inputs]) -> Case:
    """The case with contenders that go through all inputs."""

    def turned(contender: Contender) -> Contender:
        return dataclasses.replace(contender, bind=partial(_bind_all, contender.bind, all_inputs))

    return dataclasses.replace(case, contenders=[turned(contender) for contender in case.contenders])


def rotating_floors(found: Sequence[dict[str, Floor]]) -> dict[str, Floor]:
    """Floors of all inputs, called in turn."""

    def turned(floors: Sequence[Floor]) -> Floor:
        turns = cycle([floor.call for floor in floors])
        return dataclasses.replace(floors[0], call=lambda: next(turns)())

    return {name: turned([floors[name] for floors in found]) for name in found[0]}
