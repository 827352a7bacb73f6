"""The Triton kernels of the shared-penalty family, in Triton's interpreter on CPU tensors, against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import fusefeat
import pool_cases
import pytest
import shared_cases
import torch
import triton_interpreter  # noqa: F401 - before fusefeat.triton
from fusefeat.ops import clamped_reg as clamp_ops
from fusefeat.ops import shared_penalty as penalty_ops
from fusefeat.reference import shared_penalty as reference
from fusefeat.triton import _shared_penalty_tuning as tuning
from fusefeat.triton import clamped_reg as clamp_operators
from fusefeat.triton import shared_penalty as operators
from fusefeat.triton._launch import INTERPRETED
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="triton was imported without TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of logarithms and NaNs that are meant
]

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LARGE = ("tails of every tile", "many features", "many rows", "deep")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
rand = pool_cases.rand


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    # For direct calls: derivatives and fake kernels come with the family's operators.
    penalty_ops.operator("shared_penalty", "triton")
    clamp_ops.operator("clamped_reg", "triton")


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little scratch, and such short sums, that everything is cut in pieces."""
    monkeypatch.setattr(tuning, "SCRATCH_BYTES", 20_000)
    monkeypatch.setattr(tuning, "LEAST_SCRATCH_BYTES", 20_000)
    monkeypatch.setattr(tuning, "LEAST_PART", 40)


@pytest.mark.parametrize("name", shared_cases.CASES)
@each_dtype
def test_objective(name: str, dtype: torch.dtype) -> None:
    shared_cases.compare_objective(fusefeat.shared_objective, shared_cases.CASES[name](dtype), "triton")


