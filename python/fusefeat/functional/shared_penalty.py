"""Shared assignment, the shared penalty, and the objective of penalty and regulariser in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, checks
from ..ops import shared_loss
from ..ops import shared_penalty as operators
from ..reference import shared_penalty as reference
from ._shared import Logits, ordered_sum, prepare
from .clamped_reg import ClampStats, check_reduction, reduce, scale_and_shift


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


def shared_assignment(
    input: Tensor,
    context: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margin: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Soft assignment of rows to shared features: ``softmax(margin * (cat(context, input) weight^T + bias), 1)``.

    Args:
        input: [Ni,D] rows; float16, bfloat16, float32 or float64, any strides.
        context: [Nc,D] rows that come first, in the dtype of ``input``, or None.
        weight: [F,D] shared features (prototypes, codebook entries), as in ``torch.nn.functional.linear``.
        bias: [F] or None; -inf switches a feature off.
        margin: inverse temperature, a finite number above 0.
        backend: None (automatic), "reference", "cpu", "cuda" or "triton".

    Returns:
        P, [Nc+Ni,F], in the dtype of ``input``.

    Raises:
        TypeError: wrong types or dtypes. ValueError: wrong shapes, devices or margin, or a backend that cannot take
        the input. NotImplementedError: forward-mode differentiation on a compiled backend.
    """
    logits = prepare("shared_assignment", input, context, weight, bias, margin)
    chosen = backends.choose("shared_assignment", backend, input)
    args = (logits.context, logits.input, logits.weight, logits.bias, logits.margin, logits.operand)
    if chosen == "reference":
        return reference.assignment(*args).to(input.dtype)
    checks.no_forward_mode("shared_assignment", chosen, *logits)
    return operators.operator("shared_assignment", chosen)(*args)[0].to(input.dtype)


def _statistics(function: str, logits: Logits, backend: str | None, with_clamp: bool) -> tuple[Tensor, ...]:
    """row_entropy, lse, prob_sum, row_excess, fired."""
    chosen = backends.choose(function, backend, logits.input)
    if chosen == "reference":
        return reference.statistics(*logits, with_clamp)
    checks.no_forward_mode(function, chosen, *logits)
    keep = _rows_to_keep(logits, chosen)
    return operators.operator("shared_penalty", chosen)(*logits, with_clamp, keep)[:5]


def _rows_to_keep(logits: Logits, backend: str) -> int:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 0
    sizes = logits.rows, logits.features, logits.weight.shape[1]
    return operators.rows_to_keep(*sizes, logits.input.dtype, backend, logits.operand)


