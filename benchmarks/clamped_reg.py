"""clamped_reg beside its plain formulation, eager and compiled."""

from __future__ import annotations

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


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    reference = shared_logits.reg_reference
    return shared_logits.cases(
        FAMILY, _ours, peers.clamped_reg, reference, [], device, dtype, shared_logits.shapes(quick)
    )


def targets(rows: list[Row]) -> list[Target]:
    return shared_logits.targets(FAMILY, rows)