@pytest.mark.parametrize("name", [name for name in shared_cases.CASES if name not in LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_regulariser_and_matrices(name: str, dtype: torch.dtype) -> None:
    inputs = shared_cases.CASES[name](dtype)
    shared_cases.compare_reg(fusefeat.clamped_reg, inputs, "triton")
    if "garbage" not in name:
        shared_cases.compare_matrix(fusefeat.shared_assignment, inputs, "triton")
        shared_cases.compare_matrix(fusefeat.clamped_activation, inputs, "triton")


@pytest.mark.usefixtures("many_chunks")
@each_dtype
def test_many_chunks(dtype: torch.dtype) -> None:
    """Chunks that end in the middle of the context, gradients summed over chunks and splits."""
    row_weight = torch.rand(190, dtype=torch.float64)
    row_weight[::3] = 0
    inputs = shared_cases.small(
        dtype,
        input=rand(130, 6, dtype=dtype),
        context=rand(60, 6, dtype=dtype),
        weight=rand(150, 6, dtype=dtype),
        bias=rand(150, dtype=dtype),
        row_weight=row_weight.to(dtype),
    )
    inputs.input[row_weight[60:] == 0] = NAN
    ranges = tuning.chunks(190, 150 * 4, 0, 64, 0)
    assert len(ranges) > 3 and any(begin < 60 < end for begin, end in ranges)
    shared_cases.compare_objective(fusefeat.shared_objective, inputs, "triton")
    shared_cases.compare_reg(fusefeat.clamped_reg, inputs, "triton")
    inputs.input.nan_to_num_()
    inputs.row_weight = None
    shared_cases.compare_matrix(fusefeat.shared_assignment, inputs, "triton")
    shared_cases.compare_matrix(fusefeat.clamped_activation, inputs, "triton")


@pytest.mark.parametrize(("rows", "features"), [(3, 1100), (560, 3)])
def test_many_tiles(rows: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than their sums take at a time, with the largest logits in the last of them."""
    monkeypatch.setattr(tuning, "_interpreted", lambda rows, features: tuning.Tile(16, 16, 16, 1, 1))
    rising = torch.linspace(0, 4, features)
    inputs = shared_cases.Inputs(torch.randn(rows, 5), torch.randn(features, 5), bias=rising, margin=0.7)
    shared_cases.compare_objective(fusefeat.shared_objective, inputs, "triton")


@pytest.mark.parametrize("block", [16, 128])
def test_chunks_cover_all_rows_within_their_bound(block: int) -> None:
    for rows, row_bytes, kept, cut in itertools.product(
        (0, 1, 1000, 10**6), (1, 2**18, 2**27), (0, 2**25), (0, 1, 700)
    ):
        if cut > rows:
            continue
        ranges = tuning.chunks(rows, row_bytes, kept, block, cut)
        assert [row for begin, end in ranges[:50] for row in (begin, end)][1:-1:2] == [b for b, _ in ranges[1:50]]
        assert not rows or (ranges[0][0] == 0 and ranges[-1][1] == rows)
        assert not any(begin < cut < end for begin, end in ranges)
        longest = max((end - begin for begin, end in ranges), default=0)
        assert longest <= 1 or longest * row_bytes + kept <= 2**26


def statistics_and_gradients(
    args: tuple[Any, ...], grads: list[Tensor | None], needs: list[bool], keep_rows: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    results = operators.shared_penalty(*args, True, keep_rows)
    saved = results[0], results[1], results[5]
    return results, operators.shared_penalty_backward(*grads, *args, *saved, needs)


def problem(dtype: torch.dtype, features: int = 30) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments of the operator, and an incoming gradient for each of its results."""
    row_weight = torch.rand(29, dtype=torch.float64)
    row_weight[[1, 12]] = 0
    acc = reference.acc_dtype(dtype)
    context, x, weight = rand(9, 7, dtype=dtype), rand(20, 7, dtype=dtype), rand(features, 7, dtype=dtype)
    args = (context, x, weight, rand(features, dtype=acc), 0.7, row_weight.to(acc), 0)
    return args, [rand(29, dtype=acc), rand(29, dtype=acc), rand(features, dtype=acc), rand(29, dtype=acc)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_gradient_alone_and_absent_incoming_gradients(dtype: torch.dtype) -> None:
    """Asked for alone, a gradient is what it is among all; the sum over single incoming gradients is that of all."""
    args, grads = problem(dtype)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
    _, full = statistics_and_gradients(args, grads, [True] * 5, 0)
    for position in range(5):
        needs = [i == position for i in range(5)]
        _, some = statistics_and_gradients(args, grads, needs, 0)
        for i, (got, want) in enumerate(zip(some, full, strict=True)):
            assert torch.equal(got, want) if needs[i] else got.shape == (0,)
            assert got.dtype == want.dtype
    singles = [
        statistics_and_gradients(args, [g if i == j else None for j, g in enumerate(grads)], [True] * 5, 0)[1]
        for i in range(4)
    ]
    for parts, want in zip(zip(*singles, strict=True), full, strict=True):
        torch.testing.assert_close(sum(parts), want, **tolerance)
    _, nothing = statistics_and_gradients(args, [None] * 4, [True] * 5, 0)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in nothing)


@pytest.mark.parametrize("chunked", [False, True])
@each_dtype
def test_kept_rows(dtype: torch.dtype, chunked: bool, request: pytest.FixtureRequest) -> None:
    """Any number of rows may leave their logits for the backward: the results are the same to rounding."""
    if chunked:
        request.getfixturevalue("many_chunks")
    args, grads = problem(dtype, 150)
    want = statistics_and_gradients(args, grads, [True] * 5, 0)
    for keep_rows in (1, 14, 29):
        found = statistics_and_gradients(args, grads, [True] * 5, keep_rows)
        assert found[0][5].shape == (keep_rows, 150)
        for got, other in zip((*found[0][:5], *found[1]), (*want[0][:5], *want[1]), strict=True):
            loose = {"rtol": 1e-5, "atol": 1e-5} if got.dtype.itemsize > 2 else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(got, other, **loose)
    again = operators.shared_penalty_backward(*grads, *args, found[0][0], found[0][1], found[0][5], [True] * 5)
    assert all(torch.equal(one, other) for one, other in zip(again, found[1], strict=True))


@pytest.mark.parametrize("operand", [1, 2])
def test_operands_are_rounded(operand: int) -> None:
    """Autocast: the operands of the products take its dtype, everything else stays in float32."""
    args, grads = problem(torch.float32)
    rounded = [None, torch.bfloat16, torch.float16][operand]
    narrow = [t.to(rounded).float() for t in args[:3]]
    results, found = statistics_and_gradients((*args[:6], operand), grads, [True] * 5, 0)
    exact = reference.statistics(*narrow, *args[3:6], 0, True)
    for got, want in zip(results[:4], exact[:4], strict=True):
        assert pool_cases.relative_rms(got, want) < 2e-6
    assert torch.equal(results[4], exact[4])
    wanted = statistics_and_gradients((*narrow, *args[3:]), grads, [True] * 5, 0)[1]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert pool_cases.relative_rms(got, want) < (4e-3 if operand == 1 else 6e-4)


def test_public_functions_under_autocast() -> None:
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    found = {}
    for backend in ("reference", "triton"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            penalty, reg = fusefeat.shared_objective(x, None, weight, margin=0.4, backend=backend)
        found[backend] = [penalty, reg, *torch.autograd.grad(penalty + reg, [x, weight])]
    for got, want in zip(found["triton"], found["reference"], strict=True):
        assert got.dtype == torch.float32
        assert pool_cases.relative_rms(got, want) < 1e-2


def test_float16_gradients_beyond_its_range() -> None:
    """Gradients of logits that no float16 holds: what of their products with the operands fits a float16 is right."""
    args, grads = problem(torch.float16)
    for factor in (2.0**-26, 2.0**20):
        scaled = [grad * factor for grad in grads]
        _, found = statistics_and_gradients((*args[:6], 0), scaled, [True] * 5, 0)
        wide = (*(t.double() for t in args[:4]), 0.7, args[5].double(), 0)
        _, want = statistics_and_gradients(wide, [g.double() for g in scaled], [True] * 5, 0)
        assert pool_cases.relative_rms(found[3], want[3]) < 1e-3
        for got, exact in zip(found[:3], want[:3], strict=True):
            fits = exact.abs() < 6e4
            step = max(2.0**-25, 1e-3 * exact.abs().max().item())
            assert fits.any() and (got.double() - exact)[fits].abs().max() <= step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unused_rows_meet_a_weight_that_is_not_finite(dtype: torch.dtype) -> None:
    args, grads = problem(dtype)
    args[2][3, 2] = NAN
    _, (grad_context, grad_input, *_, grad_row_weight) = statistics_and_gradients(args, grads, [True] * 5, 0)
    assert (grad_context[1] == 0).all() and (grad_input[3] == 0).all() and (grad_row_weight[[1, 12]] == 0).all()
    assert grad_context[0].isnan().any()


def test_rows_without_any_feature() -> None:
    """A bias of -inf everywhere: as the reference, whatever that is."""
    x, weight, bias = torch.randn(5, 3), torch.randn(4, 3), torch.full((4,), -INF)
    found, _ = statistics_and_gradients((None, x, weight, bias, 1.0, None, 0), [None] * 4, [False] * 5, 0)
    want = reference.statistics(None, x, weight, bias, 1.0, None, 0, True)
    for got, exact in zip(found, want, strict=False):
        torch.testing.assert_close(got, exact, equal_nan=True)


def test_ties_nan_and_infinite_logits_of_the_clamp() -> None:
    x = torch.ones(3, 2)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [INF, 1.0], [NAN, 0.0]])
    args = (None, x, weight, None, 0.5, None, 0)
    excess, fired = clamp_operators.clamped_reg(*args)
    assert excess.isnan().all() and fired.tolist() == [0, 0, 3, 0]
    matrix = clamp_operators.clamped_activation(*args[:5], 0)
    torch.testing.assert_close(matrix, torch.tensor([[0.5, 0.5, INF, NAN]]).expand(3, 4), equal_nan=True)
    *_, grad_bias = clamp_operators.clamped_activation_backward(
        torch.ones(3, 4), None, x, weight, torch.zeros(4), 0.5, 0, [False, False, False, True]
    )
    assert grad_bias.tolist() == [0, 0, 1.5, 0]


def test_gradients_of_strided_matrices() -> None:
    args, _ = problem(torch.float32)
    args = (*args[:5], 0)
    assignment = operators.shared_assignment(*args)
    grad = torch.randn(30, 58).t()[::2]
    needs = [True] * 4
    for found, want in (
        (
            operators.shared_assignment_backward(grad, *args, assignment.t().contiguous().t(), needs),
            operators.shared_assignment_backward(grad.contiguous(), *args, assignment, needs),
        ),
        (
            clamp_operators.clamped_activation_backward(grad, *args, needs),
            clamp_operators.clamped_activation_backward(grad.contiguous(), *args, needs),
        ),
    ):
        assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))


