"""shared_objective, penalty and regulariser from one pass, beside its plain formulation and the penalty alone."""

from __future__ import annotations

from functools import partial

import fusefeat
import torch
from torch import Tensor

from . import shared_logits
from . import shared_logits_peers as peers
from .case import Case, Contender, Target
from .results import OURS, Row, time_of

FAMILY = "shared_objective"
ALONE = "penalty alone"


def _ours(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    penalty, reg = fusefeat.shared_objective(x, None, weight, margin=peers.MARGIN, backend=backend)
    return penalty + reg


def _cases(device: torch.device, dtype: torch.dtype, shapes: shared_logits.Shapes) -> list[Case]:
    penalty = partial(shared_logits.penalty, backend=None)
    alone = Contender(ALONE, None, lambda inputs: peers.bind(penalty, inputs), shared_logits.penalty_reference)
    reference = shared_logits.objective_reference
    return shared_logits.cases(FAMILY, _ours, peers.shared_objective, reference, [alone], device, dtype, shapes)


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    return _cases(device, dtype, shared_logits.shapes(quick))


def scaling(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, list[tuple[int, Case]]]:
    """By axis: sizes and their cases."""
    return shared_logits.scaling(partial(_cases, device, dtype), quick)


def targets(rows: list[Row]) -> list[Target]:
    """As of the other two, and: the regulariser costs a tenth of the penalty at most."""
    found = shared_logits.targets(FAMILY, rows)
    for dtype in ("fp32", "bf16"):
        of_type = [row for row in rows if (row.family, row.device, row.dtype) == (FAMILY, "cpu", dtype)]
        for name in shared_logits.PROMISED if of_type else ():
            text = f"{dtype} {shared_logits.shape_of(name)} forward+backward at most 1.1x the penalty alone"
            both, alone = (time_of(of_type, name, "both", contender) for contender in (OURS, ALONE))
            if both is None or alone is None:
                found.append(Target(text, None, False))
            else:
                found.append(Target(text, f"{both / alone:.2f}x", both / alone <= 1.1))
    return found
