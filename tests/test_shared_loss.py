"""The operators that finish penalty and regulariser: equal to the general way, differentiable twice, opcheck."""

from __future__ import annotations

from typing import Any

import fusefeat
import pytest
import torch
from fusefeat import _library
from fusefeat.ops import shared_loss
from fusefeat.ops import shared_penalty as statistics
from shared_calls import loss_gradients
from shared_calls import plain_penalty as penalty_of
from torch import Tensor

if not _library.STATE.cpu_loaded:
    pytest.skip(f"no compiled CPU kernels: {_library.STATE.reasons}", allow_module_level=True)

OPS = torch.ops.fusefeat


def leaves(dtype: torch.dtype, rows: int = 14, features: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 6), (5, 6), (features, 6), (features,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def general(monkeypatch: pytest.MonkeyPatch, function: Any, args: Any, **keywords: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(shared_loss, "serves", lambda *args: False)
        return function(*args, **keywords)


FUNCTIONS = {
    "penalty": (fusefeat.shared_penalty, {"entropy_weight": 0.8, "balance_weight": 1.3}),
    "objective": (fusefeat.shared_objective, {"entropy_weight": -0.5, "reduction": "sum"}),
    "objective mean": (fusefeat.shared_objective, {"subtract_floor": True}),
    "reg": (fusefeat.clamped_reg, {}),
    "reg sum": (fusefeat.clamped_reg, {"reduction": "sum", "subtract_floor": True}),
}


def both_of(results: Any) -> Tensor:
    return results if isinstance(results, Tensor) else results[0] + 0.3 * results[1]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_same_as_the_general_way(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    function, keywords = FUNCTIONS[name]
    args = leaves(dtype)
    got = both_of(function(*args, margin=0.7, **keywords))
    want = both_of(general(monkeypatch, function, args, margin=0.7, **keywords))
    assert got.dtype == want.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2e-6)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    scale = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 3 * tolerance)
    grads = [torch.autograd.grad(out, args, torch.tensor(1.7, dtype=out.dtype)) for out in (got, want)]
    for mine, other in zip(*grads, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=scale, atol=scale * float(other.abs().max()))


# In one block of features, in several, and with more channels than are multiplied at a time; the row whose logits are
# beyond float16 is in the first chunk of rows, and in the last.
@pytest.mark.parametrize(("channels", "features"), [(6, 100), (6, 20000), (1100, 300)])
@pytest.mark.parametrize("row", [0, 290])
@pytest.mark.parametrize("keep", [True, False])
def test_logits_beyond_rounding(
    channels: int, features: int, row: int, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, channels, generator=generator)
    x[row] *= 1e5
    weight = torch.randn(features, channels, generator=generator) * channels**-0.5
    args = [t.bfloat16().requires_grad_() for t in (x, weight)]
    if not keep:
        monkeypatch.setattr(statistics, "rows_to_keep", lambda *args: 0)
    got = fusefeat.shared_penalty(args[0], None, args[1])
    want = general(monkeypatch, fusefeat.shared_penalty, (args[0], None, args[1]))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    for mine, other in zip(torch.autograd.grad(got, args), torch.autograd.grad(want, args), strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2 * scale)


@pytest.mark.parametrize("keep", [0, 128])
def test_logits_beyond_it_only_when_rounded(keep: int) -> None:
    # Four of 254 19/32 are 254 5/8 in float16, whose log-sum-exp is beyond 256, where logits are not rounded; that of
    # the four themselves is not.
    x, weight = torch.randn(128, 3), torch.randn(300, 3)
    x[::2] = torch.tensor([64.0, 1.0, 0.0])
    x[1::2, :2] = 0
    weight[:4, :2] = torch.tensor([127 / 32, 19 / 32])
    x, weight = x.bfloat16(), weight.bfloat16()
    got, kept = loss_gradients(OPS, x, weight, keep)
    assert kept.shape[0] == keep
    want = loss_gradients(OPS, x.float(), weight.float())[0]
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


def plain_penalty(x: Tensor, weight: Tensor) -> Tensor:
    z = x @ weight.t()
    log_probs = torch.log_softmax(z, 1, dtype=torch.promote_types(z.dtype, torch.float32))
    mean = log_probs.exp().mean(0)
    entropy = -torch.where(log_probs.exp() == 0, 0.0, log_probs.exp() * log_probs).sum(1).mean()
    return entropy + torch.where(mean == 0, 0.0, mean * (torch.where(mean == 0, 1.0, mean) * len(weight)).log()).sum()


# The last are of few rows, whose features are their own: what is left of their gradients is small.
@pytest.mark.parametrize(
    ("rows", "features", "size"),
    [*((200, 2000, size) for size in (0.5, 1.0, 4.0, 100.0)), (2, 6000, 0.25), (8, 6000, 0.25), (130, 6000, 0.25)],
)
def test_bfloat16_within_twice_eager_where_assignments_are_sharp(rows: int, features: int, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (size * torch.randn(rows, 256, generator=generator)).bfloat16()
    weight = torch.randn(features, 256, generator=generator).bfloat16()

    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        args = [t.to(dtype).requires_grad_() for t in (x, weight)]
        return [g.double() for g in torch.autograd.grad(function(*args), args)]

    exact = gradients(plain_penalty, torch.float64)
    eager = gradients(plain_penalty, torch.bfloat16)
    ours = gradients(lambda x, weight: fusefeat.shared_penalty(x, None, weight), torch.bfloat16)
    for got, plain, want in zip(ours, eager, exact, strict=True):
        assert (got - want).norm() <= 2 * (plain - want).norm()


@pytest.mark.parametrize("offset", [100.0, 200.0, 4500.0, 1e4])
@pytest.mark.parametrize("features", [100, 1000])
def test_bfloat16_within_twice_eager_where_logits_share_an_offset(offset: float, features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 32, generator=generator), torch.randn(features, 32, generator=generator) * 32**-0.5
    bias = torch.full((features,), offset)

    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        args = [t.bfloat16().to(dtype).requires_grad_() for t in (x, weight)]
        return [g.double() for g in torch.autograd.grad(function(*args, bias.bfloat16().to(dtype)), args)]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return penalty_of(torch.nn.functional.linear(x, weight, bias))

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fusefeat.shared_penalty(x, None, weight, bias)

    exact, eager, ours = (
        gradients(plain, torch.float64),
        gradients(plain, torch.bfloat16),
        gradients(fused, torch.bfloat16),
    )
    for got, other, want in zip(ours, eager, exact, strict=True):
        assert (got - want).norm() <= 2 * (other - want).norm()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name: str) -> None:
    function, keywords = FUNCTIONS[name]
    args = leaves(torch.float64, rows=4, features=3)
    assert torch.autograd.gradcheck(lambda *a: function(*a, **keywords), args)
    assert torch.autograd.gradgradcheck(lambda *a: function(*a, **keywords), args)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows_and_switched_off_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, keywords = FUNCTIONS[name]
    input, _, weight, bias = leaves(torch.float32)
    empty = input.detach()[:0].requires_grad_()
    out = both_of(function(empty, None, weight, bias, **keywords))
    assert out == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(out, [empty, weight, bias]))
    with torch.no_grad():
        bias[[2, 7]] = float("-inf")
    args = (input, None, weight, bias)
    out = both_of(function(*args, **keywords))
    torch.testing.assert_close(out, both_of(general(monkeypatch, function, args, **keywords)))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out, [input, weight, bias]))
    with torch.no_grad():
        input[3, 1] = float("nan")
    assert both_of(function(*args, **keywords)).isnan()


