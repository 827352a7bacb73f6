"""The sentences of the contract about empties, NaN, infinities and dtypes, each spelled out with expected values."""

from __future__ import annotations

import fusefeat
import pytest
import torch
from fusefeat import backends

NAN, INF = float("nan"), float("inf")
BACKENDS = [n for n in ("reference", "cpu", "triton") if not backends.BACKENDS[n].why_not(torch.empty(0))]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def grads(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out.sum(), inputs)


def test_a_bag_without_kept_tokens_is_zero(backend: str) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    query = torch.randn(5, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    out, weights = fusefeat.attention_pool(x, query, mask=mask, return_weights=True, backend=backend)
    assert torch.equal(out[1], torch.zeros(5)) and torch.equal(weights[1], torch.zeros(4))
    grad_x, grad_query = grads(out, x, query)
    assert torch.equal(grad_x[1], torch.zeros(4, 5)) and grad_query.isfinite().all()
    torch.testing.assert_close(weights[[0, 2]].sum(1), torch.ones(2))


def test_only_empty_bags_leave_no_gradient(backend: str) -> None:
    x, query = torch.randn(0, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    cu = torch.zeros(4, dtype=torch.int32)
    out, weights = fusefeat.attention_pool(x, query, cu_seqlens=cu, return_weights=True, backend=backend)
    assert torch.equal(out, torch.zeros(3, 2, 5)) and weights.shape == (0, 2)
    assert torch.equal(grads(out, x, query)[1], torch.zeros(2, 5))


def test_masked_tokens_are_not_read(backend: str) -> None:
    x, scores = torch.randn(2, 6, 5), torch.randn(2, 6)
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    results = []
    for garbage in (0.0, NAN, INF, -INF):
        dirty = torch.where(mask[..., None], x, garbage).requires_grad_()
        dirty_scores = torch.where(mask, scores, garbage).requires_grad_()
        out, weights = fusefeat.softmax_pool(dirty, dirty_scores, mask=mask, return_weights=True, backend=backend)
        results.append((out, weights, *grads(out.sum() + weights.square().sum(), dirty, dirty_scores)))
    for other in results[1:]:
        for clean, dirtied in zip(results[0], other, strict=True):
            assert torch.equal(clean, dirtied)
    assert (results[0][1][~mask] == 0).all() and (results[0][2][~mask] == 0).all() and (results[0][3][~mask] == 0).all()


def test_minus_inf_score_is_a_masked_token(backend: str) -> None:
    x, scores = torch.randn(2, 6, 5), torch.randn(2, 6)
    mask = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    dirty = torch.where(mask[..., None], x, NAN).requires_grad_()
    dropped = torch.where(mask, scores, -INF).requires_grad_()
    clean = x.clone().requires_grad_()
    kept = scores.clone().requires_grad_()
    out, weights = fusefeat.softmax_pool(dirty, dropped, return_weights=True, backend=backend)
    want, want_weights = fusefeat.softmax_pool(clean, kept, mask=mask, return_weights=True, backend=backend)
    torch.testing.assert_close((out, weights), (want, want_weights))
    torch.testing.assert_close(grads(out, dirty, dropped), grads(want, clean, kept))


def test_minus_inf_score_reaches_no_gradient_of_the_query(backend: str) -> None:
    x = torch.tensor([[[-INF, 1.0], [0.5, 2.0], [0.25, -1.0]]], requires_grad=True)
    query = torch.tensor([1.0, 0.5], requires_grad=True)
    out, weights = fusefeat.attention_pool(x, query, return_weights=True, backend=backend)
    assert weights[0, 0] == 0 and out.isfinite().all()
    grad_x, grad_query = grads(out, x, query)
    assert grad_query.isfinite().all() and torch.equal(grad_x[0, 0], torch.zeros(2))
    alone = fusefeat.attention_pool(x[:, 1:], query, backend=backend)
    torch.testing.assert_close(out, alone)


def test_nan_stays_in_its_bag(backend: str) -> None:
    x = torch.randn(3, 4, 5)
    x[1, 2, 0] = NAN
    x.requires_grad_()
    query = torch.randn(5, requires_grad=True)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 0] = False
    out, weights = fusefeat.attention_pool(x, query, mask=mask, return_weights=True, backend=backend)
    grad_x, grad_query = grads(out, x, query)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
    assert weights[1, 1:].isnan().all() and weights[1, 0] == 0 and weights[[0, 2]].isfinite().all()
    assert grad_x[1, 1:].isnan().all() and torch.equal(grad_x[1, 0], torch.zeros(5))
    assert grad_x[[0, 2]].isfinite().all() and grad_query.isnan().all()


def test_plus_inf_score_gives_nan(backend: str) -> None:
    x, scores = torch.randn(2, 4, 5), torch.randn(2, 4, 2)
    scores[0, 1, 1] = INF
    out, weights = fusefeat.softmax_pool(x, scores, return_weights=True, backend=backend)
    assert out[0, 1].isnan().all() and weights[0, :, 1].isnan().all()
    assert out[0, 0].isfinite().all() and weights[0, :, 0].isfinite().all() and out[1].isfinite().all()


def test_only_nan_scores_are_not_an_empty_bag(backend: str) -> None:
    out = fusefeat.softmax_pool(torch.randn(1, 3, 2), torch.full((1, 3), NAN), backend=backend)
    assert out.isnan().all()


def test_huge_scores_do_not_overflow(backend: str) -> None:
    x = torch.tensor([[[1e4, 0.0], [1e4 - 1, 1.0]]])
    out = fusefeat.attention_pool(x, torch.tensor([1.0, 0.0]), backend=backend)
    weight = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    torch.testing.assert_close(out, torch.tensor([[1e4 - weight[1].item(), weight[1].item()]]), rtol=1e-4, atol=1e-4)


def test_dtypes(backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.randn(2, 3, 4).to(dtype).requires_grad_()
        for other in {dtype, acc}:
            query = torch.randn(4).to(other).requires_grad_()
            out, weights = fusefeat.attention_pool(x, query, return_weights=True, backend=backend)
            assert out.dtype == weights.dtype == dtype
            assert [g.dtype for g in grads(out, x, query)] == [dtype, other]
            scores = torch.randn(2, 3).to(other).requires_grad_()
            out, weights = fusefeat.softmax_pool(x, scores, return_weights=True, backend=backend)
            assert (out.dtype, weights.dtype) == (dtype, other)
            assert [g.dtype for g in grads(out, x, scores)] == [dtype, other]


def test_autocast_leaves_the_pools_alone(backend: str) -> None:
    x, query = torch.randn(2, 30, 16), torch.randn(16)
    plain = fusefeat.attention_pool(x, query, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fusefeat.attention_pool(x, query, backend=backend)
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)


def test_returned_weights_are_the_softmax(backend: str) -> None:
    x, query = torch.randn(2, 30, 16), torch.randn(3, 16)
    _, weights = fusefeat.attention_pool(x, query, scale=0.3, return_weights=True, backend=backend)
    torch.testing.assert_close(weights, torch.softmax(0.3 * x @ query.t(), 1))


def test_gradients_through_the_weights_alone(backend: str) -> None:
    x, query = torch.randn(2, 9, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    _, weights = fusefeat.attention_pool(x, query, return_weights=True, backend=backend)
    want = torch.softmax(x @ query, 1)
    for got, plain in zip(grads(weights.square(), x, query), grads(want.square(), x, query), strict=True):
        torch.testing.assert_close(got, plain)


def test_an_incoming_gradient_of_a_masked_weight_does_not_count(backend: str) -> None:
    x, query = torch.randn(2, 9, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    mask = torch.rand(2, 9) > 0.3
    _, weights = fusefeat.attention_pool(x, query, mask=mask, return_weights=True, backend=backend)
    incoming = torch.randn(2, 9)
    with_nan = torch.autograd.grad(weights, (x, query), torch.where(mask, incoming, NAN), retain_graph=True)
    for got, plain in zip(with_nan, torch.autograd.grad(weights, (x, query), incoming), strict=True):
        torch.testing.assert_close(got, plain)
