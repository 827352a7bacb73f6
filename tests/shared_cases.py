"""The shared list of cases that every backend of the shared-penalty family is held to, and the comparison itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pool_cases import assert_close, on_device, rand, relative_rms
from torch import Tensor

NAN, INF = float("nan"), float("inf")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@dataclass
class Inputs:
    input: Tensor
    weight: Tensor
    context: Tensor | None = None
    bias: Tensor | None = None
    row_weight: Tensor | None = None
    prior: Tensor | None = None
    margin: float = 1.0
    grads: Callable[[Tensor], Tensor] = field(default=lambda g: g)

    def leaves(self, device: str = "cpu") -> dict[str, Tensor]:
        names = ("input", "weight", "context", "bias", "row_weight", "prior")
        named = {name: on_device(getattr(self, name), device) for name in names}
        return {name: tensor.detach().requires_grad_() for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Inputs:
        change = {name: leaf.detach().to(dtype) for name, leaf in self.leaves().items()}
        return Inputs(**{**self.__dict__, **change})


Maker = Callable[[torch.dtype], Inputs]
CASES: dict[str, Maker] = {}


def case(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        CASES[name] = maker
        return maker

    return add


SIZES = {
    "one of everything": (1, 0, 1, 1),
    "recipe": (32, 32, 10, 128),
    "odd": (13, 7, 11, 19),
    "one feature": (9, 0, 5, 1),
    "fewer rows than features": (3, 2, 6, 40),
    "one channel": (17, 0, 1, 33),
    "tails of every tile": (70, 63, 65, 257),
    "deep": (20, 0, 600, 70),
    "many features": (6, 0, 12, 5000),
    "many rows": (2100, 900, 6, 24),
    "no rows": (0, 0, 4, 6),
    "only context": (0, 9, 4, 6),
}

for _name, (_ni, _nc, _d, _f) in SIZES.items():

    def _sized(dtype: torch.dtype, ni: int = _ni, nc: int = _nc, d: int = _d, f: int = _f) -> Inputs:
        return Inputs(
            rand(ni, d, dtype=dtype),
            rand(f, d, dtype=dtype),
            rand(nc, d, dtype=dtype) if nc else None,
            rand(f, dtype=dtype),
            margin=1.5 * d**-0.5,
        )

    CASES[_name] = _sized


def small(dtype: torch.dtype, **changes: Any) -> Inputs:
    base = {
        "input": rand(9, 6, dtype=dtype),
        "weight": rand(20, 6, dtype=dtype),
        "context": rand(5, 6, dtype=dtype),
        "bias": rand(20, dtype=dtype),
        "margin": 0.7,
    }
    return Inputs(**{**base, **changes})


@case("no bias")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, bias=None)


@case("an empty context")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, context=rand(0, 6, dtype=dtype))


@case("weights and prior")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, row_weight=torch.rand(14, dtype=torch.float64).to(dtype), prior=torch.rand(20).to(dtype))


@case("rows of weight zero hold garbage")
def _(dtype: torch.dtype) -> Inputs:
    row_weight = torch.rand(14, dtype=torch.float64).to(dtype)
    row_weight[[0, 4, 7, 13]] = 0
    inputs = small(dtype, row_weight=row_weight)
    inputs.context[[0, 4]] = torch.tensor([[NAN], [INF]], dtype=dtype)
    inputs.input[[2, 8]] = torch.tensor([[-INF], [NAN]], dtype=dtype)
    return inputs


@case("every weight zero")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, row_weight=torch.zeros(14, dtype=dtype))


@case("features switched off")
def _(dtype: torch.dtype) -> Inputs:
    bias = rand(20, dtype=dtype)
    bias[[0, 5, 6, 19]] = -INF
    return small(dtype, bias=bias)


@case("a used row holds NaN")
def _(dtype: torch.dtype) -> Inputs:
    inputs = small(dtype)
    inputs.input[3, 2] = NAN
    return inputs


@case("margin 100")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, margin=100.0)


@case("tiny margin")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, margin=1e-3)


@case("large offsets of all logits")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, bias=(rand(20) + 200).to(dtype))


@case("ties at the clamp")
def _(dtype: torch.dtype) -> Inputs:
    # z = margin * <row, weight> with products of exactly 1: z equals the margin to the bit.
    weight = torch.eye(6, dtype=dtype).repeat(4, 1)
    return small(dtype, input=torch.ones(9, 6, dtype=dtype), weight=weight, bias=None, margin=0.5)


@case("strided everything")
def _(dtype: torch.dtype) -> Inputs:
    return small(
        dtype,
        input=rand(6, 18, dtype=dtype).t()[::2],
        weight=rand(6, 20, dtype=dtype).t(),
        context=rand(5, 20, dtype=dtype)[:, 3:15:2],
        bias=rand(1, dtype=dtype).expand(20),
        row_weight=torch.rand(28, dtype=torch.float64).to(dtype)[::2],
    )


@case("expanded rows")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, input=rand(1, 6, dtype=dtype).expand(9, 6), weight=rand(20, 1, dtype=dtype).expand(20, 6))


@case("expanded gradients")
def _(dtype: torch.dtype) -> Inputs:
    return small(dtype, grads=lambda g: g[:1].expand(g.shape) if g.dim() else g)


Result = dict[str, Tensor]


def penalty_outputs(function: Any, inputs: Inputs, leaves: dict[str, Tensor], backend: str | None) -> Result:
    penalty, reg, stats, clamp_stats = function(
        leaves["input"],
        leaves.get("context"),
        leaves["weight"],
        leaves.get("bias"),
        margin=inputs.margin,
        row_weight=leaves.get("row_weight"),
        prior=leaves.get("prior"),
        entropy_weight=0.8,
        balance_weight=1.3,
        return_stats=True,
        backend=backend,
    )
    return {"penalty": penalty, "reg": reg, **stats._asdict(), **clamp_stats._asdict()}


def matrix_outputs(function: Any, inputs: Inputs, leaves: dict[str, Tensor], backend: str | None) -> Result:
    args = (leaves["input"], leaves.get("context"), leaves["weight"], leaves.get("bias"))
    return {"matrix": function(*args, margin=inputs.margin, backend=backend)}


def reg_outputs(function: Any, inputs: Inputs, leaves: dict[str, Tensor], backend: str | None) -> Result:
    args = (leaves["input"], leaves.get("context"), leaves["weight"], leaves.get("bias"))
    keywords = {"margin": inputs.margin, "row_weight": leaves.get("row_weight"), "backend": backend}
    mean, stats = function(*args, **keywords, return_stats=True)
    total = function(*args, **keywords, reduction="sum", subtract_floor=True)
    return {"mean": mean, "sum": total, **stats._asdict()}


def run(
    outputs: Callable[..., Result], function: Any, inputs: Inputs, backend: str | None, narrow: Any, device: str = "cpu"
) -> Result:
    """All outputs, and the gradients of everything for random incoming gradients on every output at once."""
    leaves = inputs.leaves(device)
    result = outputs(function, inputs, leaves, backend)
    generator = torch.Generator().manual_seed(1)
    diff = [tensor for tensor in result.values() if tensor.requires_grad]
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(narrow) for t in diff]
    grads = [inputs.grads(g.to(device)).to(t.dtype) for g, t in zip(grads, diff, strict=True)]
    found = torch.autograd.grad(diff, list(leaves.values()), grads, allow_unused=True)
    for name, grad in zip(leaves, found, strict=True):
        if grad is not None:
            result[f"grad {name}"] = grad
    return {name: tensor.detach().cpu() for name, tensor in result.items()}


def compare(outputs: Callable[..., Result], function: Any, inputs: Inputs, backend: str, device: str = "cpu") -> None:
    """Hold a backend to the reference in float64 on the same (already rounded) inputs.

    Four times the error that the reference itself makes in the type at hand is allowed where that is more: these
    tensors are too small for its RMS to be steadier than that.
    """
    narrow = inputs.input.dtype
    grad_type = torch.float32 if narrow == torch.float64 else narrow
    exact = run(outputs, function, inputs.to(torch.float64), "reference", grad_type)
    plain = run(outputs, function, inputs, "reference", grad_type)
    actual = run(outputs, function, inputs, backend, grad_type, device)
    assert actual.keys() == exact.keys()
    for name, tensor in actual.items():
        if outputs is matrix_outputs and inputs.margin == 100 and name.startswith("grad"):
            continue  # of a saturated assignment nothing is left but rounding
        assert tensor.dtype == plain[name].dtype, f"{name}: dtype {tensor.dtype}"
        assert tensor.shape == plain[name].shape, f"{name}: shape {list(tensor.shape)}"
        if tensor.dtype == torch.int64:
            assert torch.equal(tensor, plain[name]), name
            continue
        finite = torch.isfinite(exact[name])
        own = relative_rms(plain[name][finite], exact[name][finite])
        # The gradient of a matrix starts from its rounded values, as eager PyTorch's does.
        rounding = 5 if outputs is matrix_outputs and narrow in (torch.float16, torch.bfloat16) else 1
        assert_close(tensor, exact[name], max(rounding * TOLERANCE[tensor.dtype], 4 * own), name)


compare_objective = functools.partial(compare, penalty_outputs)
compare_matrix = functools.partial(compare, matrix_outputs)
compare_reg = functools.partial(compare, reg_outputs)
