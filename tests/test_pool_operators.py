"""The operators as PyTorch sees them: opcheck, torch.func, torch.compile, export, fake and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusefeat
import pool_cases
import pytest
import torch
from torch import Tensor, func

MASK = torch.tensor([[True, False, True, True, True], [False, True, True, False, True]])
OPS = torch.ops.fusefeat


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attend(x: Tensor, query: Tensor, backend: str | None = None) -> Tensor:
    out, weights = fusefeat.attention_pool(x, query, mask=MASK, return_weights=True, backend=backend)
    return out.sin().sum() + weights.square().sum()


def pool(x: Tensor, scores: Tensor, backend: str | None = None) -> Tensor:
    return fusefeat.softmax_pool(x, scores, mask=MASK, backend=backend).sin().sum()


def pool_packed(x: Tensor, query: Tensor, backend: str | None = None) -> Tensor:
    cu = torch.tensor([0, 4, 4, 10])
    return fusefeat.attention_pool(x.reshape(10, 4), query, cu_seqlens=cu, backend=backend).sin().sum()


def plain(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, other: loss(x, other, "reference")


CASES = {
    "attention_pool": (attend, (3, 4)),
    "softmax_pool": (pool, (2, 5, 3)),
    "packed": (pool_packed, (3, 4)),
}
cases = pytest.mark.parametrize("name", CASES)


def inputs(name: str, *lead: int) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    loss, shape = CASES[name]
    return loss, pool_cases.rand(*lead, 2, 5, 4), pool_cases.rand(*lead, *shape)


def gradients(loss: Callable[..., Tensor]) -> Callable[..., Any]:
    return func.grad(loss, (0, 1))


def of_gradients(loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """A scalar of the gradients, to be differentiated again."""
    return lambda x, other: sum(g.square().sum() for g in gradients(loss)(x, other))


@cases
def test_func_grad_and_its_own_grad(name: str) -> None:
    loss, x, other = inputs(name)
    torch.testing.assert_close(gradients(loss)(x, other), gradients(plain(loss))(x, other))
    second, plain_second = gradients(of_gradients(loss)), gradients(of_gradients(plain(loss)))
    torch.testing.assert_close(second(x, other), plain_second(x, other))


@cases
def test_jacrev(name: str) -> None:
    loss, x, other = inputs(name)
    torch.testing.assert_close(
        func.jacrev(gradients(loss), (0, 1))(x, other), func.jacrev(gradients(plain(loss)), (0, 1))(x, other)
    )


@cases
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap(name: str, dims: tuple[int | None, int | None]) -> None:
    loss, x, other = inputs(name, 6)
    x, other = (t if d == 0 else t[0] for t, d in zip((x, other), dims, strict=True))
    for wrap in (lambda f: f, gradients):
        got, want = (func.vmap(wrap(f), dims)(x, other) for f in (loss, plain(loss)))
        torch.testing.assert_close(got, want)
    over = [lambda x, o, f=f: func.vmap(f, dims)(x, o).sum() for f in (loss, plain(loss))]
    torch.testing.assert_close(gradients(over[0])(x, other), gradients(over[1])(x, other))


def test_nested_vmap_and_vmapped_mask_and_offsets() -> None:
    x, query = pool_cases.rand(3, 6, 2, 5, 4), pool_cases.rand(6, 4)
    both = [
        func.vmap(func.vmap(lambda x, q, b=b: fusefeat.attention_pool(x, q, backend=b)), (0, None))(x, query)
        for b in (None, "reference")
    ]
    torch.testing.assert_close(*both)
    masks = torch.rand(6, 2, 5) > 0.3
    both = [
        func.vmap(lambda x, m, b=b: fusefeat.attention_pool(x, query[0], mask=m, backend=b))(x[0], masks)
        for b in (None, "reference")
    ]
    torch.testing.assert_close(*both)
    cus = torch.tensor([[0, 2, 10], [0, 9, 10], [0, 0, 10]])
    packed = pool_cases.rand(3, 10, 4)
    both = [
        func.vmap(lambda x, c, b=b: fusefeat.attention_pool(x, query[0], cu_seqlens=c, backend=b))(packed, cus)
        for b in (None, "reference")
    ]
    torch.testing.assert_close(*both)


def test_vmap_of_the_operators_themselves() -> None:
    x, query = pool_cases.rand(6, 2, 5, 4), pool_cases.rand(4)
    got = func.vmap(lambda x: OPS.attention_pool(x, query, None, None, 1.0, True)[0])(x)
    torch.testing.assert_close(got, torch.stack([fusefeat.attention_pool(one, query) for one in x]))
    assert torch.autograd.gradgradcheck(
        lambda x, q: OPS.attention_pool(x, q, MASK, None, 0.7, True)[::2],
        (x[0].requires_grad_(), query.requires_grad_()),
    )


@cases
@pytest.mark.parametrize("wrap", ["jvp", "jacfwd", "hessian", "jvp of vmap", "dual"])
def test_forward_mode_is_refused_and_right_on_the_reference(name: str, wrap: str) -> None:
    loss, x, other = inputs(name)

    def forward(f: Callable[..., Tensor]) -> Any:
        if wrap == "jvp":
            return func.jvp(f, (x, other), (x, other))[1]
        if wrap == "jacfwd":
            return func.jacfwd(f)(x, other)
        if wrap == "hessian":
            return func.hessian(f)(x, other)
        if wrap == "jvp of vmap":
            mapped = func.vmap(f, (0, None))
            return func.jvp(lambda x: mapped(x, other), (x[None],), (x[None],))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(f(dual, other)).tangent

    with pytest.raises(NotImplementedError, match=r"forward-mode.*reference"):
        forward(loss)
    tangent = forward(plain(loss))
    if wrap == "dual":
        torch.testing.assert_close(tangent, (func.grad(plain(loss))(x, other) * x).sum())


@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_mode_through_a_backward_is_refused(create_graph: bool) -> None:
    x = pool_cases.rand(2, 3, 4).requires_grad_()
    out = fusefeat.attention_pool(x, pool_cases.rand(4))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.autograd.grad(out, x, dual, create_graph=create_graph)


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


@cases
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(name: str, dynamic: bool) -> None:
    loss, x, other = inputs(name)

    def backward(f: Callable[..., Tensor]) -> Any:
        leaves = x.clone().requires_grad_(), other.clone().requires_grad_()
        return torch.autograd.grad(f(*leaves), leaves)

    torch.testing.assert_close(backward(compiled(loss, dynamic=dynamic)), backward(plain(loss)))


def test_compile_runs_the_kernels_through_inductor() -> None:
    torch._dynamo.reset()
    x, query = torch.randn(2, 5, 4, requires_grad=True), torch.randn(4)
    fast = torch.compile(lambda x: fusefeat.attention_pool(x * 2, query, mask=MASK).relu(), fullgraph=True)
    want = fusefeat.attention_pool(x * 2, query, mask=MASK).relu()
    torch.testing.assert_close(fast(x), want)
    torch.testing.assert_close(torch.autograd.grad(fast(x).sum(), x), torch.autograd.grad(want.sum(), x))


def test_compile_follows_changing_sizes() -> None:
    f = compiled(lambda x, q: fusefeat.attention_pool(x, q, scale=0.5), dynamic=True)
    for b, t, d in ((2, 5, 4), (3, 9, 6), (7, 2, 16)):
        x, query = torch.randn(b, t, d), torch.randn(d)
        torch.testing.assert_close(f(x, query), fusefeat.attention_pool(x, query, scale=0.5))


@cases
def test_compile_over_transforms_is_no_silent_zero(name: str) -> None:
    loss, x, other = inputs(name)
    for wrap in (gradients, lambda f: gradients(of_gradients(f))):
        torch.testing.assert_close(compiled(wrap(loss))(x, other), wrap(plain(loss))(x, other))
    many = torch.stack([x, 2 * x])
    for f in (loss, func.grad(loss)):
        g = plain(loss) if f is loss else func.grad(plain(loss))
        got = compiled(lambda m, o, f=f: func.vmap(f, (0, None))(m, o))(many, other)
        torch.testing.assert_close(got, func.vmap(g, (0, None))(many, other))
    tangent = compiled(lambda x, o: func.jvp(loss, (x, o), (x, o)))(x, other)
    torch.testing.assert_close(tangent, func.jvp(plain(loss), (x, other), (x, other)))


class Pooling(torch.nn.Module):
    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        return fusefeat.attention_pool(x, query)


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_operator(strict: bool) -> None:
    shapes = {"x": {0: torch.export.Dim("bags"), 1: torch.export.Dim("tokens")}, "query": None}
    program = torch.export.export(
        Pooling(), (torch.randn(2, 5, 4), torch.randn(4)), dynamic_shapes=shapes, strict=strict
    )
    assert any("fusefeat.attention_pool" in str(node.target) for node in program.graph.nodes)
    x, query = torch.randn(7, 11, 4), torch.randn(4)
    torch.testing.assert_close(program.module()(x, query), fusefeat.attention_pool(x, query))


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    for queries, want in (((), (2, 4)), ((3,), (2, 3, 4))):
        out = fusefeat.attention_pool(torch.empty(2, 5, 4, device="meta"), torch.empty(*queries, 4, device="meta"))
        assert out.device.type == "meta" and out.shape == want
    with FakeTensorMode():
        out, weights = fusefeat.softmax_pool(
            torch.empty(9, 4, dtype=torch.half),
            torch.empty(9),
            cu_seqlens=torch.empty(4, dtype=torch.int32),
            return_weights=True,
        )
        assert (out.shape, out.dtype, weights.shape, weights.dtype) == ((3, 4), torch.half, (9,), torch.float32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(packed: bool, dtype: torch.dtype) -> None:
    x, query, scores = (pool_cases.rand(*s, dtype=dtype) for s in ((2, 5, 4), (3, 4), (2, 5)))
    mask, cu = MASK, None
    if packed:
        x, scores, mask, cu = x.flatten(0, 1), scores.flatten(), None, torch.tensor([0, 3, 3, 10])
    for forward, backward, other, extra in (
        (OPS.attention_pool, OPS.attention_pool_backward, query, (0.7,)),
        (OPS.softmax_pool, OPS.softmax_pool_backward, scores, ()),
    ):
        leaves = x.clone().requires_grad_(), other.clone().requires_grad_()
        for need_weights in (False, True):
            torch.library.opcheck(forward.default, (*leaves, mask, cu, *extra, need_weights))
        saved = forward(x, other, mask, cu, *extra, True)
        for grad_weights in (None, torch.randn_like(saved[2]).requires_grad_()):
            grad_out = torch.randn_like(saved[0]).requires_grad_()
            args = (grad_out, grad_weights, *leaves, mask, cu, *extra, *saved, True, True)
            torch.library.opcheck(backward.default, args)


def test_opcheck_of_the_product() -> None:
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(OPS.mm.default, (a, b.t()))
    torch.library.opcheck(OPS.mm.default, (a.t(), a))


def test_operators_refuse_bad_input_with_a_runtime_error() -> None:
    x, query = torch.randn(2, 5, 4), torch.randn(4)
    bad: list[tuple[Any, ...]] = [
        (x[0], query, None, None, 1.0, False),
        (x, query[:3], None, None, 1.0, False),
        (x, query.double(), None, None, 1.0, False),
        (x.int(), query, None, None, 1.0, False),
        (x, query, MASK[:1], None, 1.0, False),
        (x, query, MASK.int(), None, 1.0, False),
        (x[0], query, MASK[0], torch.tensor([0, 5]), 1.0, False),
        (x[0], query, None, torch.tensor([0.0, 5.0]), 1.0, False),
    ]
    for args in bad:
        with pytest.raises(RuntimeError, match="fusefeat"):
            OPS.attention_pool(*args)
    torch.testing.assert_close(
        OPS.attention_pool(x, query, None, None, 1.0, False)[0], fusefeat.attention_pool(x, query)
    )
