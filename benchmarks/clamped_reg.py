"""clamped_reg beside its plain formulation, eager and compiled."""

from __future__ import annotations

from functools import partial

import fusefeat
import torch
from torch import Tensor

from . import shared_logits
from . import shared_logits_peers as peers
from .case import Case, Target
from .results import Row

FAMILY = "clamped_reg"


def _ours(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    return fusefeat.clamped_reg(x, None, weight, margin=peers.MARGIN, backend=backend)


def _cases(device: torch.device, dtype: torch.dtype, shapes: shared_logits.Shapes) -> list[Case]:
    reference = shared_logits.reg_reference
    return shared_logits.cases(FAMILY, _ours, peers.clamped_reg, reference, [], device, dtype, shapes)


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    return _cases(device, dtype, shared_logits.shapes(quick))


def scaling(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, list[tuple[int, Case]]]:
    """By axis: sizes and their cases."""
    return shared_logits.scaling(partial(_cases, device, dtype), quick)


def targets(rows: list[Row]) -> list[Target]:
    return shared_logits.targets(FAMILY, rows)