def operator_samples() -> Any:
    args, grads = problem(torch.float32)
    needs = [True, False, True, True]
    results = operators.shared_penalty(*args, True, 29)
    yield operators.shared_penalty, (*args, False, 0)
    yield operators.shared_penalty, (None, *args[1:5], None, 1, True, 20)
    yield operators.shared_penalty_backward, (*grads, *args, results[0], results[1], results[5], [*needs, True])
    yield clamp_operators.clamped_reg, args
    yield clamp_operators.clamped_reg_backward, (grads[0], *args, needs)
    plain, grad = (*args[:5], 0), torch.randn(29, 30)
    yield operators.shared_assignment, plain
    yield operators.shared_assignment_backward, (grad, *plain, operators.shared_assignment(*plain), needs)
    yield clamp_operators.clamped_activation, plain
    yield clamp_operators.clamped_activation_backward, (grad, *plain, needs)


def test_opcheck() -> None:
    for op, args in operator_samples():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_traces_with_dynamic_shapes() -> None:
    def losses(x: Tensor, weight: Tensor) -> Tensor:
        penalty, reg = fusefeat.shared_objective(x * 2, None, weight, margin=0.3, backend="triton")
        return penalty + reg

    traced = torch.compile(losses, backend="aot_eager", fullgraph=True, dynamic=True)
    weight = torch.randn(11, 4, requires_grad=True)
    for rows in (5, 33):
        x = torch.randn(rows, 4, requires_grad=True)
        torch.testing.assert_close(traced(x, weight), losses(x, weight))
        for one, other in zip(*(torch.autograd.grad(f(x, weight), [x, weight]) for f in (traced, losses)), strict=True):
            torch.testing.assert_close(one, other)