def test_only_one_of_the_two_is_used() -> None:
    input, context, weight, bias = leaves(torch.float64)
    for index in (0, 1):
        out = fusefeat.shared_objective(input, context, weight, bias)[index]
        alone = (fusefeat.shared_penalty, fusefeat.clamped_reg)[index](input, context, weight, bias)
        args = [input, context, weight, bias]
        for mine, other in zip(torch.autograd.grad(out, args), torch.autograd.grad(alone, args), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_reg", [False, True])
def test_opcheck(dtype: torch.dtype, with_reg: bool) -> None:
    input, context, weight, bias = leaves(dtype)
    args = (context, input, weight, bias, 0.7, 0, 0.8, 1.3, with_reg, 0.1, 0.2)
    torch.library.opcheck(OPS.shared_loss.default, (*args, 19))
    penalty, reg, *saved = OPS.shared_loss(*[a.detach() if isinstance(a, Tensor) else a for a in args], 0)
    incoming = (torch.randn_like(penalty), torch.randn_like(reg) if with_reg else None)
    torch.library.opcheck(OPS.shared_loss_backward.default, (*incoming, *args, *saved, [True] * 4))
    clamped = (context, input, weight, bias, 0.7, 0, 0.1, 0.2)
    torch.library.opcheck(OPS.clamped_loss.default, clamped)
    torch.library.opcheck(OPS.clamped_loss_backward.default, (torch.ones_like(penalty), *clamped, [True] * 4))
