"""The shared-penalty family on a CUDA device: on the shared cases, at real sizes, in bounded memory, in CUDA graphs."""

from __future__ import annotations

import functools
from typing import Any

import fusefeat
import pool_cases
import pytest
import shared_cases
import torch
from fusefeat import backends
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MIB = 2**20
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize("name", shared_cases.CASES)


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    reasons = backends.BACKENDS[request.param].why_not(torch.empty(0, device="cuda"))
    if reasons:
        pytest.skip(", ".join(reasons))
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@each_case
@each_dtype
def test_objective(backend: str, name: str, dtype: torch.dtype) -> None:
    shared_cases.compare_objective(fusefeat.shared_objective, shared_cases.CASES[name](dtype), backend, "cuda")


@each_case
@each_dtype
def test_regulariser_and_matrices(backend: str, name: str, dtype: torch.dtype) -> None:
    inputs = shared_cases.CASES[name](dtype)
    shared_cases.compare_reg(fusefeat.clamped_reg, inputs, backend, "cuda")
    if "garbage" not in name:
        shared_cases.compare_matrix(fusefeat.shared_assignment, inputs, backend, "cuda")
        shared_cases.compare_matrix(fusefeat.clamped_activation, inputs, backend, "cuda")


def leaves_of(rows: int, context_rows: int, channels: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    """input, context, weight, bias and row_weight, every eleventh of which is 0."""
    shapes = (rows, channels), (context_rows, channels), (features, channels), (features,)
    leaves = [torch.randn(*shape, device="cuda").to(dtype) for shape in shapes]
    row_weight = torch.rand(rows + context_rows, device="cuda")
    row_weight[::11] = 0
    return [*leaves, row_weight.to(dtype)]


def outcome(leaves: list[Tensor], backend: str) -> list[Tensor]:
    """Everything an objective gives: values, statistics and all gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    *operands, row_weight = leaves
    penalty, reg, stats, clamp_stats = fusefeat.shared_objective(
        *operands, margin=1.2 * leaves[0].shape[1] ** -0.5, row_weight=row_weight, backend=backend, return_stats=True
    )
    # Penalty and regulariser alone would leave the incoming gradients of the rows' statistics constant or absent.
    total = penalty + reg + (stats.row_entropy * stats.lse).mean()
    return [penalty, reg, *stats, clamp_stats.fired, *torch.autograd.grad(total, leaves)]


SIZES = [(6000, 2192, 128, 1024), (4096, 0, 256, 8192), (700, 324, 256, 65536), (90_000, 0, 64, 100)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@each_dtype
def test_real_sizes(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Within twice the error of the reference in the same type, or a rounding of the result."""
    leaves = leaves_of(*size, dtype)
    exact = outcome([leaf.double() for leaf in leaves], "reference")
    plain = outcome(leaves, "reference")
    for index, (got, eager, want) in enumerate(zip(outcome(leaves, backend), plain, exact, strict=True)):
        assert got.dtype == eager.dtype and got.isfinite().all()
        if got.dtype == torch.int64:
            # A logit at the margin may fall to either side; there are few.
            assert (got - want).abs().sum() <= 1e-3 * want.sum() + 2
            continue
        error, own = (pool_cases.relative_rms(tensor, want) for tensor in (got, eager))
        assert error <= max(2 * own, shared_cases.TOLERANCE[got.dtype]), f"result {index}: {error:.2e}, eager {own:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_equal_over_repeats(backend: str, dtype: torch.dtype) -> None:
    leaves = leaves_of(3000, 1000, 128, 5000, dtype)
    first = outcome(leaves, backend)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, outcome(leaves, backend), strict=True))


def test_tf32_follows_torch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = leaves_of(1000, 0, 256, 2000, torch.float32)
    exact = outcome([leaf.double() for leaf in leaves], "reference")
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        errors[allowed] = pool_cases.relative_rms(outcome(leaves, backend)[6], exact[6])
    assert errors[False] < 1e-6 and errors[True] < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory(backend: str, dtype: torch.dtype) -> None:
    """Beside inputs, parameters and their gradients in the accumulation type: 64 MiB and a few vectors."""
    rows, channels, features = 2048, 256, 65536
    x = torch.randn(rows, channels, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(features, channels, device="cuda", dtype=dtype, requires_grad=True)
    bound = 64 * MIB + 64 * (rows + features)

    def peak(run: Any) -> tuple[Any, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def loss() -> Tensor:
        penalty, reg = fusefeat.shared_objective(x, None, weight, margin=0.1, backend=backend)
        return penalty + reg

    torch.autograd.grad(loss(), [x, weight])  # workspaces of libraries
    total, forward = peak(loss)
    grads, backward = peak(lambda: torch.autograd.grad(total, [x, weight]))
    in_acc = sum(grad.numel() * 4 for grad in grads)
    # Rounding the sums of half types takes the result beside them.
    result = sum(grad.numel() * grad.element_size() for grad in grads) if dtype != torch.float32 else 0
    assert rows * features * 4 > 4 * bound  # the logits would be seen
    assert forward <= bound, f"forward: {forward / MIB:.1f} MiB"
    assert backward <= bound + in_acc + result, f"backward: {(backward - in_acc - result) / MIB:.1f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_synchronisation_and_graph_capture(backend: str, dtype: torch.dtype) -> None:
    leaves = leaves_of(1500, 500, 128, 3000, dtype)
    step = functools.partial(outcome, leaves, backend)
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


def test_rows_beyond_32_bits(backend: str) -> None:
    """Rows whose offsets need 64 bits."""
    rows, channels = 2**25 + 3, 80
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of GPU memory")
    x = torch.zeros(rows, channels, device="cuda", dtype=torch.bfloat16)
    x[-1], x[-2] = 1, -1
    weight = torch.randn(7, channels, device="cuda", dtype=torch.bfloat16)
    found = fusefeat.shared_assignment(x, None, weight, backend=backend)
    want = fusefeat.shared_assignment(x[-5:], None, weight, backend="reference")
    torch.testing.assert_close(found[-5:], want)
    row_weight = torch.zeros(rows, device="cuda")
    row_weight[-5:] = 1
    _, stats = fusefeat.shared_penalty(x, None, weight, row_weight=row_weight, return_stats=True, backend=backend)
    torch.testing.assert_close(stats.mean_probs, want.float().mean(0), rtol=2e-2, atol=1e-3)


def test_autocast(backend: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in leaves_of(600, 0, 64, 900, torch.float32)]
    found = {}
    for name in (backend, "reference"):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            penalty, reg = fusefeat.shared_objective(leaves[0], None, *leaves[2:4], margin=0.2, backend=name)
        found[name] = [penalty, reg, *torch.autograd.grad(penalty + reg, [leaves[0], *leaves[2:4]])]
    for got, want in zip(found[backend], found["reference"], strict=True):
        assert got.dtype == torch.float32
        assert pool_cases.relative_rms(got, want) < 1e-2


def test_compile(backend: str) -> None:
    x = torch.randn(300, 64, device="cuda", requires_grad=True)
    weight = torch.randn(500, 64, device="cuda", requires_grad=True)

    def loss(x: Tensor, weight: Tensor, backend: str) -> Tensor:
        penalty, reg = fusefeat.shared_objective(x * 2, None, weight, margin=0.1, backend=backend)
        return penalty + reg

    fast = torch.compile(loss, fullgraph=True)
    for rows in (300, 170):
        got, want = fast(x[:rows], weight, backend), loss(x[:rows], weight, "reference")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for mine, truth in zip(*(torch.autograd.grad(v, [x, weight]) for v in (got, want)), strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-6)
