"""The Triton pools, run by Triton's interpreter on CPU tensors, against the reference in float64."""

from __future__ import annotations

import fusefeat
import pytest
import torch
import triton_interpreter  # noqa: F401 - before fusefeat.triton
from fusefeat.reference import attention_pool as reference
from fusefeat.triton import _attention_pool_tuning as tuning
from fusefeat.triton import attention_pool as operators
from fusefeat.triton._launch import INTERPRETED
from torch import Tensor

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="triton was imported without TRITON_INTERPRET=1")

INF = float("inf")
NAN = float("nan")
# Relative RMS error of sums in the accumulation type, over twice that of eager PyTorch.
ACC_ERROR = {torch.float32: 1e-6, torch.float64: 1e-14}
# A gradient is then rounded once to its dtype: half a unit in the last place (the interpreter truncates bfloat16).
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


def acc_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite_rms(tensor: Tensor) -> float:
    return torch.where(tensor.isfinite(), tensor, 0.0).square().mean().sqrt().item() if tensor.numel() else 0.0


def assert_near(name: str, got: Tensor, want: Tensor, eager: Tensor, dtype: torch.dtype, floor: float) -> None:
    """Same shape, dtype, NaNs and infinities; RMS error near that of eager PyTorch in the accumulation type."""
    assert got.shape == want.shape, name
    assert got.dtype == dtype, name
    got = got.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaNs differ"
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite) and torch.equal(got[infinite], want[infinite]), f"{name}: infs differ"
    error = finite_rms(torch.where(infinite, 0.0, got - want))
    relative = ACC_ERROR[acc_of(dtype)] + ROUNDING.get(dtype, 0.0)
    allowed = relative * finite_rms(want) + 2 * finite_rms(eager.double() - want) + floor
    assert error <= allowed, f"{name}: RMS error {error:.2e}, allowed {allowed:.2e}"


def run_reference(dtype, x, minor, mask, cu_seqlens, scale, given_scores, grad_out, grad_weights):
    """Results and gradients of the reference, computed in `dtype`."""
    x, minor = (t.detach().to(dtype).requires_grad_() for t in (x, minor))
    if given_scores:
        results = reference.softmax_pool(x, minor, mask, cu_seqlens)
    else:
        results = reference.attention_pool(x, minor, mask, cu_seqlens, scale)
    loss = (results[0] * grad_out.to(dtype)).sum()
    if grad_weights is not None:
        # A product with weight 0 must not carry a bad incoming gradient into the reference.
        loss = loss + (results[2] * torch.where(results[2] == 0, 0.0, grad_weights.to(dtype))).sum()
    return (*(t.detach() for t in results), *torch.autograd.grad(loss, (x, minor)))


def forward(x, minor, mask, cu_seqlens, scale, given_scores, with_weights=True):
    if given_scores:
        return operators.softmax_pool(x, minor, mask, cu_seqlens, with_weights)
    return operators.attention_pool(x, minor, mask, cu_seqlens, scale, with_weights)


def backward(grad_out, grad_weights, x, minor, mask, cu_seqlens, scale, results, given_scores, needs=(True, True)):
    if given_scores:
        return operators.softmax_pool_backward(grad_out, grad_weights, x, minor, mask, cu_seqlens, *results, *needs)
    return operators.attention_pool_backward(
        grad_out, grad_weights, x, minor, mask, cu_seqlens, scale, *results, *needs
    )


