"""shared_penalty beside its plain formulation, eager and compiled, and torch's own chunked cross entropy."""

from __future__ import annotations

from functools import partial

import torch

from . import shared_logits
from . import shared_logits_peers as peers
from .case import Case, Target
from .results import Row

FAMILY = "shared_penalty"


def _cases(device: torch.device, dtype: torch.dtype, shapes: shared_logits.Shapes) -> list[Case]:
    ours, reference = shared_logits.penalty, shared_logits.penalty_reference
    others = peers.cross_entropies()
    return shared_logits.cases(FAMILY, ours, peers.shared_penalty, reference, others, device, dtype, shapes)


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    return _cases(device, dtype, shared_logits.shapes(quick))


def scaling(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, list[tuple[int, Case]]]:
    """By axis: sizes and their cases."""
    return shared_logits.scaling(partial(_cases, device, dtype), quick)


def targets(rows: list[Row]) -> list[Target]:
    return shared_logits.targets(FAMILY, rows)
