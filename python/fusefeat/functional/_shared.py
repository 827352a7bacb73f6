"""What the functions on shared logits have in common: their arguments, and sums that no thread count changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..reference.attention_pool import acc_dtype
from ..reference.shared_penalty import OPERAND_DTYPES

LARGEST_MARGIN = 1e30  # the kernels' own limit


class Logits(NamedTuple):
    """Checked arguments of the operators: z = margin * (cat(context, input) weight^T + bias)."""

    context: Tensor | None
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    margin: float
    row_weight: Tensor | None
    operand: int

    @property
    def rows(self) -> Any:
        return self.input.shape[0] + (0 if self.context is None else self.context.shape[0])

    @property
    def features(self) -> Any:
        return self.weight.shape[0]


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device; meta has none to ask, in words that torch 2.11 can compile."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def prepare(
    function: str,
    input: Any,
    context: Any,
    weight: Any,
    bias: Any,
    margin: Any,
    row_weight: Any = None,
) -> Logits:
    """Check what the operators take and settle the operands' dtype."""
    checks.matrix(function, "input", input, None)
    mixed = autocast_enabled(input.device.type) and input.dtype != torch.float64
    operand_dtype = torch.get_autocast_dtype(input.device.type) if mixed else None
    if operand_dtype not in OPERAND_DTYPES:
        operand_dtype = None
    checks.matrix(function, "weight", weight, input, mixed_dtypes=mixed, width_of="input")
    if weight.shape[0] == 0:
        raise ValueError(f"{function}: weight must have at least one row (F >= 1), got {checks.describe(weight)}")
    if context is not None:
        checks.matrix(function, "context", context, input, mixed_dtypes=mixed, width_of="input")
    if bias is not None:
        checks.vector(function, "bias", bias, weight.shape[0], "F (rows of weight)", input, any_dtype=mixed)
    margin = checks.finite_number(function, "margin", margin)
    if not isinstance(margin, torch.SymFloat) and margin <= 0:
        raise ValueError(f"{function}: margin must be greater than 0, got {margin}")
    if not isinstance(margin, torch.SymFloat) and margin > LARGEST_MARGIN:
        raise ValueError(f"{function}: margin must be at most {LARGEST_MARGIN:g}, got {margin}")
    acc = acc_dtype(input.dtype)
    if row_weight is not None:
        rows = input.shape[0] + (0 if context is None else context.shape[0])
        checks.vector(function, "row_weight", row_weight, rows, "N (context rows, then input rows)", input)
        checks.not_negative(function, "row_weight", row_weight)
        # A row of weight 0 is not read, so nothing can be known of its gradients, its weight's included: they are 0.
        row_weight = row_weight.to(acc)
        row_weight = torch.where(row_weight != 0, row_weight, 0.0)
    tensors = [input, weight] + ([] if context is None else [context])
    if operand_dtype is not None and any(tensor.dtype != input.dtype for tensor in tensors):
        input, weight = input.to(operand_dtype), weight.to(operand_dtype)
        context = None if context is None else context.to(operand_dtype)
    if bias is not None:
        bias = bias.to(acc)
    operand = OPERAND_DTYPES.index(None if input.dtype == operand_dtype else operand_dtype)
    return Logits(context, input, weight, bias, margin, row_weight, operand)


def ordered_sum(values: Tensor) -> Tensor:
    """Sum of a vector, the same to the bit for any number of threads.

    torch.sum splits a long vector by the number of threads; rows of a fixed length are each summed by one thread.
    """
    length, count = 4096, values.shape[0]
    # A traced size may be unknown, and then nothing may depend on whether it fits one row, be it a branch or the
    # contiguity of a single row; one folding serves 2^27 values.
    traced = torch.compiler.is_compiling() or isinstance(count, torch.SymInt)
    while traced or count > length:
        rows = count // length + 2 if traced else (count + length - 1) // length
        padded = torch.nn.functional.pad(values, (0, rows * length - count))
        values, count = padded.view(rows, length).sum(1), rows
        if traced:
            break
    return values.sum()
