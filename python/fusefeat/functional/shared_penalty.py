"""Shared assignment, the shared penalty, and the objective of penalty and regulariser in one pass."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from .. import backends, checks
from ..ops import shared_loss
from ..ops import shared_penalty as operators
from ..reference import shared_penalty as reference
from ._penalty import SharedStats, check_penalty, finished_scalars, reduce_penalty, row_statistics
from ._shared import prepare
from .clamped_reg import ClampStats, check_reduction, reduce, scale_and_shift


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
    checks.no_forward_mode("shared_assignment", *logits)
    return operators.operator("shared_assignment", chosen)(*args)[0].to(input.dtype)


@overload
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
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
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
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, SharedStats]: ...


@overload
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
    return_stats: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, SharedStats]: ...


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
    finds up to 31 MiB of the logits kept (less beside features so many that the rows in scratch take over 17 MiB, none
    with fewer than 32 channels and over 8 MiB of logits) and recomputes those of the other rows:
    ``fusefeat.ops.shared_penalty.rows_to_keep``. Logits of bfloat16 inputs are rounded to float16 there when nothing
    but the scalar is asked for, rows are 128 or as many as features, and no row's log-sum-exp is beyond 256.

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
    factors = check_penalty("shared_penalty", logits, prior, entropy_weight, balance_weight, process_group)
    if prior is None and process_group is None and not return_stats:
        chosen = backends.choose("shared_penalty", backend, logits.input)
        if shared_loss.serves(chosen, logits.row_weight):
            return finished_scalars("shared_penalty", logits, factors, None)[0]
    statistics = row_statistics("shared_penalty", logits, backend, with_clamp=False)
    penalty, stats = reduce_penalty(logits, statistics, prior, *factors, process_group)
    return (penalty, stats) if return_stats else penalty


@overload
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
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
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
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor, SharedStats, ClampStats]: ...


@overload
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
    return_stats: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, SharedStats, ClampStats]: ...


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
    factors = check_penalty("shared_objective", logits, prior, entropy_weight, balance_weight, process_group)
    check_reduction("shared_objective", reduction)
    if prior is None and process_group is None and not return_stats:
        chosen = backends.choose("shared_objective", backend, logits.input)
        if shared_loss.serves(chosen, logits.row_weight):
            return finished_scalars(
                "shared_objective", logits, factors, scale_and_shift(logits, subtract_floor, reduction)
            )
    statistics = row_statistics("shared_objective", logits, backend, with_clamp=True)
    penalty, stats = reduce_penalty(logits, statistics, prior, *factors, process_group)
    reg, clamp_stats = reduce(logits, statistics[3], statistics[4], subtract_floor, reduction)
    return (penalty, reg, stats, clamp_stats) if return_stats else (penalty, reg)