def test_arguments_are_checked() -> None:
    args, grads = problem(torch.float32)
    context, x, weight, bias, margin, row_weight, operand = args
    for bad in (
        (context[:, :-1], x, weight, bias, margin, row_weight, operand),
        (context, x[0], weight, bias, margin, row_weight, operand),
        (context, x, weight.double(), bias, margin, row_weight, operand),
        (context, x, weight[:0], None, margin, row_weight, operand),
        (context, x, weight, bias[:-1], margin, row_weight, operand),
        (context, x, weight, bias, 0.0, row_weight, operand),
        (context, x, weight, bias, margin, row_weight[:-1], operand),
        (context, x, weight, bias, margin, row_weight, 3),
    ):
        with pytest.raises(RuntimeError, match="fusefeat"):
            clamp_operators.clamped_reg(*bad)
    results = operators.shared_penalty(*args, True, 0)
    with pytest.raises(RuntimeError, match="keep_rows"):
        operators.shared_penalty(*args, True, 30)
    with pytest.raises(RuntimeError, match="needs"):
        operators.shared_penalty_backward(*grads, *args, results[0], results[1], results[5], [True] * 4)
    with pytest.raises(RuntimeError, match="kept"):
        operators.shared_penalty_backward(*grads, *args, results[0], results[1], torch.zeros(3, 29), [True] * 5)
