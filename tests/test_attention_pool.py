"""Every backend that runs here against the reference on the shared cases, and what the reference itself promises."""

from __future__ import annotations

import functools

import fusefeat
import pool_cases
import pytest
import torch
from fusefeat import backends

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
AVAILABLE = [name for name in ("cpu", "triton", "reference") if not backends.BACKENDS[name].why_not(torch.empty(0))]
FAST = [name for name in AVAILABLE if name != "triton"]  # the interpreter takes its time


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_the_compiled_backend_is_there() -> None:
    assert "cpu" in AVAILABLE, backends.BACKENDS["cpu"].why_unavailable()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pool_cases.ATTENTION)
@pytest.mark.parametrize("backend", FAST)
def test_attention_pool(backend: str, name: str, dtype: torch.dtype) -> None:
    inputs = pool_cases.ATTENTION[name](dtype)
    call = functools.partial(fusefeat.attention_pool, backend=backend)
    pool_cases.compare(call, fusefeat.attention_pool, inputs, with_scale=True)
    if dtype in (torch.float16, torch.bfloat16):
        pool_cases.compare(call, fusefeat.attention_pool, pool_cases.sum_dtypes(inputs), with_scale=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pool_cases.SOFTMAX)
@pytest.mark.parametrize("backend", FAST)
def test_softmax_pool(backend: str, name: str, dtype: torch.dtype) -> None:
    inputs = pool_cases.SOFTMAX[name](dtype)
    call = functools.partial(fusefeat.softmax_pool, backend=backend)
    pool_cases.compare(call, fusefeat.softmax_pool, inputs, with_scale=False)
    if dtype in (torch.float16, torch.bfloat16):
        pool_cases.compare(call, fusefeat.softmax_pool, pool_cases.sum_dtypes(inputs), with_scale=False)


