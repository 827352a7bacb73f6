"""Penalty and regulariser of unweighted rows as finished scalars: one operator where the general way takes dozens,
whose cost is all there is at small sizes. CPU only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import shared_penalty as reference
from ..reference.attention_pool import acc_dtype
from .differentiable import Operator
from .native import NativeOperators
from .shared_penalty import fake_gradients, row_count


def _loss_formula(
    context: Any, input: Any, weight: Any, bias: Any, margin: Any, operand: Any, entropy_weight: float,
    balance_weight: float, with_reg: bool, reg_scale: float, reg_shift: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    row_entropy, lse, prob_sum, row_excess, _ = reference.statistics(
        context, input, weight, bias, margin, None, operand, with_reg
    )
    rows = max(row_count(context, input), 1)
    mean_probs = prob_sum / rows
    used = ~(mean_probs <= 0)
    logs = (torch.where(used, mean_probs, 1.0) * weight.shape[0]).log()
    divergence = torch.where(used, mean_probs * logs, 0.0).sum()
    penalty = entropy_weight * row_entropy.sum() / rows + balance_weight * divergence
    reg = reg_scale * row_excess.sum() + reg_shift if with_reg else input.new_empty(0, dtype=penalty.dtype)
    return penalty, reg, row_entropy, lse, prob_sum, input.new_empty(0)


def _clamped_formula(
    context: Any, input: Any, weight: Any, bias: Any, margin: Any, operand: Any, scale: float, shift: float
) -> tuple[Tensor]:
    z = reference.logits(context, input, weight, bias, margin, None, operand)
    return (scale * reference.clamp_statistics(z, margin, None)[0].sum() + shift,)


def _operators(ops: Any) -> dict[str, Operator]:
    return {
        "shared_loss": Operator(
            ops.shared_loss,
            ops.shared_loss_backward,
            _loss_formula,
            wrt=(0, 1, 2, 3),
            backward_args=11,
            grads=(0, 1),
            saved=(2, 3, 4, 5),
            optional=(1, 8),
        ).register(),
        "clamped_loss": Operator(
            ops.clamped_loss,
            ops.clamped_loss_backward,
            _clamped_formula,
            wrt=(0, 1, 2, 3),
            backward_args=8,
            grads=(0,),
            saved=(),
        ).register(),
    }


def kept_dtype(dtype: torch.dtype, with_reg: bool, rows: int, features: int) -> torch.dtype:
    """What kept logits are stored in, and all are rounded to: float16 where plain PyTorch's are bfloat16, unless they
    are compared with margin, or rows are so few that features may be one row's alone, whose gradients would be lost in
    the rounding."""
    rounded = dtype == torch.bfloat16 and not with_reg and rows >= min(features, 128)
    return torch.float16 if rounded else acc_dtype(dtype)


def _fake_loss(
    context: Any, input: Tensor, weight: Tensor, bias: Any, margin: float, operand: int, entropy_weight: float,
    balance_weight: float, with_reg: bool, reg_scale: float, reg_shift: float, keep_rows: Any,
) -> Any:  # fmt: skip
    acc, rows, features = acc_dtype(input.dtype), row_count(context, input), weight.shape[0]
    shapes = [(), () if with_reg else (0,), (rows,), (rows,), (features,)]
    dtype = kept_dtype(input.dtype, with_reg, rows, features)
    kept = input.new_empty((keep_rows, features) if keep_rows else (0,), dtype=dtype)
    return *(input.new_empty(shape, dtype=acc) for shape in shapes), kept


def _fake_loss_backward(
    grad_penalty: Any, grad_reg: Any, context: Any, input: Tensor, weight: Tensor, bias: Any, *rest: Any
) -> Any:
    return fake_gradients(rest[-1], context, input, weight, bias)


def _fake_clamped(context: Any, input: Tensor, *rest: Any) -> Tensor:
    return input.new_empty((), dtype=acc_dtype(input.dtype))


def _fake_clamped_backward(grad: Tensor, context: Any, input: Tensor, weight: Tensor, bias: Any, *rest: Any) -> Any:
    return fake_gradients(rest[-1], context, input, weight, bias)


def _native() -> dict[str, Operator]:
    torch.library.register_fake("fusefeat::shared_loss", _fake_loss)
    torch.library.register_fake("fusefeat::shared_loss_backward", _fake_loss_backward)
    torch.library.register_fake("fusefeat::clamped_loss", _fake_clamped)
    torch.library.register_fake("fusefeat::clamped_loss_backward", _fake_clamped_backward)
    return _operators(NativeOperators())


_NATIVE = _native() if _library.STATE.cpu_loaded else {}


def operator(name: str) -> Operator:
    """``shared_loss`` or ``clamped_loss``."""
    return _NATIVE[name]


def serves(backend: str, row_weight: Tensor | None) -> bool:
    """Whether the scalars may come from here: for eager calls on the CPU; compilers see the general way."""
    return (
        backend == "cpu"
        and row_weight is None
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
