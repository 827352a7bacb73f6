"""Both pools on a CUDA device: every GPU backend on the shared cases, determinism, CUDA graphs, no synchronisation."""

from __future__ import annotations

import functools

import fusefeat
import pool_cases
import pytest
import torch

pytestmark = pytest.mark.gpu

BACKENDS = ["triton", "cuda"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@each_backend
@pytest.mark.parametrize("name", pool_cases.ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_pool(backend: str, name: str, dtype: torch.dtype) -> None:
    call = functools.partial(fusefeat.attention_pool, backend=backend)
    inputs = pool_cases.ATTENTION[name](dtype)
    pool_cases.compare(call, fusefeat.attention_pool, inputs, with_scale=True, device="cuda")


@each_backend
@pytest.mark.parametrize("name", pool_cases.SOFTMAX)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_pool(backend: str, name: str, dtype: torch.dtype) -> None:
    call = functools.partial(fusefeat.softmax_pool, backend=backend)
    inputs = pool_cases.SOFTMAX[name](dtype)
    pool_cases.compare(call, fusefeat.softmax_pool, inputs, with_scale=False, device="cuda")


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cu = pool_cases.offsets(3, 50_000, 5, 0, 700, 4000).cuda()
    x = torch.randn(54_708, 512, device="cuda", requires_grad=True)
    return x, torch.randn(512, device="cuda", requires_grad=True), cu


@each_backend
def test_large_and_bitwise_equal_over_repeats(backend: str) -> None:
    x, query, cu = problem()

    def digest() -> list[torch.Tensor]:
        out, weights = fusefeat.attention_pool(
            x, query, cu_seqlens=cu, scale=0.05, return_weights=True, backend=backend
        )
        return [out, weights, *torch.autograd.grad(out.square().sum() + weights.square().sum(), [x, query])]

    first = digest()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, digest(), strict=True))
    exact = [t.detach().double().requires_grad_() for t in (x, query)]
    out, weights = fusefeat.attention_pool(*exact, cu_seqlens=cu, scale=0.05, return_weights=True, backend="reference")
    wanted = [out, weights, *torch.autograd.grad(out.square().sum() + weights.square().sum(), exact)]
    for mine, truth in zip(first, wanted, strict=True):
        pool_cases.assert_close(mine, truth, 5e-6, "large")


@each_backend
def test_no_synchronisation_and_graph_capture(backend: str) -> None:
    x, query, cu = problem()

    def step() -> tuple[torch.Tensor, ...]:
        out = fusefeat.attention_pool(x, query, cu_seqlens=cu, scale=0.05, backend=backend)
        return out, *torch.autograd.grad(out.sum(), [x, query])

    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@each_backend
def test_offsets_that_lie_give_nan(backend: str) -> None:
    x, query = torch.randn(10, 4, device="cuda"), torch.randn(4, device="cuda")
    for values in ([0, 3, 1000], [0, -5, 10], [7, 3, 10], [10, 0, 10], [-(2**60), 2**60, 5]):
        out = fusefeat.attention_pool(x, query, cu_seqlens=torch.tensor(values, device="cuda"), backend=backend)
        assert out.isnan().all()


def test_compile() -> None:
    x, query = torch.randn(4, 300, 64, device="cuda", requires_grad=True), torch.randn(64, device="cuda")
    fast = torch.compile(lambda x: fusefeat.attention_pool(x * 2, query).relu(), fullgraph=True)
    want = fusefeat.attention_pool(x * 2, query, backend="reference").relu()
    torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(fast(x).sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), x), rtol=1e-4, atol=1e-5)
