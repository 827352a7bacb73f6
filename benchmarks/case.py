"""What a family's module describes: cases (a shape and what may be done with it) and contenders (who does it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .floor import Floor, Groups

Inputs = dict[str, Tensor]

MODES = ("forward", "backward", "both")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Skip(Exception):
    """A contender that cannot take part here; the message says why."""


@dataclass(frozen=True)
class Bound:
    """A contender with its inputs: a call without arguments, and the leaves whose gradients it is timed for."""

    forward: Callable[[], Tensor]
    leaves: Inputs


@dataclass(frozen=True)
class Contender:
    """``peer`` is the word that --compare knows it by, None for fusefeat itself.

    One with a ``reference`` of its own computes something else on the same inputs: it is shown beside the others
    but is nobody's rival.
    """

    name: str
    peer: str | None
    bind: Callable[[Inputs], Bound]
    reference: Callable[[Inputs, Tensor | None], Inputs] | None = None

    @property
    def ours(self) -> bool:
        return self.peer is None

    @property
    def kind(self) -> str:
        return "other" if self.reference is not None else "ours" if self.ours else "peer"


@dataclass(frozen=True)
class Work:
    """What any implementation must move and compute, and the floors that together bound its time from below: of each
    group the fastest one."""

    bytes: int
    flops: int
    floors: Groups


@dataclass(frozen=True)
class Case:
    """One shape. ``reference`` maps inputs and a gradient (None: forward only) to "out" and "grad <name>", float64.

    ``floors`` makes what is measured in place of reading and copying x; a ``slow`` case runs only when asked for.
    """

    family: str
    name: str
    shape: str
    used_by: str
    inputs: Callable[[], Inputs]
    leaves: tuple[str, ...]
    reference: Callable[[Inputs, Tensor | None], Inputs]
    contenders: Sequence[Contender]
    work: dict[str, Work]
    # Errors of ours are held against this contender's, with the contract's factor and floor.
    baseline: str = "eager"
    gradient_slack: tuple[float, float] = (2.0, 1e-6)
    peer_slack: float = 1.0
    matmul: tuple[int, int, int] | None = None
    floors: Callable[[Inputs], dict[str, Floor]] | None = None
    slow: bool = False


@dataclass(frozen=True)
class Target:
    """A promise and what was measured; ``got`` is None when the run did not include what it needs."""

    text: str
    got: str | None
    met: bool