def check(
    x: Tensor,
    minor: Tensor,
    *,
    given_scores: bool,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 0.37,
    with_weights: bool = True,
    grad_out: Tensor | None = None,
    grad_weights: Tensor | None = None,
    floor: float = 0.0,
) -> tuple[Tensor, ...]:
    """One pool, forward and backward, against the reference; `minor` is the query or the scores."""
    acc = acc_of(x.dtype)
    results = forward(x, minor, mask, cu_seqlens, scale, given_scores, with_weights)
    grad_out = torch.randn(results[0].shape, dtype=acc) if grad_out is None else grad_out
    if not with_weights:
        assert results[2].shape == (0,) and results[2].dtype == acc
    elif grad_weights is None:
        grad_weights = torch.randn(results[2].shape, dtype=acc)
    grads = backward(grad_out, grad_weights, x, minor, mask, cu_seqlens, scale, results, given_scores)
    want, eager = (
        run_reference(dtype, x, minor, mask, cu_seqlens, scale, given_scores, grad_out, grad_weights)
        for dtype in (torch.float64, acc)
    )
    names = ("out", "lse", "weights", "grad_x", "grad_minor")
    assert results[1].dtype == torch.float64
    # lse is float64, and as accurate as sums in the accumulation type are.
    compared = results[0], results[1].to(acc), results[2], *grads
    dtypes = (acc, acc, acc, x.dtype, minor.dtype)
    for i, (name, got) in enumerate(zip(names, compared, strict=True)):
        assert got.is_contiguous()
        if name != "weights" or with_weights:
            assert_near(name, got, want[i], eager[i], dtypes[i], floor)
    return (*results, *grads)


def tokens_and_minor(given_scores, shape, channels, queries, dtype=torch.float32, minor_dtype=None):
    axis = () if queries is None else (queries,)
    x = torch.randn(*shape, channels).to(dtype)
    minor = torch.randn(*shape, *axis) * 2 if given_scores else torch.randn(*axis, channels)
    return x, minor.to(dtype if minor_dtype is None else minor_dtype)


