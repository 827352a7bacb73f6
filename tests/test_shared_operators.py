"""The shared-penalty operators as PyTorch sees them: opcheck, torch.func, compile, export, fake and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusefeat
import pool_cases
import pytest
import torch
from torch import Tensor, func

OPS = torch.ops.fusefeat
MARGIN = 0.7
ROW_WEIGHT = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.5, 0.7], dtype=torch.float64)
CONTEXT = pool_cases.rand(2, 3)
BIAS = pool_cases.rand(5)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def penalty(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    loss, stats = fusefeat.shared_penalty(
        x, CONTEXT, weight, BIAS, margin=MARGIN, row_weight=ROW_WEIGHT, return_stats=True, backend=backend
    )
    return loss + stats.row_entropy.sin().sum() + stats.lse.square().sum() + stats.mean_probs.sin().sum()


def objective(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    loss, reg = fusefeat.shared_objective(x, CONTEXT, weight, margin=MARGIN, backend=backend)
    return loss * reg.sin()


def regulariser(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    reg = fusefeat.clamped_reg(x, None, weight, BIAS, margin=MARGIN, backend=backend)
    return reg.square() + fusefeat.clamped_reg(x, CONTEXT, weight, margin=MARGIN, reduction="sum", backend=backend)


def assignment(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    return fusefeat.shared_assignment(x, CONTEXT, weight, BIAS, margin=MARGIN, backend=backend).sin().sum()


def activation(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    return fusefeat.clamped_activation(x, CONTEXT, weight, BIAS, margin=MARGIN, backend=backend).square().sum()


Loss = Callable[..., Tensor]
CASES: dict[str, Loss] = {f.__name__: f for f in (penalty, objective, regulariser, assignment, activation)}
cases = pytest.mark.parametrize("loss", CASES.values(), ids=CASES)


def plain(loss: Loss) -> Loss:
    return lambda x, weight: loss(x, weight, "reference")


def inputs(*lead: int) -> tuple[Tensor, Tensor]:
    return pool_cases.rand(*lead, 4, 3), pool_cases.rand(*lead, 5, 3)


def gradients(loss: Loss) -> Callable[..., Any]:
    return func.grad(loss, (0, 1))


def of_gradients(loss: Loss) -> Loss:
    """A scalar of the gradients, to be differentiated again."""
    return lambda x, weight: sum(g.square().sum() for g in gradients(loss)(x, weight))


@cases
def test_func_grad_and_its_own_grad(loss: Loss) -> None:
    args = inputs()
    torch.testing.assert_close(gradients(loss)(*args), gradients(plain(loss))(*args))
    second, plain_second = gradients(of_gradients(loss)), gradients(of_gradients(plain(loss)))
    torch.testing.assert_close(second(*args), plain_second(*args))


@cases
def test_jacrev(loss: Loss) -> None:
    args = inputs()
    got, want = (func.jacrev(gradients(f), (0, 1))(*args) for f in (loss, plain(loss)))
    torch.testing.assert_close(got, want)


@cases
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap(loss: Loss, dims: tuple[int | None, int | None]) -> None:
    args = tuple(t if d == 0 else t[0] for t, d in zip(inputs(3), dims, strict=True))
    for wrap in (lambda f: f, gradients):
        got, want = (func.vmap(wrap(f), dims)(*args) for f in (loss, plain(loss)))
        torch.testing.assert_close(got, want)
    over = [lambda x, w, f=f: func.vmap(f, dims)(x, w).sum() for f in (loss, plain(loss))]
    torch.testing.assert_close(gradients(over[0])(*args), gradients(over[1])(*args))


def test_vmapped_row_weights_are_read_by_no_check() -> None:
    x, weight = inputs()
    weights = torch.rand(3, 4, dtype=torch.float64)
    weights[1, 2] = 0
    got, want = (
        func.vmap(lambda w, b=b: fusefeat.shared_penalty(x, None, weight, row_weight=w, backend=b))(weights)
        for b in (None, "reference")
    )
    torch.testing.assert_close(got, want)


@cases
@pytest.mark.parametrize("wrap", ["jvp", "jacfwd", "hessian", "jvp of vmap", "dual"])
def test_forward_mode_is_refused_and_right_on_the_reference(loss: Loss, wrap: str) -> None:
    x, weight = inputs()

    def forward(f: Loss) -> Any:
        if wrap == "jvp":
            return func.jvp(f, (x, weight), (x, weight))[1]
        if wrap == "jacfwd":
            return func.jacfwd(f)(x, weight)
        if wrap == "hessian":
            return func.hessian(f)(x, weight)
        if wrap == "jvp of vmap":
            mapped = func.vmap(f, (0, None))
            return func.jvp(lambda x: mapped(x, weight), (x[None],), (x[None],))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(f(dual, weight)).tangent

    with pytest.raises(NotImplementedError, match=r"forward-mode.*reference"):
        forward(loss)
    tangent = forward(plain(loss))
    if wrap == "dual":
        torch.testing.assert_close(tangent, (func.grad(plain(loss))(x, weight) * x).sum())


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


@cases
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(loss: Loss, dynamic: bool) -> None:
    args = inputs()

    def backward(f: Loss) -> Any:
        leaves = [t.clone().requires_grad_() for t in args]
        return torch.autograd.grad(f(*leaves), leaves)

    torch.testing.assert_close(backward(compiled(loss, dynamic=dynamic)), backward(plain(loss)))


def test_compile_runs_the_kernels_through_inductor() -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8)

    def both(x: Tensor) -> Tensor:
        loss, reg = fusefeat.shared_objective(x * 2, None, weight, margin=0.4)
        return loss + reg.relu()

    fast = torch.compile(both, fullgraph=True)
    torch.testing.assert_close(fast(x), both(x))
    torch.testing.assert_close(torch.autograd.grad(fast(x), x), torch.autograd.grad(both(x), x))


def test_compile_follows_changing_sizes() -> None:
    f = compiled(lambda x, c, w: fusefeat.shared_objective(x, c, w, margin=0.5), dynamic=True)
    for rows, context, channels, features in ((4, 2, 3, 5), (9, 3, 7, 30), (40, 21, 2, 17)):
        args = torch.randn(rows, channels), torch.randn(context, channels), torch.randn(features, channels)
        torch.testing.assert_close(f(*args), fusefeat.shared_objective(*args, margin=0.5))


@cases
def test_compile_over_transforms_is_no_silent_zero(loss: Loss) -> None:
    args = inputs()
    for wrap in (gradients, lambda f: gradients(of_gradients(f))):
        torch.testing.assert_close(compiled(wrap(loss))(*args), wrap(plain(loss))(*args))
    many = torch.stack([args[0], 2 * args[0]])
    for f in (loss, func.grad(loss)):
        g = plain(loss) if f is loss else func.grad(plain(loss))
        got = compiled(lambda m, w, f=f: func.vmap(f, (0, None))(m, w))(many, args[1])
        torch.testing.assert_close(got, func.vmap(g, (0, None))(many, args[1]))


class Objective(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fusefeat.shared_objective(x, None, weight)


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_operator(strict: bool) -> None:
    shapes = {"x": {0: torch.export.Dim("rows")}, "weight": None}
    program = torch.export.export(
        Objective(), (torch.randn(6, 4), torch.randn(9, 4)), dynamic_shapes=shapes, strict=strict
    )
    assert any("fusefeat.shared_penalty" in str(node.target) for node in program.graph.nodes)
    x, weight = torch.randn(17, 4), torch.randn(9, 4)
    torch.testing.assert_close(program.module()(x, weight), fusefeat.shared_objective(x, None, weight))


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    x, weight = torch.empty(6, 4, device="meta"), torch.empty(9, 4, device="meta")
    loss, reg, stats, clamp_stats = fusefeat.shared_objective(x, x, weight, return_stats=True)
    assert loss.device.type == "meta" and loss.shape == reg.shape == ()
    assert (stats.mean_probs.shape, stats.lse.shape, clamp_stats.fired.shape) == ((9,), (12,), (9,))
    assert fusefeat.shared_assignment(x, None, weight).shape == (6, 9)
    with FakeTensorMode():
        x, weight = torch.empty(6, 4, dtype=torch.half), torch.empty(9, 4, dtype=torch.half)
        assert fusefeat.shared_penalty(x, None, weight, row_weight=torch.empty(6)).dtype == torch.float32
        out = fusefeat.clamped_activation(x, x, weight)
        assert (out.shape, out.dtype) == ((12, 9), torch.half)


NEEDS = ([True] * 5, [False, True, True, False, False])


@pytest.mark.parametrize("full", [False, True], ids=["bare", "context, bias and row weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(full: bool, dtype: torch.dtype) -> None:
    acc = torch.promote_types(dtype, torch.float32)
    shapes = [(2, 3), (4, 3), (5, 3), (5,)]
    context, x, weight, bias = (pool_cases.rand(*s, dtype=dtype).requires_grad_() for s in shapes)
    row_weight = ROW_WEIGHT.to(acc).requires_grad_()
    if not full:
        context, bias, row_weight = None, None, None
    rows = 6 if full else 4
    common = (context, x, weight, bias, MARGIN)
    for with_clamp, keep in ((False, 0), (True, rows)):
        torch.library.opcheck(OPS.shared_penalty.default, (*common, row_weight, 0, with_clamp, keep))
        entropy, lse, probs, excess, _, kept = OPS.shared_penalty(*common, row_weight, 0, with_clamp, keep)
        grads = [torch.randn_like(t).requires_grad_() for t in (entropy, lse, probs, excess)]
        if not with_clamp:
            grads[3] = None
        saved = [t.detach() for t in (entropy, lse, kept)]
        for needs in NEEDS:
            args = (*grads, *common, row_weight, 0, *saved, needs)
            torch.library.opcheck(OPS.shared_penalty_backward.default, args)
    torch.library.opcheck(OPS.clamped_reg.default, (*common, row_weight, 0))
    grad_rows = torch.randn(rows, dtype=acc, requires_grad=True)
    torch.library.opcheck(OPS.clamped_reg_backward.default, (grad_rows, *common, row_weight, 0, NEEDS[0][:4]))
    grad = torch.randn(rows, 5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(OPS.shared_assignment.default, (*common, 0))
    probs = OPS.shared_assignment(*common, 0).detach()
    torch.library.opcheck(OPS.shared_assignment_backward.default, (grad, *common, 0, probs, NEEDS[0][:4]))
    torch.library.opcheck(OPS.clamped_activation.default, (*common, 0))
    torch.library.opcheck(OPS.clamped_activation_backward.default, (grad, *common, 0, NEEDS[0][:4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_finished_scalars(dtype: torch.dtype) -> None:
    acc = torch.promote_types(dtype, torch.float32)
    context, x, weight, bias = (pool_cases.rand(*s, dtype=dtype) for s in ((2, 3), (4, 3), (5, 3), (5,)))
    common = [t.requires_grad_() for t in (context, x, weight, bias)] + [MARGIN, 0]
    for with_reg, keep in ((False, 0), (True, 6)):
        args = (*common, 0.8, 1.3, with_reg, 0.5, 0.1)
        torch.library.opcheck(OPS.shared_loss.default, (*args, keep))
        _, _, *saved = (t.detach() for t in OPS.shared_loss(*args, keep))
        grads = [torch.randn((), dtype=acc, requires_grad=True) for _ in range(2)]
        if not with_reg:
            grads[1] = None
        torch.library.opcheck(OPS.shared_loss_backward.default, (*grads, *args, *saved, NEEDS[0][:4]))
    torch.library.opcheck(OPS.clamped_loss.default, (*common, 0.5, 0.1))
    grad = torch.randn((), dtype=acc, requires_grad=True)
    torch.library.opcheck(OPS.clamped_loss_backward.default, (grad, *common, 0.5, 0.1, NEEDS[0][:4]))


def test_operators_refuse_bad_input_with_a_runtime_error() -> None:
    x, weight, bias, context = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5), torch.randn(2, 3)
    bad: list[tuple[Any, ...]] = [
        (None, x[0], weight, None, 1.0, None, 0),
        (None, x.int(), weight, None, 1.0, None, 0),
        (None, x, weight[:, :2], None, 1.0, None, 0),
        (None, x, weight.double(), None, 1.0, None, 0),
        (None, x, weight[:0], None, 1.0, None, 0),
        (context[:, :2], x, weight, None, 1.0, None, 0),
        (context.double(), x, weight, None, 1.0, None, 0),
        (None, x, weight, bias[:4], 1.0, None, 0),
        (None, x, weight, bias.int(), 1.0, None, 0),
        (None, x, weight, None, 0.0, None, 0),
        (None, x, weight, None, float("nan"), None, 0),
        (None, x, weight, None, 1.0, torch.ones(5), 0),
        (None, x, weight, None, 1.0, None, 3),
        (None, x, weight, None, 1.0, None, -1),
    ]
    for args in bad:
        with pytest.raises(RuntimeError, match="fusefeat"):
            OPS.clamped_reg(*args)
        with pytest.raises(RuntimeError, match="fusefeat"):
            OPS.shared_penalty(*args, False, 0)
    for keep in (-1, 5):
        with pytest.raises(RuntimeError, match="fusefeat"):
            OPS.shared_penalty(None, x, weight, None, 1.0, None, 0, False, keep)
    row_entropy, lse, *_, kept = OPS.shared_penalty(None, x, weight, None, 1.0, None, 0, False, 0)
    good = (None, x, weight, None, 1.0, None, 0, row_entropy, lse, kept, [True, True, True, False, False])
    for grads in ((x[:, 0], None, x[:, 0], None), (x[:3, 0], None, None, None), (None, lse.double(), None, None)):
        with pytest.raises(RuntimeError, match="fusefeat"):
            OPS.shared_penalty_backward(*grads, *good)
    with pytest.raises(RuntimeError, match="fusefeat"):
        OPS.shared_penalty_backward(lse, None, None, None, *good[:-1], [True])
    with pytest.raises(RuntimeError, match="fusefeat"):
        OPS.shared_penalty_backward(lse, None, None, None, *good[:-2], torch.randn(9, 5), good[-1])
    for grad in OPS.shared_penalty_backward(lse, None, None, None, *good)[1:3]:
        assert grad.isfinite().all()
