"""The shared-penalty family on a CUDA device: the shared cases, large sizes, memory, graphs, no synchronisation."""

from __future__ import annotations

import fusefeat
import pool_cases
import pytest
import shared_cases
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", shared_cases.CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_cases(name: str, dtype: torch.dtype) -> None:
    inputs = shared_cases.CASES[name](dtype).on("cuda")
    shared_cases.compare_objective(fusefeat.shared_objective, inputs, "cuda")
    shared_cases.compare_reg(fusefeat.clamped_reg, inputs, "cuda")
    if "garbage" not in name:
        shared_cases.compare_matrix(fusefeat.shared_assignment, inputs, "cuda")
        shared_cases.compare_matrix(fusefeat.clamped_activation, inputs, "cuda")


def problem(dtype: torch.dtype, rows: int = 1024, channels: int = 256, features: int = 65536) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, channels, device="cuda").to(dtype).requires_grad_()
    return x, torch.randn(features, channels, device="cuda").to(dtype).requires_grad_()


def step(x: Tensor, weight: Tensor, backend: str | None = "cuda") -> list[Tensor]:
    penalty, reg = fusefeat.shared_objective(x, None, weight, margin=0.1, backend=backend)
    return [penalty, reg, *torch.autograd.grad(penalty + reg, [x, weight])]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("sizes", [(1024, 256, 65536), (8192, 128, 1024), (1000, 100, 9999)])
def test_large_and_bitwise_equal_over_repeats(dtype: torch.dtype, bound: float, sizes: tuple[int, int, int]) -> None:
    x, weight = problem(dtype, *sizes)
    first = step(x, weight)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(x, weight), strict=True))
    wanted = step(*(t.detach().double().requires_grad_() for t in (x, weight)), backend="reference")
    for mine, truth in zip(first, wanted, strict=True):
        pool_cases.assert_close(mine, truth, bound, "large")


def test_more_logits_than_32_bits_count() -> None:
    x, weight = problem(torch.float32, 40_000, 8, 65536)
    penalty, stats = fusefeat.shared_penalty(x, None, weight, return_stats=True, backend="cuda")
    _, tail = fusefeat.shared_penalty(x[-50:], None, weight, return_stats=True, backend="reference")
    torch.testing.assert_close(stats.row_entropy[-50:], tail.row_entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.mean_probs.sum(), torch.ones((), device="cuda"), rtol=1e-4, atol=0)
    grads = torch.autograd.grad(penalty, [x, weight])
    assert all(grad.isfinite().all() for grad in grads)


def test_memory_is_bounded() -> None:
    x, weight = problem(torch.float32, 4096)
    step(x, weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step(x, weight)
    extra = torch.cuda.max_memory_allocated() - before - sum(g.numel() * g.element_size() for g in grads)
    assert extra <= 64 * 2**20 + 64 * (4096 + 65536)


def test_no_synchronisation_and_graph_capture() -> None:
    x, weight = problem(torch.bfloat16, 500, 64, 3000)
    want = step(x, weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, weight)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_chosen_on_cuda_tensors() -> None:
    from fusefeat import backends

    if not backends.BACKENDS["cuda"].why_not(torch.empty(0, device="cuda")):
        assert backends.choose("shared_penalty", None, torch.empty(0, device="cuda")) == "cuda"