def offsets(*lengths: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


both_pools = pytest.mark.parametrize("given_scores", [False, True], ids=["attention", "softmax"])


@both_pools
@pytest.mark.parametrize(
    ("channels", "queries"), [(1, None), (10, 1), (64, None), (97, None), (1, 2), (10, 3), (97, 3), (10, 17)]
)
def test_padded(given_scores, queries, channels):
    x, minor = tokens_and_minor(given_scores, (3, 40), channels, queries)
    mask = torch.rand(3, 40) > 0.3
    mask[1] = False
    mask[2, 30:] = False
    x[~mask] = NAN
    if given_scores:
        minor[~mask] = NAN
    out, lse, weights, grad_x, _ = check(x, minor, given_scores=given_scores, mask=mask)
    assert (out[1] == 0).all() and (lse[1] == -INF).all() and (weights[1] == 0).all() and (grad_x[1] == 0).all()


@both_pools
@pytest.mark.parametrize(("channels", "queries"), [(10, None), (64, 1), (10, 2), (64, 3), (10, 17)])
def test_packed(given_scores, queries, channels):
    x, minor = tokens_and_minor(given_scores, (170,), channels, queries)
    check(x, minor, given_scores=given_scores, cu_seqlens=offsets(0, 3, 0, 1, 120, 46, 0, dtype=torch.int32))


@both_pools
@pytest.mark.parametrize(
    ("channels", "queries", "length"), [(600, None, 66), (600, 3, 20), (4100, None, 20), (4100, 3, 4)]
)
def test_many_channels(given_scores, channels, queries, length):
    x, minor = tokens_and_minor(given_scores, (length + 4,), channels, queries)
    check(x, minor, given_scores=given_scores, scale=0.02, cu_seqlens=offsets(3, length, 1))


@both_pools
@pytest.mark.parametrize("queries", [None, 2])
def test_long_bag_beside_short_ones(given_scores, queries):
    x, minor = tokens_and_minor(given_scores, (2012,), 16, queries)
    check(x, minor, given_scores=given_scores, cu_seqlens=offsets(3, 3, 2000, 3, 0, 3))


@both_pools
def test_more_pieces_than_are_joined_at_a_time(given_scores, monkeypatch):
    monkeypatch.setattr(operators, "MIN_BLOCK_ITEMS", 16)
    x, minor = tokens_and_minor(given_scores, (1200,), 8, None)
    check(x, minor, given_scores=given_scores, cu_seqlens=offsets(3, 1190, 7))


@both_pools
def test_many_short_bags(given_scores):
    lengths = torch.arange(70) % 4
    x, minor = tokens_and_minor(given_scores, (int(lengths.sum()),), 16, 2)
    check(x, minor, given_scores=given_scores, cu_seqlens=offsets(*lengths.tolist()))


@both_pools
@pytest.mark.parametrize("tokens", [1, 62, 63, 64, 130])
def test_padded_bags_around_the_block_size(given_scores, tokens):
    x, minor = tokens_and_minor(given_scores, (5, tokens), 8, None)
    check(x, minor, given_scores=given_scores)


@both_pools
def test_block_boundaries(given_scores):
    """Bags and blocks that end together, and one item apart."""
    for first in (62, 63, 64, 65):
        x, minor = tokens_and_minor(given_scores, (first + 130,), 8, None)
        check(x, minor, given_scores=given_scores, cu_seqlens=offsets(first, 0, 63, 67))


@both_pools
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("acc_minor", [False, True])
def test_dtypes(given_scores, dtype, acc_minor):
    minor_dtype = acc_of(dtype) if acc_minor else dtype
    for queries in (None, 3):
        x, minor = tokens_and_minor(given_scores, (2, 70), 24, queries, dtype, minor_dtype)
        check(x, minor, given_scores=given_scores, mask=torch.rand(2, 70) > 0.2)


def test_float64_scale_is_not_rounded():
    x, query = tokens_and_minor(False, (2, 9), 5, None, torch.float64)
    check(x, query, given_scores=False, scale=0.1)


@both_pools
def test_without_returned_weights(given_scores):
    for queries in (None, 2, 9):
        x, minor = tokens_and_minor(given_scores, (100,), 12, queries)
        check(x, minor, given_scores=given_scores, cu_seqlens=offsets(90, 7, 0, 3), with_weights=False)


@pytest.mark.parametrize("value", [0.0, NAN, INF])
def test_scores_of_minus_infinity(value):
    """Per query: the token's value reaches neither that query's output nor a gradient; other queries keep it."""
    values, scores = tokens_and_minor(
        True,
        (
            2,
            20,
        ),
        6,
        3,
    )
    scores[0, ::2, 0] = -INF
    scores[0, :, 1] = -INF
    scores[1] = -INF
    values[1] = value
    values[0, 4] = value
    scores[0, 4] = -INF
    grad_weights = torch.randn(2, 20, 3)
    grad_weights[scores == -INF] = NAN
    out, lse, weights, grad_values, grad_scores = check(values, scores, given_scores=True, grad_weights=grad_weights)
    assert lse[0, 1] == -INF and (out[0, 1] == 0).all() and (grad_scores[1] == 0).all() and (grad_values[1] == 0).all()
    assert out.isfinite().all() and weights.isfinite().all()


def test_value_kept_by_one_query_only():
    values, scores = tokens_and_minor(True, (90,), 6, 2)
    scores[70, 0] = -INF
    values[70] = NAN
    out, *_ = check(values, scores, given_scores=True, cu_seqlens=offsets(5, 80, 5))
    assert out[:, 0].isfinite().all() and out[1, 1].isnan().all()


def test_tokens_that_score_minus_infinity():
    """attention_pool: an infinite token with score -inf is dropped from output, grad_x and grad_query."""
    x, query = tokens_and_minor(False, (2, 70), 6, 2)
    query[:, 0] = torch.tensor([1.0, -1.0])
    x[0, 3, 0] = -INF
    out, _, _, _, grad_query = check(x, query, given_scores=False)
    assert out[0, 0].isfinite().all() and out[0, 1].isnan().all()
    assert grad_query[0].isfinite().all() and grad_query[1].isnan().all()


@both_pools
def test_infinite_incoming_gradient_stays_off_dropped_tokens(given_scores):
    x, minor = tokens_and_minor(given_scores, (2, 12), 6, 2)
    mask = torch.rand(2, 12) > 0.4
    mask[0] = False
    results = forward(x, minor, mask, None, 1.0, given_scores)
    grad_out = torch.full((2, 2, 6), INF)
    grad_x, grad_minor = backward(grad_out, None, x, minor, mask, None, 1.0, results, given_scores)
    assert (grad_x[~mask] == 0).all()
    if given_scores:
        assert (grad_minor[~mask] == 0).all()


@both_pools
@pytest.mark.parametrize("value", [NAN, INF])
def test_kept_nan_and_infinity(given_scores, value):
    lengths = (5, 150, 9)
    x, minor = tokens_and_minor(given_scores, (164,), 4, 2)
    if given_scores:
        minor[20, 0] = value
    else:
        x[20] = value
        minor.abs_()
    out, lse, weights, grad_x, _ = check(x, minor, given_scores=given_scores, cu_seqlens=offsets(*lengths))
    assert out[1, 0].isnan().all() and lse[1, 0].isnan() and weights[5:155, 0].isnan().all()
    assert grad_x[5:155].isnan().all() and grad_x[:5].isfinite().all() and grad_x[155:].isfinite().all()


@both_pools
def test_large_scores_do_not_overflow(given_scores):
    x, minor = tokens_and_minor(given_scores, (2, 150), 8, None)
    check(x, minor * 300, given_scores=given_scores, floor=1e-6)


@both_pools
@pytest.mark.parametrize("packed", [False, True])
def test_any_strides(given_scores, packed):
    shape = (90,) if packed else (2, 90)
    x, minor = tokens_and_minor(given_scores, shape, 12, 3)
    cu_seqlens = torch.stack([offsets(10, 0, 80), torch.full((4,), -7)], 1)[:, 0] if packed else None
    mask = None if packed else (torch.rand(90, 2) > 0.3).t()
    bags = 3 if packed else 2
    layouts = [
        x.transpose(-1, -2).contiguous().transpose(-1, -2),
        torch.cat([x, x], -1)[..., 12:],
        torch.stack([x, x], -1)[..., 1],
        x.flip(0).contiguous()[:, :1].expand(x.shape) if not packed else x[:1].expand(x.shape),
        x[..., :1].expand(x.shape),
        torch.randn(x.numel() + 1)[1:].view(x.shape),
    ]
    minors = [
        minor.transpose(-1, -2).contiguous().transpose(-1, -2),
        torch.cat([minor, minor], -1)[..., minor.shape[-1] :],
        minor[..., :1].expand(minor.shape),
    ]
    grads = [
        torch.ones(()).expand(bags, 3, 12),
        torch.randn(bags, 3, 1).expand(bags, 3, 12),
        torch.randn(12, 3, bags).permute(2, 1, 0),
    ]
    weight_grads = [torch.ones(()).expand(*shape, 3), torch.randn(3, *shape).movedim(0, -1)]
    for i, layout in enumerate(layouts):
        check(
            layout, minors[i % 3], given_scores=given_scores, mask=mask, cu_seqlens=cu_seqlens,
            grad_out=grads[i % 3], grad_weights=weight_grads[i % 2],
            floor=1e-6,
        )  # fmt: skip


@both_pools
@pytest.mark.parametrize("channels", [6, 4100])
def test_gradients_that_are_not_needed(given_scores, channels):
    scale = channels**-0.5
    for queries in (1, 3):
        x, minor = tokens_and_minor(given_scores, (5,), channels, queries)
        cu = offsets(3, 2)
        results = check(x, minor, given_scores=given_scores, cu_seqlens=cu, scale=scale, with_weights=False)
        grad_out = torch.randn(2, queries, channels)
        full = backward(grad_out, None, x, minor, None, cu, scale, results[:3], given_scores)
        for needs in ((True, False), (False, True), (False, False)):
            some = backward(grad_out, None, x, minor, None, cu, scale, results[:3], given_scores, needs)
            for needed, one, whole in zip(needs, some, full, strict=True):
                assert torch.equal(one, whole) if needed else (one.shape == (0,) and one.dtype == whole.dtype)


@both_pools
def test_sizes_of_zero(given_scores):
    for shape, channels, queries, cu in (
        ((0, 5), 4, 2, None),
        ((3, 0), 4, None, None),
        ((3, 5), 0, 2, None),
        ((0,), 4, 2, torch.tensor([0, 0, 0])),
        ((0,), 4, None, torch.tensor([0])),
        ((5,), 4, None, torch.tensor([0])),
    ):
        x, minor = tokens_and_minor(given_scores, shape, channels, queries)
        bags = shape[0] if cu is None else cu.shape[0] - 1
        axis = () if queries is None else (queries,)
        results = forward(x, minor, None, cu, 1.0, given_scores)
        out, lse, weights = results
        assert out.shape == (bags, *axis, channels) and (out == 0).all()
        assert lse.shape == (bags, *axis)
        assert weights.shape == (*shape, *axis)
        if shape == (3, 5):
            assert torch.allclose(weights.sum(1), torch.ones(3, 2))
        else:
            assert (lse == -INF).all() and (weights == 0).all()
        for grad, like in zip(
            backward(out, weights * 0, x, minor, None, cu, 1.0, results, given_scores), (x, minor), strict=True
        ):
            assert grad.shape == like.shape and (grad == 0).all()


@both_pools
def test_tokens_outside_of_every_bag(given_scores):
    x, minor = tokens_and_minor(given_scores, (200,), 6, 3)
    # The reference multiplies such tokens of attention_pool by 0.
    x[:10] = x[150:] = NAN if given_scores else 1e4
    check(x, minor, given_scores=given_scores, cu_seqlens=torch.tensor([10, 20, 20, 150]))


@both_pools
@pytest.mark.parametrize(
    "bad", [[0, 500, 90], [0, 80, 20, 90], [-5, 40, 90], [90, 0], [50, 40, 30], [0, 2**40, -(2**40), 90], [7, 7, 6]]
)
def test_bad_offsets_stay_in_bounds_and_give_nan(given_scores, bad, monkeypatch):
    """Inputs lie inside NaNs, results inside a known pattern: neither may be touched."""
    margin, pattern, buffers = 4096, 77, []
    surrounded = torch.full((margin * 2 + 90 * 8,), NAN)
    surrounded[margin:-margin] = torch.randn(90 * 8)
    x = surrounded[margin:-margin].view(90, 8)
    _, minor = tokens_and_minor(given_scores, (90,), 8, 2)
    cu = torch.tensor(bad)
    bags = len(bad) - 1

    def new_empty(self, *shape, dtype=None, **kwargs):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = torch.full((shape.numel() + 2 * margin,), pattern, dtype=dtype or self.dtype)
        buffers.append(buffer)
        return buffer[margin : margin + shape.numel()].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    results = forward(x, minor, None, cu, 1.0, given_scores)
    backward(torch.ones(bags, 2, 8), torch.ones(90, 2), x, minor, None, cu, 1.0, results, given_scores)
    monkeypatch.undo()
    assert len(buffers) > 4
    for buffer in buffers:
        assert (buffer[:margin] == pattern).all() and (buffer[-margin:] == pattern).all()
    assert results[0].isnan().all() and results[1].isnan().all()


@both_pools
def test_repeats_bit_for_bit(given_scores):
    x, minor = tokens_and_minor(given_scores, (300,), 12, 3)
    cu = offsets(3, 290, 7)
    torch.manual_seed(1)
    first = check(x, minor, given_scores=given_scores, cu_seqlens=cu)
    torch.manual_seed(1)
    for one, other in zip(first, check(x, minor, given_scores=given_scores, cu_seqlens=cu), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("table", [tuning.FORWARD, tuning.BACKWARD])
@pytest.mark.parametrize("float64", [False, True])
def test_every_configuration_is_reachable(table, float64):
    rows = table.float64_rows if float64 else table.rows
    for kind, configs in enumerate(rows):
        assert [table.pick(config.block_d, kind + 1, float64) for config in configs] == list(configs)


@both_pools
@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_configuration_runs(given_scores, channels):
    for queries in (None, 2, 3):
        x, minor = tokens_and_minor(given_scores, (12,), channels - 1, queries)
        # With one weight near 1, dp - delta cancels: its error is that of dp, not that of the small difference.
        check(x, minor, given_scores=given_scores, scale=channels**-0.5, cu_seqlens=offsets(7, 5), floor=1e-6)


def operator_samples():
    for packed in (False, True):
        shape, bags = ((70,), 3) if packed else ((2, 6), 2)
        cu, mask = (offsets(3, 60, 7), None) if packed else (None, torch.ones(2, 6, dtype=torch.bool))
        for queries in (None, 3):
            axis = () if queries is None else (queries,)
            grad_out, grad_weights = torch.randn(bags, *axis, 8), torch.randn(*shape, *axis)
            x, query = tokens_and_minor(False, shape, 8, queries)
            args = (x, query, mask, cu, 0.5)
            yield operators.attention_pool, (*args, True)
            yield operators.attention_pool, (*args, False)
            results = operators.attention_pool(*args, True)
            yield operators.attention_pool_backward, (grad_out, grad_weights, *args, *results, True, False)
            yield operators.attention_pool_backward, (grad_out, None, *args, *results, False, True)
            _, scores = tokens_and_minor(True, shape, 8, queries)
            yield operators.softmax_pool, (x, scores, mask, cu, True)
            results = operators.softmax_pool(x, scores, mask, cu, True)
            yield (
                operators.softmax_pool_backward,
                (grad_out, grad_weights, x, scores, mask, cu, *results, True, True),
            )


def test_opcheck():
    for op, args in operator_samples():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@both_pools
def test_traces_with_dynamic_shapes(given_scores):
    def pool(x, minor, mask):
        if given_scores:
            return operators.softmax_pool(x * 2, minor, mask, None, True)
        return operators.attention_pool(x * 2, minor, mask, None, 0.3, True)

    traced = torch.compile(pool, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((3, 20), (4, 33), (2, 50)):
        x, minor = tokens_and_minor(given_scores, shape, 8, 2)
        mask = torch.rand(shape) > 0.3
        for one, other in zip(traced(x, minor, mask), pool(x, minor, mask), strict=True):
            assert torch.equal(one, other)


@both_pools
def test_public_functions_compile(given_scores):
    x, minor = tokens_and_minor(given_scores, (2, 9), 8, None)
    function = fusefeat.softmax_pool if given_scores else fusefeat.attention_pool
    traced = torch.compile(lambda x: function(x * 2, minor, backend="triton"), backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    for found in (traced(x), *torch.autograd.grad(traced(x).sum(), x)):
        assert found.isfinite().all()
    assert torch.equal(traced(x), function(x * 2, minor, backend="triton"))


@both_pools
def test_arguments_are_checked(given_scores):
    x, minor = tokens_and_minor(given_scores, (2, 6), 8, None)
    call = (
        (lambda *a: operators.softmax_pool(*a, False))
        if given_scores
        else (lambda *a: operators.attention_pool(*a, 1.0, False))
    )
    cu = offsets(2, 4)
    for args in (
        (x, minor[..., :-1], None, None),
        (x, minor.double(), None, None),
        (x[0], minor, None, None),
        (x, minor, torch.ones(2, 5, dtype=torch.bool), None),
        (x, minor, torch.ones(2, 6), None),
        (x, minor, None, cu),
        (x[0], minor[0] if given_scores else minor, None, cu.float()),
        (x[0], minor[0] if given_scores else minor, torch.ones(6, dtype=torch.bool), cu),
    ):
        with pytest.raises(RuntimeError, match="fusefeat"):
            call(*args)