def _textbook(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What the op is, in the words of a paper, for inputs without any edge."""
    return torch.einsum("btk,btd->bkd", torch.softmax(x @ query.t(), 1), x)


@pytest.mark.parametrize("backend", FAST)
def test_against_the_textbook_formula(backend: str) -> None:
    x, query = pool_cases.rand(3, 50, 12), pool_cases.rand(4, 12)
    torch.testing.assert_close(fusefeat.attention_pool(x, query, backend=backend), _textbook(x, query))
    scores = x @ query.t()
    torch.testing.assert_close(fusefeat.softmax_pool(x, scores, backend=backend), _textbook(x, query))


@pytest.mark.parametrize(("queries", "sharpness", "mean"), [(2, 1, 0), (1, 1, 3), (1, 20, 0), (16, 1, 3), (16, 20, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_relative_to_eagers_own(dtype: torch.dtype, queries: int, sharpness: float, mean: float) -> None:
    """RMS errors of output and gradients within twice those of the plain formula in the same type. With tokens far
    from zero the sum over gradients of scores nearly cancels."""

    def results(call, x, query, grad):
        x, query = x.detach().requires_grad_(), query.detach().requires_grad_()
        out = call(x, query)
        return out, *torch.autograd.grad(out, [x, query], grad.to(out.dtype))

    shapes = ((4, 600, 256), (queries, 256), (4, queries, 256))
    x, query, grad = (pool_cases.rand(*shape, dtype=dtype) for shape in shapes)
    query, x = (query.double() * sharpness / 16).to(dtype), x + mean
    exact = results(_textbook, x.double(), query.double(), grad)
    eager = results(_textbook, x, query, grad)
    ours = results(fusefeat.attention_pool, x, query, grad)
    for name, mine, plain, truth in zip(("out", "grad x", "grad query"), ours, eager, exact, strict=True):
        error, allowed = pool_cases.relative_rms(mine, truth), 2 * pool_cases.relative_rms(plain, truth)
        assert error <= max(allowed, 1e-6 if dtype == torch.float32 else 0), (name, error, allowed)


@pytest.mark.parametrize("backend", FAST)
def test_long_bag_beside_bags_of_three(backend: str) -> None:
    cu = pool_cases.offsets(3, 100_000, 3, 0, 3)
    x, query = pool_cases.rand(100_009, 8, dtype=torch.float32), pool_cases.rand(8, dtype=torch.float32)
    inputs = pool_cases.Inputs(x, query, cu_seqlens=cu)
    call = functools.partial(fusefeat.attention_pool, backend=backend)
    pool_cases.compare(call, fusefeat.attention_pool, inputs, with_scale=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(backend: str, masked: bool) -> None:
    x = pool_cases.rand(3, 5, 4).requires_grad_()
    mask = pool_cases.some_mask(3, 5) if masked else None
    query = pool_cases.rand(2, 4).requires_grad_()
    scores = pool_cases.rand(3, 5).requires_grad_()

    def attend(x, query):
        return fusefeat.attention_pool(x, query, mask=mask, scale=0.7, return_weights=True, backend=backend)

    def pool(x, scores):
        return fusefeat.softmax_pool(x, scores, mask=mask, return_weights=True, backend=backend)

    for call, inputs in ((attend, (x, query)), (pool, (x, scores))):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", FAST)
def test_gradcheck_packed(backend: str) -> None:
    x, query = pool_cases.rand(9, 3).requires_grad_(), pool_cases.rand(3).requires_grad_()
    cu = pool_cases.offsets(4, 0, 1, 4)

    def call(x, query):
        return fusefeat.attention_pool(x, query, cu_seqlens=cu, return_weights=True, backend=backend)

    assert torch.autograd.gradcheck(call, (x, query))
    assert torch.autograd.gradgradcheck(call, (x, query))


@pytest.mark.parametrize("backend", FAST)
def test_packed_equals_padded(backend: str) -> None:
    x, query = pool_cases.rand(4, 6, 5), pool_cases.rand(5)
    padded = fusefeat.attention_pool(x, query, backend=backend, return_weights=True)
    cu = torch.arange(5) * 6
    packed = fusefeat.attention_pool(x.flatten(0, 1), query, cu_seqlens=cu, backend=backend, return_weights=True)
    torch.testing.assert_close(packed[0], padded[0])
    torch.testing.assert_close(packed[1], padded[1].flatten())


def test_no_gradient_for_tokens_that_need_none() -> None:
    x, query = pool_cases.rand(2, 6, 5), pool_cases.rand(5).requires_grad_()
    fusefeat.attention_pool(x, query).sum().backward()
    assert x.grad is None and query.grad is not None
    operator = torch.ops.fusefeat.attention_pool_backward
    out, lse, weights = torch.ops.fusefeat.attention_pool(x, query, None, None, 1.0, False)
    grad_x, _ = operator(torch.ones_like(out), None, x, query, None, None, 1.0, out, lse, weights, False, True)
    assert grad_x.numel() == 0


def _digest(threads: int) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    torch.manual_seed(3)
    cu = pool_cases.offsets(3, 20_000, 5, 0, 700, 4000)
    x = pool_cases.rand(int(cu[-1]), 70, dtype=torch.float32).requires_grad_()
    query = pool_cases.rand(2, 70, dtype=torch.float32).requires_grad_()
    out, weights = fusefeat.attention_pool(x, query, cu_seqlens=cu, return_weights=True)
    (out.square().sum() + weights.square().sum()).backward()
    return [out.detach(), weights.detach(), x.grad, query.grad]


def test_bitwise_equal_over_repeats_and_threads() -> None:
    before = torch.get_num_threads()
    try:
        first, *others = [_digest(threads) for threads in (1, 2, 3, 4, 1, 2)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def test_huge_output_is_right_at_its_borders() -> None:
    """Past the sizes at which large-page advice and streaming stores set in."""
    x = torch.randn(3, 9000, 384).requires_grad_()
    query = torch.randn(384) / 20
    fusefeat.attention_pool(x, query).square().sum().backward()
    exact = x.detach().double().requires_grad_()
    fusefeat.attention_pool(exact, query.double(), backend="reference").square().sum().backward()
    pool_cases.assert_close(x.grad, exact.grad, 1e-6, "grad x")
