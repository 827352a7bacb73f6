"""The shared-penalty family: every backend against the reference, and the reference against the definition."""

from __future__ import annotations

import math
from typing import Any

import fusefeat
import pool_cases
import pytest
import shared_cases
import torch
from fusefeat import backends
from fusefeat.functional._shared import ordered_sum
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BACKENDS = [name for name in ("reference", "cpu") if not backends.BACKENDS[name].why_not(torch.empty(0))]
NAN, INF = float("nan"), float("inf")

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize("name", shared_cases.CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@each_backend
@each_case
@each_dtype
def test_objective(backend: str, name: str, dtype: torch.dtype) -> None:
    inputs = shared_cases.CASES[name](dtype)
    shared_cases.compare_objective(fusefeat.shared_objective, inputs, backend)


@each_backend
@each_case
@each_dtype
def test_regulariser_and_matrices(backend: str, name: str, dtype: torch.dtype) -> None:
    inputs = shared_cases.CASES[name](dtype)
    shared_cases.compare_reg(fusefeat.clamped_reg, inputs, backend)
    if "garbage" not in name:
        shared_cases.compare_matrix(fusefeat.shared_assignment, inputs, backend)
        shared_cases.compare_matrix(fusefeat.clamped_activation, inputs, backend)


def definition(
    input: Tensor, context: Tensor, weight: Tensor, bias: Tensor, margin: float, w: Tensor, prior: Tensor
) -> Tensor:
    """The penalty in the words of a paper."""
    p = torch.softmax(margin * (torch.cat([context, input]) @ weight.t() + bias), 1)
    r = w / w.sum()
    mean = (r[:, None] * p).sum(0)
    entropy = -(p * p.log()).sum(1)
    return (r * entropy).sum() + (mean * (mean.log() - prior.log())).sum()


@each_backend
def test_against_the_definition(backend: str) -> None:
    rand = pool_cases.rand
    args = (rand(7, 5), rand(4, 5), rand(6, 5), rand(6))
    w, prior = torch.rand(11).double(), torch.rand(6).double()
    leaves = [tensor.requires_grad_() for tensor in (*args, w, prior)]
    keywords = {"margin": 0.6, "row_weight": w, "prior": prior, "backend": backend}
    got, stats = fusefeat.shared_penalty(*args, **keywords, return_stats=True)
    want = definition(*args, 0.6, w, prior)
    torch.testing.assert_close(got, want)
    for mine, truth in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(mine, truth)
    z = 0.6 * (torch.cat([args[1], args[0]]) @ args[2].t() + args[3])
    clamped = z.relu().clamp(min=0.6)
    torch.testing.assert_close(fusefeat.clamped_activation(*args, margin=0.6, backend=backend), clamped)
    torch.testing.assert_close(fusefeat.shared_assignment(*args, margin=0.6, backend=backend), z.softmax(1))
    reg = fusefeat.clamped_reg(*args, margin=0.6, row_weight=w, backend=backend)
    torch.testing.assert_close(reg, ((w / w.sum()) * clamped.mean(1)).sum())
    total = fusefeat.clamped_reg(*args, margin=0.6, row_weight=w, reduction="sum", backend=backend)
    torch.testing.assert_close(total, (w * clamped.sum(1)).sum())
    apart = [
        fusefeat.shared_penalty(*args, entropy_weight=e, balance_weight=b, **keywords) for e, b in ((3, 0), (0, 2))
    ]
    torch.testing.assert_close(apart[0] / 3 + apart[1] / 2, got)
    torch.testing.assert_close(apart[0] / 3, stats.conditional_entropy)
    some = torch.where(torch.arange(11) % 3 == 0, 0.0, w.detach())
    _, clamp_stats = fusefeat.clamped_reg(*args, margin=0.6, row_weight=some, return_stats=True, backend=backend)
    torch.testing.assert_close(clamp_stats.active_fraction, (z[some > 0] > 0.6).double().mean())
    excess = fusefeat.clamped_reg(*args, margin=0.6, row_weight=w, subtract_floor=True, backend=backend)
    torch.testing.assert_close(excess, ((w / w.sum()) * (clamped - 0.6).mean(1)).sum())
    both = fusefeat.shared_objective(*args, margin=0.6, row_weight=w, prior=prior, backend=backend)
    torch.testing.assert_close(both, (got, reg))


@each_backend
def test_range(backend: str) -> None:
    """0 when rows are sure and features equally used; log F when all rows go to one feature; log F/N for N < F."""
    eye = torch.eye(8)
    assert abs(fusefeat.shared_penalty(eye, None, eye, margin=200.0, backend=backend)) < 1e-6
    collapsed = fusefeat.shared_penalty(eye[:1].repeat(8, 1), None, eye, margin=200.0, backend=backend)
    assert math.isclose(collapsed, math.log(8), rel_tol=1e-6)
    few = fusefeat.shared_penalty(eye[:2], None, eye, margin=200.0, backend=backend)
    assert math.isclose(few, math.log(8 / 2), rel_tol=1e-6)
    penalty, stats = fusefeat.shared_penalty(
        torch.randn(50, 6), None, torch.randn(30, 6), return_stats=True, backend=backend
    )
    assert 0 <= penalty <= math.log(30)
    information = stats.marginal_entropy - stats.conditional_entropy
    torch.testing.assert_close(penalty, math.log(30) - information)


@each_backend
def test_nothing_to_do_is_zero_with_zero_gradients(backend: str) -> None:
    for rows, row_weight in ((0, None), (3, torch.zeros(3))):
        x, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        penalty, reg = fusefeat.shared_objective(x, None, weight, row_weight=row_weight, backend=backend)
        total = fusefeat.clamped_reg(x, None, weight, row_weight=row_weight, reduction="sum", backend=backend)
        assert penalty == 0 and reg == 0 and total == 0
        for grad in torch.autograd.grad(penalty + reg + total, [x, weight]):
            assert torch.equal(grad, torch.zeros_like(grad))


@each_backend
def test_a_switched_off_feature(backend: str) -> None:
    x, weight = torch.randn(9, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    bias = torch.zeros(6)
    bias[2] = -INF
    bias.requires_grad_()
    penalty, stats = fusefeat.shared_penalty(x, None, weight, bias, return_stats=True, backend=backend)
    assert stats.mean_probs[2] == 0 and penalty.isfinite()
    for grad in torch.autograd.grad(penalty, [x, weight, bias]):
        assert grad.isfinite().all()
    kept = [0, 1, 3, 4, 5]
    without = fusefeat.shared_penalty(x, None, weight[kept], bias[kept], backend=backend)
    torch.testing.assert_close(penalty - math.log(6), without - math.log(5))


@each_backend
def test_prior_zero_where_features_are_used(backend: str) -> None:
    prior = torch.tensor([0.5, 0.5, 0.0])
    assert fusefeat.shared_penalty(torch.randn(4, 2), None, torch.randn(3, 2), prior=prior, backend=backend) == INF


@each_backend
def test_ties_give_no_gradient(backend: str) -> None:
    x, weight = torch.ones(2, 3, requires_grad=True), torch.eye(3)
    out = fusefeat.clamped_activation(x, None, weight, margin=0.5, backend=backend)
    assert torch.equal(out, torch.full((2, 3), 0.5))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros(2, 3))
    _, stats = fusefeat.clamped_reg(x, None, weight, margin=0.5, return_stats=True, backend=backend)
    assert stats.active_fraction == 0 and stats.fired.tolist() == [0, 0, 0] and stats.fired.dtype == torch.int64


@each_backend
def test_zero_weight_rows_have_no_gradients_of_their_own(backend: str) -> None:
    x = torch.randn(4, 3)
    x[1] = NAN
    x.requires_grad_()
    w = torch.tensor([1.0, 0.0, 2.0, 0.5], requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    penalty, reg, stats, _ = fusefeat.shared_objective(
        x, None, weight, row_weight=w, return_stats=True, backend=backend
    )
    assert stats.row_entropy[1] == 0 and stats.lse[1] == 0
    grad_x, grad_w, grad_weight = torch.autograd.grad(penalty + reg, [x, w, weight])
    assert torch.equal(grad_x[1], torch.zeros(3)) and grad_w[1] == 0 and grad_weight.isfinite().all()
    kept = [0, 2, 3]
    alone = fusefeat.shared_objective(x[kept], None, weight, row_weight=w[kept], backend=backend)
    torch.testing.assert_close((penalty, reg), alone)


@each_backend
def test_gradcheck(backend: str) -> None:
    rand = pool_cases.rand
    leaves = [rand(4, 3), rand(2, 3), rand(5, 3), rand(5), torch.rand(6).double() + 0.1, torch.rand(5).double() + 0.1]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def objective(input: Tensor, context: Tensor, weight: Tensor, bias: Tensor, w: Tensor, prior: Tensor) -> Any:
        penalty, reg, stats, _ = fusefeat.shared_objective(
            input, context, weight, bias, margin=0.7, row_weight=w, prior=prior, return_stats=True, backend=backend
        )
        return penalty, reg, *stats

    def matrices(input: Tensor, context: Tensor, weight: Tensor, bias: Tensor) -> Any:
        args = (input, context, weight, bias)
        return (
            fusefeat.shared_assignment(*args, margin=0.7, backend=backend),
            fusefeat.clamped_activation(*args, margin=0.7, backend=backend),
            fusefeat.clamped_reg(*args, margin=0.7, reduction="sum", backend=backend),
        )

    assert torch.autograd.gradcheck(objective, leaves)
    assert torch.autograd.gradgradcheck(objective, leaves)
    assert torch.autograd.gradcheck(matrices, leaves[:4])
    assert torch.autograd.gradgradcheck(matrices, leaves[:4])


def test_sum_of_many_rows() -> None:
    for count in (0, 1, 4096, 4097, 50_000):
        values = torch.randn(count, dtype=torch.float64)
        torch.testing.assert_close(ordered_sum(values), values.sum())


def test_bitwise_equal_over_repeats_and_threads() -> None:
    def digest(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        leaves = [torch.randn(*s).requires_grad_() for s in ((3000, 33), (40_000, 33), (70, 33), (70,))]
        penalty, reg = fusefeat.shared_objective(*leaves, margin=0.3)
        many = fusefeat.shared_penalty(leaves[0][:40], None, torch.randn(50_000, 33))
        return [penalty.detach(), reg.detach(), many.detach(), *torch.autograd.grad(penalty + reg, leaves)]

    before = torch.get_num_threads()
    try:
        first, *others = [digest(threads) for threads in (1, 2, 3, 1, 2)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_autocast_rounds_the_operands_only() -> None:
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    rounded = [t.detach().bfloat16().float().requires_grad_() for t in (x, weight)]
    for backend in BACKENDS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            penalty = fusefeat.shared_penalty(x, None, weight, backend=backend)
            mixed = fusefeat.shared_penalty(x.bfloat16(), None, weight, backend=backend)
            assert fusefeat.shared_assignment(x, None, weight, backend=backend).dtype == torch.float32
        want = fusefeat.shared_penalty(rounded[0], None, rounded[1], backend="reference")
        assert penalty.dtype == mixed.dtype == torch.float32
        torch.testing.assert_close(penalty, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mixed, want, rtol=1e-5, atol=1e-6)
        for mine, truth in zip(
            torch.autograd.grad(penalty, [x, weight]), torch.autograd.grad(want, rounded), strict=True
        ):
            assert mine.dtype == torch.float32
            assert pool_cases.relative_rms(mine, truth) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context_rows", [None, 0, 5])
def test_finished_scalars(context_rows: int | None, dtype: torch.dtype) -> None:
    """Without weights, prior, group or statistics the CPU's scalars come from an operator of their own."""
    shapes = [(11, 7), (23, 7), (23,)] + ([] if context_rows is None else [(context_rows, 7)])
    values = [pool_cases.rand(*shape).to(dtype) for shape in shapes]

    def outcome(leaves: list[Tensor], backend: str | None) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        x, weight, bias = leaves[:3]
        args, factors = (x, leaves[3] if leaves[3:] else None, weight, bias), {"entropy_weight": 0.8}
        factors |= {"balance_weight": 1.3, "margin": 0.6, "backend": backend}
        results = [fusefeat.shared_penalty(*args, **factors), *fusefeat.shared_objective(*args, **factors)]
        for keywords in ({}, {"reduction": "sum"}, {"subtract_floor": True}):
            results.append(fusefeat.clamped_reg(*args, margin=0.6, backend=backend, **keywords))
            results.append(fusefeat.shared_objective(*args, **factors, **keywords)[1])
        total = sum((i + 1) * result for i, result in enumerate(results))
        alone = torch.autograd.grad(results[0], x, retain_graph=True)[0]  # the rows of a context share its vectors
        return [*results, alone, *torch.autograd.grad(total, leaves)]

    exact = outcome([value.double() for value in values], "reference")
    tolerance = 4 * shared_cases.TOLERANCE[dtype]
    for got, want in zip(outcome(values, None), exact, strict=True):
        pool_cases.assert_close(got, want, tolerance, "finished scalars")


def test_only_the_gradient_of_rows_that_share_a_vector_with_the_context() -> None:
    context, weight = torch.randn(5, 6), torch.randn(20, 6)
    both = torch.randn(30, 6).requires_grad_()
    grads = [torch.autograd.grad(fusefeat.shared_penalty(both, context, weight, backend=b), both)[0] for b in BACKENDS]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])
    fixed, context = both.detach(), context.requires_grad_()
    grads = [
        torch.autograd.grad(fusefeat.shared_penalty(fixed, context, weight, backend=b), context)[0] for b in BACKENDS
    ]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_one_feature_alone_have_no_gradient(backend: str) -> None:
    """With every row saturated P is constant; eager's gradients are 0 as well, however large the margin."""
    torch.manual_seed(0)
    rows, weight = torch.randn(4, 3), torch.randn(5, 3)
    for margin in (1e4, 1e6):
        leaf = rows.clone().requires_grad_()
        assignment = fusefeat.shared_assignment(leaf, None, weight, margin=margin, backend=backend)
        assert (assignment.max(1).values == 1).all()
        assert torch.autograd.grad(assignment, leaf, torch.randn(4, 5))[0].abs().max() == 0
        penalty = fusefeat.shared_penalty(leaf, None, weight, margin=margin, backend=backend)
        assert torch.autograd.grad(penalty, leaf)[0].abs().max() == 0
