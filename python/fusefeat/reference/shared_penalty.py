"""Shared assignment and its statistics in plain PyTorch: the definition in executable form."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_pool import NEG_INF, acc_dtype

OPERAND_DTYPES = (None, torch.bfloat16, torch.float16)


def logits(
    context: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    margin: float,
    row_weight: Tensor | None,
    operand: int,
) -> Tensor:
    """z = margin * (cat(context, input) weight^T + bias), [N,F] in the accumulation type; unread rows are as if 0."""
    acc = acc_dtype(input.dtype)
    rounded = OPERAND_DTYPES[operand]

    def operand_of(tensor: Tensor) -> Tensor:
        return tensor.to(acc) if rounded is None else tensor.to(rounded).to(acc)

    rows = operand_of(input) if context is None else torch.cat([operand_of(context), operand_of(input)])
    if row_weight is not None:
        rows = torch.where((row_weight != 0)[:, None], rows, 0.0)
    with torch.autocast(input.device.type, enabled=False):
        z = rows @ operand_of(weight).t()
    return margin * (z if bias is None else z + bias.to(acc))


def _shifted(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """peak [N,1], d = z - peak with 0 for switched-off features, e^d, and its row sum."""
    peak = z.detach().amax(1, keepdim=True)
    d = z - peak
    off = d == NEG_INF
    d = torch.where(off, 0.0, d)
    e = torch.where(off, 0.0, d.exp())
    return peak, d, e, e.sum(1, keepdim=True)


def statistics(
    context: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    margin: float,
    row_weight: Tensor | None,
    operand: int,
    with_clamp: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fused primitive: row_entropy [N], lse [N], prob_sum [F] = sum_n w_n P_n, row_excess [N], fired [F]."""
    z = logits(context, input, weight, bias, margin, row_weight, operand)
    peak, d, e, total = _shifted(z)
    entropy = total.log().squeeze(1) - (e * d).sum(1) / total.squeeze(1)
    lse = (peak + total.log()).squeeze(1)
    probs = e / total
    if row_weight is None:
        prob_sum = probs.sum(0)
    else:
        used = row_weight != 0
        entropy, lse = torch.where(used, entropy, 0.0), torch.where(used, lse, 0.0)
        prob_sum = (row_weight.to(z.dtype)[:, None] * torch.where(used[:, None], probs, 0.0)).sum(0)
    if not with_clamp:
        return entropy, lse, prob_sum, z.new_empty(0), torch.empty(0, dtype=torch.int64, device=z.device)
    row_excess, fired = clamp_statistics(z, margin, row_weight)
    return entropy, lse, prob_sum, row_excess, fired


def assignment(
    context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, margin: float, operand: int
) -> Tensor:
    """P = softmax(z, 1), [N,F] in the dtype of input."""
    _, _, e, total = _shifted(logits(context, input, weight, bias, margin, None, operand))
    return (e / total).to(input.dtype)


def clamp_statistics(z: Tensor, margin: float, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """row_excess [N] = sum_k max(z_k - margin, 0) and fired [F], rows of weight 0 left out; ties give no gradient."""
    fired, broken = z > margin, z.isnan()
    if row_weight is not None:
        used = (row_weight != 0)[:, None]
        fired, broken = fired & used, broken & used
    # A NaN logit comes out as NaN, but no gradient passes where z > margin does not hold.
    excess = torch.where(fired, z - margin, torch.where(broken, z.detach(), 0.0))
    return excess.sum(1), fired.sum(0)
