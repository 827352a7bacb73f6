"""The clamped regulariser in plain PyTorch: the definition in executable form."""

from __future__ import annotations

import torch
from torch import Tensor

from .shared_penalty import clamp_statistics, logits


def statistics(
    context: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    margin: float,
    row_weight: Tensor | None,
    operand: int,
) -> tuple[Tensor, Tensor]:
    """row_excess [N] = sum_k max(z_k - margin, 0) in the accumulation type, and fired [F] int64."""
    return clamp_statistics(logits(context, input, weight, bias, margin, row_weight, operand), margin, row_weight)


def activation(
    context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, margin: float, operand: int
) -> Tensor:
    """clamp(relu(z), min=margin), [N,F] in the dtype of input; the gradient passes where z > margin, strictly."""
    z = logits(context, input, weight, bias, margin, None, operand)
    return torch.where(z > margin, z, torch.where(z.isnan(), z.detach(), margin)).to(input.dtype)
