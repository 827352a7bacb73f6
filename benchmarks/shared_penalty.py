"""shared_penalty beside its plain formulation, eager and compiled, and torch's own chunked cross entropy."""

from __future__ import annotations

import torch

from . import shared_logits
from . import shared_logits_peers as peers
from .case import Case, Target
from .results import Row

FAMILY = "shared_penalty"


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    ours, reference = shared_logits.penalty, shared_logits.penalty_reference
    others = [peers.cross_entropy()]
    return shared_logits.cases(FAMILY, ours, peers.shared_penalty, reference, others, device, dtype, quick)


def targets(rows: list[Row]) -> list[Target]:
    return shared_logits.targets(FAMILY, rows)
