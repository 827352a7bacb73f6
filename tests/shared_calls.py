"""Calls of the shared-penalty family's operators, and what the reference makes of them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fusefeat.reference import shared_penalty as reference
from torch import Tensor

NAN, INF = float("nan"), float("inf")
# RMS of the difference relative to the RMS of the reference. Half types: of the gradients, which they store.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NAMES = ("context", "input", "weight", "bias", "row_weight")
STATISTICS = ("row_entropy", "lse", "prob_sum", "row_excess", "fired")


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Call:
    context: Tensor | None
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    margin: float = 1.3
    row_weight: Tensor | None = None
    operand: int = 0

    @property
    def rows(self) -> int:
        return self.input.shape[0] + (0 if self.context is None else self.context.shape[0])

    @property
    def acc(self) -> torch.dtype:
        return acc_of(self.input.dtype)

    def logit_args(self) -> tuple[Any, ...]:
        return self.context, self.input, self.weight, self.bias, self.margin

    def tensors(self) -> list[Tensor | None]:
        return [self.context, self.input, self.weight, self.bias, self.row_weight]

    def in_float64(self) -> Call:
        wide = [None if t is None else t.detach().double().requires_grad_() for t in self.tensors()]
        context, input, weight, bias, row_weight = wide
        assert input is not None and weight is not None
        return Call(context, input, weight, bias, self.margin, row_weight, self.operand)


def make(
    rows: int, context_rows: int | None, channels: int, features: int, dtype: torch.dtype, bias: bool = True,
    row_weight: bool = True, **rest: Any,
) -> Call:  # fmt: skip
    total = rows + (context_rows or 0)
    return Call(
        None if context_rows is None else torch.randn(context_rows, channels).to(dtype),
        torch.randn(rows, channels).to(dtype),
        (torch.randn(features, channels) / max(channels, 1) ** 0.5).to(dtype),
        torch.randn(features).to(dtype) if bias else None,
        row_weight=(torch.rand(total) * (torch.rand(total) > 0.2)).to(acc_of(dtype)) if row_weight else None,
        **rest,
    )


def incoming(call: Call) -> list[Tensor]:
    """Gradients of row_entropy, lse, prob_sum and row_excess."""
    return [torch.randn(n, dtype=call.acc) for n in (call.rows, call.rows, call.weight.shape[0], call.rows)]


def run(
    ops: Any, call: Call, grads: Sequence[Tensor | None], keep: int = 0, needs: Sequence[bool] = (True,) * 5
) -> dict[str, Tensor]:
    saved = (*call.logit_args(), call.row_weight, call.operand)
    with_clamp = grads[3] is not None
    *statistics, kept = ops.shared_penalty(*saved, with_clamp, min(keep, call.rows))
    gradients = ops.shared_penalty_backward(*grads, *saved, statistics[0], statistics[1], kept, list(needs))
    named = dict(zip(STATISTICS, statistics, strict=True))
    return named | {f"grad_{name}": grad for name, grad in zip(NAMES, gradients, strict=True)}


def gradients_of(call: Call, outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    pairs = [(out, grad.double()) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    leaves = {f"grad_{n}": t for n, t in zip(NAMES, call.tensors(), strict=True) if t is not None}
    found = torch.autograd.grad(
        [out for out, _ in pairs], list(leaves.values()), [grad for _, grad in pairs],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return dict(zip(leaves, found, strict=True))


def expect(call: Call, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    wide = call.in_float64()
    statistics = reference.statistics(*wide.logit_args(), wide.row_weight, wide.operand, True)
    named = {name: t.detach() for name, t in zip(STATISTICS, statistics, strict=True)}
    return named | gradients_of(wide, statistics[:4], grads)


def error(got: Tensor, want: Tensor) -> float:
    if got.numel() == 0:
        return 0.0
    scale = want.double().square().mean().sqrt().item()
    return (got.double() - want.double()).square().mean().sqrt().item() / (scale or 1.0)


def check(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, wanted in want.items():
        assert got[name].shape == wanted.shape, name
        if name == "fired":
            assert torch.equal(got[name], wanted), name
            continue
        # Statistics are in the accumulation type; so is the gradient of row_weight here.
        exact = name in STATISTICS or name == "grad_row_weight"
        bound = max(TOLERANCE[torch.float32], TOLERANCE[acc_of(dtype)]) if exact else TOLERANCE[dtype]
        if dtype == torch.float64:
            bound = TOLERANCE[dtype]
        assert error(got[name], wanted) <= bound, (name, error(got[name], wanted))


def plain_penalty(z: Tensor) -> Tensor:
    log_probs = z.log_softmax(1, dtype=torch.promote_types(z.dtype, torch.float32))
    probs = log_probs.exp()
    mean = probs.mean(0)
    return (mean * mean.log()).sum() - (probs * log_probs).sum(1).mean()


def loss_gradients(ops: Any, x: Tensor, weight: Tensor, keep: int = 0) -> tuple[Sequence[Tensor], Tensor]:
    """Gradients of x and weight by the operator that finishes the penalty, and the logits that its forward kept."""
    args = (None, x, weight, None, 1.0, 0, 1.0, 1.0, False, 0.0, 0.0)
    *_, entropy, lse, probs, kept = ops.shared_loss(*args, keep)
    needs = [False, True, True, False]
    return ops.shared_loss_backward(torch.ones(()), None, *args, entropy, lse, probs, kept, needs)[1:3], kept


def penalty_gradients(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    """The same by plain PyTorch."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    return torch.autograd.grad(plain_penalty(leaves[0] @ leaves[1].T), leaves)


def errors_beside_eager(x: Tensor, weight: Tensor, got: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Of each gradient: its error relative to float64, and that of plain PyTorch."""
    exact, eager = penalty_gradients(x.double(), weight.double()), penalty_gradients(x, weight)
    return [(error(mine, true), error(other, true)) for mine, other, true in zip(got, eager, exact, strict=True)]


def check_rounded_gradients(ops: Any, rows: int, channels: int, features: int, keep: int) -> None:
    """Gradients of bfloat16 rows whose logits, some 200, lose so much to float16 that it is seen in bfloat16."""
    x, weight = (
        torch.randn(rows, channels).bfloat16(),
        (torch.randn(features, channels) * 2 * channels**-0.5).bfloat16(),
    )
    args = (None, x, weight, torch.full((features,), 200.0).bfloat16(), 1.0, 0, 1.0, 1.0, False, 0.0, 0.0)
    *_, entropy, lse, probs, kept = ops.shared_loss(*args, keep)
    got = ops.shared_loss_backward(torch.ones(()), None, *args, entropy, lse, probs, kept, [False, True, True, False])
    z = (x.float() @ weight.float().T + 200).half().double().requires_grad_()
    (dz,) = torch.autograd.grad(plain_penalty(z), z)
    assert error(got[1], dz @ weight.double()) <= 1e-2
    assert error(got[2], dz.T @ x.double()) <= 1e-2


def strided(tensor: Tensor) -> Tensor:
    """The same values, every other element of a larger tensor, with the axes exchanged, from an odd offset."""
    shape = [2 * n + 1 for n in reversed(tensor.shape)]
    big = torch.full(shape, NAN, dtype=tensor.dtype)
    view = big[tuple(slice(1, None, 2) for _ in shape)].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


def with_unread_rows(call: Call, value: float) -> Call:
    assert call.row_weight is not None and call.context is not None
    unread = call.row_weight == 0
    context, input = call.context.clone(), call.input.clone()
    split = context.shape[0]
    context[unread[:split]] = value
    input[unread[split:]] = value
    return replace(call, context=context, input=input)
