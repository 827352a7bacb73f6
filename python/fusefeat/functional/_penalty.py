"""From the statistics of the rows to the penalty, over process groups too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks
from ..ops import shared_loss
from ..ops import shared_penalty as operators
from ..reference import shared_penalty as reference
from ._shared import Logits, ordered_sum


class SharedStats(NamedTuple):
    """Statistics of the assignment P, all differentiable and in the accumulation type (entropies in nats).

    Attributes:
        conditional_entropy: sum_n r_n H(P_n), a scalar; over the whole group with ``process_group``.
        marginal_entropy: H(mean_probs), a scalar; likewise.
        mean_probs: sum_n r_n P_n, [F]; likewise.
        row_entropy: H(P_n), [N]; 0 for rows of weight 0.
        lse: log sum_k exp(z_nk), [N]; 0 for rows of weight 0.
    """

    conditional_entropy: Tensor
    marginal_entropy: Tensor
    mean_probs: Tensor
    row_entropy: Tensor
    lse: Tensor


def row_statistics(function: str, logits: Logits, backend: str | None, with_clamp: bool) -> tuple[Tensor, ...]:
    """row_entropy, lse, prob_sum, row_excess, fired."""
    chosen = backends.choose(function, backend, logits.input)
    if chosen == "reference":
        return reference.statistics(*logits, with_clamp)
    checks.no_forward_mode(function, *logits)
    keep = _rows_to_keep(logits, chosen)
    return operators.operator("shared_penalty", chosen)(*logits, with_clamp, keep)[:5]


def _rows_to_keep(logits: Logits, backend: str, kept: torch.dtype | None = None) -> int:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 0
    sizes = logits.rows, logits.features, logits.weight.shape[1]
    return operators.rows_to_keep(*sizes, logits.input.dtype, backend, logits.operand, kept)


def finished_scalars(
    function: str,
    logits: Logits,
    factors: tuple[float, float],
    reg: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Penalty and regulariser (empty without ``reg``, its scale and shift) from the operator that finishes both."""
    checks.no_forward_mode(function, *logits)
    scale, shift = (0.0, 0.0) if reg is None else reg
    kept = shared_loss.kept_dtype(logits.input.dtype, reg is not None, logits.rows, logits.features)
    keep = _rows_to_keep(logits, "cpu", kept)
    args = (*logits[:5], logits.operand, *factors, reg is not None, scale, shift, keep)
    return shared_loss.operator("shared_loss")(*args)[:2]


def all_reduce(value: Tensor, process_group: Any) -> Tensor:
    from torch.distributed import _functional_collectives

    return _functional_collectives.all_reduce(value, "sum", process_group)


def reduce_penalty(
    logits: Logits,
    statistics: tuple[Tensor, ...],
    prior: Any,
    entropy_weight: float,
    balance_weight: float,
    process_group: Any,
) -> tuple[Tensor, SharedStats]:
    row_entropy, lse, prob_sum = statistics[:3]
    row_weight = logits.row_weight
    if row_weight is None:
        entropy_sum = ordered_sum(row_entropy)
        total = torch.full((), logits.rows, dtype=row_entropy.dtype, device=row_entropy.device)
    else:
        entropy_sum, total = ordered_sum(row_weight * row_entropy), ordered_sum(row_weight)
    if process_group is not None:
        # One vector, hence one collective, whose backward sums the gradients of all ranks.
        packed = all_reduce(torch.cat([entropy_sum[None], total[None], prob_sum]), process_group)
        entropy_sum, total, prob_sum = packed[0], packed[1], packed[2:]
    # No rows, or none with a weight: everything is 0 and so are the gradients.
    total = torch.where(total > 0, total, 1.0)
    conditional, mean_probs = entropy_sum / total, prob_sum / total
    used = ~(mean_probs <= 0)  # a NaN stays
    log_probs = torch.where(used, mean_probs, 1.0).log()
    marginal = -ordered_sum(mean_probs * log_probs)
    if prior is None:
        log_prior: Any = -torch.full((), logits.features, dtype=mean_probs.dtype, device=mean_probs.device).log()
    else:
        log_prior = torch.where(used, prior.to(mean_probs.dtype), 1.0).log()
    divergence = ordered_sum(torch.where(used, mean_probs * (log_probs - log_prior), 0.0))
    penalty = entropy_weight * conditional + balance_weight * divergence
    return penalty, SharedStats(conditional, marginal, mean_probs, row_entropy, lse)


def check_penalty(
    function: str, logits: Logits, prior: Any, entropy_weight: Any, balance_weight: Any, process_group: Any
) -> tuple[float, float]:
    if prior is not None:
        checks.vector(function, "prior", prior, logits.features, "F (rows of weight)", logits.input)
        checks.not_negative(function, "prior", prior)
    if process_group is not None:
        checks.process_group(function, process_group)
    return (
        checks.finite_number(function, "entropy_weight", entropy_weight),
        checks.finite_number(function, "balance_weight", balance_weight),
    )
