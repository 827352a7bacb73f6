"""The clamped regulariser: a one-sided hinge on the shared logits."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import backends, checks
from ..ops import clamped_reg as operators
from ..ops import shared_loss
from ..reference import clamped_reg as reference
from ._shared import Logits, ordered_sum, prepare

REDUCTIONS = ("mean", "sum")


class ClampStats(NamedTuple):
    """How often the clamp lets a logit through; not differentiable.

    Attributes:
        active_fraction: share of the logits of rows with a weight that are above the margin, a scalar.
        fired: [F] int64, how many rows of non-zero weight have z > margin, per feature.
    """

    active_fraction: Tensor
    fired: Tensor


def clamped_activation(
    input: Tensor,
    context: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margin: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """``clamp(relu(z), min=margin)`` with z = margin * (cat(context, input) weight^T + bias), [Nc+Ni,F].

    The gradient passes where z > margin, strictly. Args, dtype of the result and Raises as in
    :func:`fusefeat.shared_assignment`.
    """
    logits = prepare("clamped_activation", input, context, weight, bias, margin)
    chosen = backends.choose("clamped_activation", backend, input)
    args = (logits.context, logits.input, logits.weight, logits.bias, logits.margin, logits.operand)
    if chosen == "reference":
        return reference.activation(*args).to(input.dtype)
    checks.no_forward_mode("clamped_activation", *logits)
    return operators.operator("clamped_activation", chosen)(*args)[0].to(input.dtype)


def check_reduction(function: str, reduction: object) -> None:
    if not isinstance(reduction, str):
        raise TypeError(f"{function}: reduction must be a string, got {checks.describe(reduction)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{function}: reduction must be 'mean' or 'sum', got {reduction!r}")


def scale_and_shift(logits: Logits, subtract_floor: bool, reduction: str) -> tuple[float, float]:
    """What turns the sum of all max(z - margin, 0), of rows without weights, into the regulariser."""
    floor = 0.0 if subtract_floor else logits.margin
    count = logits.rows * logits.features
    if reduction == "sum":
        return 1.0, floor * count
    return (1.0 / count, floor) if count else (0.0, 0.0)


def reduce(
    logits: Logits, row_excess: Tensor, fired: Tensor, subtract_floor: bool, reduction: str
) -> tuple[Tensor, ClampStats]:
    """From sum_k max(z_nk - margin, 0) per row to the regulariser and its statistics."""
    features = logits.features
    # sum_k R_nk is the excess plus margin for every feature; the floor joins after the sums, for accuracy.
    floor = 0.0 if subtract_floor else logits.margin
    if logits.row_weight is None:
        excess = ordered_sum(row_excess)
        total = torch.full((), logits.rows, dtype=excess.dtype, device=excess.device)
        used_rows = total
    else:
        excess, total = ordered_sum(logits.row_weight * row_excess), ordered_sum(logits.row_weight)
        used_rows = (logits.row_weight != 0).sum().to(excess.dtype)
    if reduction == "sum":
        reg = excess + floor * features * total
    else:
        safe_total = torch.where(total > 0, total, 1.0)
        # Not torch.where(total > 0, floor, 0.0), which would round a float64 floor to torch's default dtype.
        reg = excess / (safe_total * max(features, 1)) + floor * (total > 0).to(excess.dtype)
    active = fired.sum().to(excess.dtype) / torch.where(used_rows > 0, used_rows * max(features, 1), 1.0)
    return reg, ClampStats(active.detach(), fired)


@overload
def clamped_reg(
    input: Tensor,
    context: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margin: float = 1.0,
    row_weight: Tensor | None = None,
    subtract_floor: bool = False,
    reduction: str = "mean",
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def clamped_reg(
    input: Tensor,
    context: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margin: float = 1.0,
    row_weight: Tensor | None = None,
    subtract_floor: bool = False,
    reduction: str = "mean",
    return_stats: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, ClampStats]: ...


@overload
def clamped_reg(
    input: Tensor,
    context: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margin: float = 1.0,
    row_weight: Tensor | None = None,
    subtract_floor: bool = False,
    reduction: str = "mean",
    return_stats: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ClampStats]: ...


def clamped_reg(
    input: Tensor,
    context: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    margin: float = 1.0,
    row_weight: Tensor | None = None,
    subtract_floor: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ClampStats]:
    r"""Mean or sum of R = clamp(relu(z), min=margin) over rows and features, without storing the [N,F] logits.

    "mean" is sum_n r_n mean_k R_nk with r = row_weight / sum(row_weight), 1/N by default; "sum" is
    sum_n w_n sum_k R_nk with w = row_weight, 1 by default. The gradient passes where z > margin, strictly.

    Args:
        input, context, weight, bias, margin, backend: as in :func:`fusefeat.shared_assignment`.
        row_weight: as in :func:`fusefeat.shared_penalty`.
        subtract_floor: subtract the constant ``margin`` from R first.
        reduction: "mean" or "sum".
        return_stats: also return a :class:`ClampStats`.

    Returns:
        A scalar in the accumulation type, or a pair. No rows, or only rows of weight 0: 0.

    Raises:
        As :func:`fusefeat.shared_penalty`.
    """
    logits = prepare("clamped_reg", input, context, weight, bias, margin, row_weight)
    check_reduction("clamped_reg", reduction)
    chosen = backends.choose("clamped_reg", backend, input)
    if not return_stats and shared_loss.serves(chosen, logits.row_weight):
        checks.no_forward_mode("clamped_reg", *logits)
        args = (*logits[:5], logits.operand, *scale_and_shift(logits, subtract_floor, reduction))
        return shared_loss.operator("clamped_loss")(*args)[0]
    if chosen == "reference":
        row_excess, fired = reference.statistics(*logits)
    else:
        checks.no_forward_mode("clamped_reg", *logits)
        row_excess, fired = operators.operator("clamped_reg", chosen)(*logits)
    reg, stats = reduce(logits, row_excess, fired, subtract_floor, reduction)
    return (reg, stats) if return_stats else reg