def _scalars(
    function: str,
    logits: Logits,
    factors: tuple[float, float],
    reg: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Penalty and regulariser (empty without ``reg``, its scale and shift) from the operator that finishes both."""
    checks.no_forward_mode(function, "cpu", *logits)
    scale, shift = (0.0, 0.0) if reg is None else reg
    args = (*logits[:5], logits.operand, *factors, reg is not None, scale, shift, _rows_to_keep(logits, "cpu"))
    return shared_loss.operator("shared_loss")(*args)[:2]


def _all_reduce(value: Tensor, process_group: Any) -> Tensor:
    from torch.distributed import _functional_collectives

    return _functional_collectives.all_reduce(value, "sum", process_group)


def _penalty(
    function: str,
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
        packed = _all_reduce(torch.cat([entropy_sum[None], total[None], prob_sum]), process_group)
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


def _check_penalty(
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


def shared_penalty(
    input: Tensor,
    context: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margin: float = 1.0,
    row_weight: Tensor | None = None,
    prior: Tensor | None = None,
    entropy_weight: float = 1.0,
    balance_weight: float = 1.0,
    process_group: Any = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, SharedStats]:
    r"""Penalise ambiguous rows and unbalanced use of the shared features, without storing the [N,F] logits.

    .. math:: \text{penalty} = \alpha \sum_n r_n H(P_n) + \beta \, \mathrm{KL}(\bar p \,\|\, \text{prior}), \qquad
        \bar p = \sum_n r_n P_n

    with P as in :func:`shared_assignment`. With both weights 1 and the uniform prior this is log F - I(row; feature),
    in [0, log F]: the information-maximisation loss (Krause, Perona & Gomes 2010; Hu et al. 2017), the mean-entropy
    maximisation of MSN (Assran et al. 2022), the codebook entropy loss of lookup-free quantisers (Yu et al. 2024).

    Memory beyond inputs, parameters and their gradients is O(N + F) plus at most 64 MiB. On the CPU the backward
    finds up to 32 MiB of the logits kept (less beside features so many that 256 rows of logits take over 16 MiB, none
    with fewer than 32 channels and over 8 MiB of logits) and recomputes those of the other rows:
    ``fusefeat.ops.shared_penalty.rows_to_keep``.

    Args:
        input, context, weight, bias, margin, backend: as in :func:`shared_assignment`.
        row_weight: [N] weights of the rows, context first, not negative, differentiable; r is row_weight over its
            sum, 1/N when None. Rows of weight 0 are not read.
        prior: [F], not negative, differentiable; uniform when None.
        entropy_weight, balance_weight: the factors alpha and beta.
        process_group: a ``torch.distributed`` group over which the statistics are summed, so that every rank returns
            the same loss and parameter gradients averaged by DDP equal those of the joined batch. Every rank must
            call. Gradients of inputs come out larger by the world size, since DDP averages parameters only.
        return_stats: also return a :class:`SharedStats`.

    Returns:
        A scalar in the accumulation type (float32 for half types and float32, float64 for float64), or a pair.
        No rows, or only rows of weight 0: 0.

    Raises:
        As :func:`shared_assignment`; ValueError also for negative weights or priors (eager CPU tensors).
    """
    logits = prepare("shared_penalty", input, context, weight, bias, margin, row_weight)
    factors = _check_penalty("shared_penalty", logits, prior, entropy_weight, balance_weight, process_group)
    if prior is None and process_group is None and not return_stats:
        chosen = backends.choose("shared_penalty", backend, logits.input)
        if shared_loss.serves(chosen, logits.row_weight):
            return _scalars("shared_penalty", logits, factors, None)[0]
    statistics = _statistics("shared_penalty", logits, backend, with_clamp=False)
    penalty, stats = _penalty("shared_penalty", logits, statistics, prior, *factors, process_group)
    return (penalty, stats) if return_stats else penalty


def shared_objective(
    input: Tensor,
    context: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margin: float = 1.0,
    row_weight: Tensor | None = None,
    prior: Tensor | None = None,
    entropy_weight: float = 1.0,
    balance_weight: float = 1.0,
    process_group: Any = None,
    subtract_floor: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, SharedStats, ClampStats]:
    """:func:`shared_penalty` and :func:`fusefeat.clamped_reg` from one pass over the logits.

    Args and Raises: as those two. With ``process_group`` the penalty is global and the regulariser is that of the
    local rows.

    Returns:
        (penalty, reg), or (penalty, reg, SharedStats, ClampStats) with ``return_stats``.
    """
    logits = prepare("shared_objective", input, context, weight, bias, margin, row_weight)
    factors = _check_penalty("shared_objective", logits, prior, entropy_weight, balance_weight, process_group)
    check_reduction("shared_objective", reduction)
    if prior is None and process_group is None and not return_stats:
        chosen = backends.choose("shared_objective", backend, logits.input)
        if shared_loss.serves(chosen, logits.row_weight):
            return _scalars("shared_objective", logits, factors, scale_and_shift(logits, subtract_floor, reduction))
    statistics = _statistics("shared_objective", logits, backend, with_clamp=True)
    penalty, stats = _penalty("shared_objective", logits, statistics, prior, *factors, process_group)
    reg, clamp_stats = reduce(logits, statistics[3], statistics[4], subtract_floor, reduction)
    return (penalty, reg, stats, clamp_stats) if return_stats else (penalty, reg)
