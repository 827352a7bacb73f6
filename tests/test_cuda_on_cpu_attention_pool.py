"""The CUDA kernels of both pools, run on the CPU, against the reference."""

import math

import pytest
import torch
from cuda_on_cpu.build import NAMESPACE
from cuda_on_cpu.kernels import bits, in_both_orders, kernel_library, poisoned_memory  # noqa: F401 (fixtures)
from fusefeat.reference import attention_pool as reference

HALF, BF16, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Relative RMS error of sums in the accumulation type, and of one rounding to a half type: its unit
# roundoff bounds it.
TOLERANCE = {FLOAT: 2e-6, DOUBLE: 1e-14, HALF: 2**-11, BF16: 2**-8}
NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.usefixtures("library", "poisoned_memory")


def close(actual, expected, name, dtype=None):
    """Same NaN and infinities, and a small relative RMS error elsewhere."""
    assert actual.shape == expected.shape, name
    expected = expected.to(actual.device)
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places"
    finite = expected.isfinite()
    special = ~finite & ~expected.isnan()
    assert torch.equal(actual[special].double(), expected[special].double()), f"{name}: other infinities"
    error = (actual.double() - expected.double())[finite].square().sum().sqrt()
    size = expected.double()[finite].square().sum().sqrt()
    assert error <= TOLERANCE[dtype or actual.dtype] * size, f"{name}: relative error {error / size:.1e}"


class Pool:
    """One problem: forward and backward through the kernels, and through the reference in float64."""

    def __init__(
        self, library, tokens, other, *, attention, mask=None, cu_seqlens=None, scale=1.0, reference_dtype=DOUBLE
    ):
        self.library, self.tokens, self.other = library, tokens, other
        self.attention, self.mask, self.cu_seqlens, self.scale = attention, mask, cu_seqlens, scale
        self.reference_dtype = reference_dtype
        self.ops = getattr(torch.ops, NAMESPACE)

    def forward(self, need_weights=True):
        if self.attention:
            arguments = (self.tokens, self.other, self.mask, self.cu_seqlens, self.scale, need_weights)
            return in_both_orders(self.library, lambda: self.ops.attention_pool(*arguments))
        arguments = (self.tokens, self.other, self.mask, self.cu_seqlens, need_weights)
        return in_both_orders(self.library, lambda: self.ops.softmax_pool(*arguments))

    def backward(self, results, grad_out, grad_weights, need_tokens=True, need_other=True):
        scale = (self.scale,) if self.attention else ()
        op = self.ops.attention_pool_backward if self.attention else self.ops.softmax_pool_backward
        inputs = (grad_out, grad_weights, self.tokens, self.other, self.mask, self.cu_seqlens)
        return in_both_orders(self.library, lambda: op(*inputs, *scale, *results, need_tokens, need_other))

    def expected(self, grad_out=None, grad_weights=None):
        tokens = self.tokens.to(self.reference_dtype).detach().requires_grad_()
        other = self.other.to(self.reference_dtype).detach().requires_grad_()
        if self.attention:
            out, lse, weights = reference.attention_pool(tokens, other, self.mask, self.cu_seqlens, self.scale)
        else:
            out, lse, weights = reference.softmax_pool(tokens, other, self.mask, self.cu_seqlens)
        results = out.detach(), lse.detach(), weights.detach()
        if grad_out is None:
            return results
        outputs, gradients = [out], [grad_out.to(out.dtype)]
        if grad_weights is not None:
            outputs, gradients = [out, weights], [*gradients, grad_weights.to(out.dtype)]
        return results, torch.autograd.grad(outputs, [tokens, other], gradients)

    def check(self, grad_weights=True, grad_out=None):
        results = self.forward()
        grad_out = torch.randn_like(results[0]) if grad_out is None else grad_out
        grad_weights = torch.randn_like(results[2]) if grad_weights is True else grad_weights or None
        expected, expected_grads = self.expected(grad_out, grad_weights)
        for name, actual, wanted in zip(("out", "lse", "weights"), results, expected, strict=True):
            # lse is float64, and as accurate as sums in the accumulation type are.
            close(actual, wanted, name, results[0].dtype)
        gradients = self.backward(results, grad_out, grad_weights)
        for name, actual, wanted in zip(("grad tokens", "grad other"), gradients, expected_grads, strict=True):
            # A single token has gradients that cancel to zero: measured against those before the sum.
            if actual.numel() and wanted.abs().max() < 1e-12:
                assert actual.abs().max() < 1e-5, name
            else:
                close(actual, wanted, name)
        assert gradients[0].is_contiguous() and gradients[0].dtype == self.tokens.dtype
        assert gradients[1].dtype == self.other.dtype
        return results, gradients


def offsets_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(dtype)


def make(library, attention, packed, lengths, channels, queries, dtype, other_dtype=None, mask=True, seed=0):
    """Random tokens in bags of ``lengths``; padded bags are masked to their length, and a bit more."""
    generator = torch.Generator().manual_seed(seed + channels)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    bags, width = len(lengths), max(lengths, default=0)
    shape = (sum(lengths),) if packed else (bags, width)
    query_axis = () if queries is None else (queries,)
    tokens = randn(*shape, channels).to(dtype)
    other = randn(*query_axis, channels) / math.sqrt(max(channels, 1)) if attention else randn(*shape, *query_axis)
    keep = cu_seqlens = None
    if packed:
        cu_seqlens = offsets_of(lengths)
    elif mask:
        keep = torch.arange(width) < torch.tensor(lengths)[:, None]
        keep &= torch.rand(bags, width, generator=generator) > 0.1
    torch.manual_seed(seed)
    other = other.to(other_dtype or dtype)
    return Pool(library, tokens, other, attention=attention, mask=keep, cu_seqlens=cu_seqlens, scale=0.7)


both_pools = pytest.mark.parametrize("attention", [True, False], ids=["attention", "softmax"])
both_layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@both_pools
@both_layouts
@pytest.mark.parametrize(
    ("queries", "dtype"),
    [(None, HALF), (None, BF16), (None, FLOAT), (None, DOUBLE), (1, BF16), (3, HALF), (3, DOUBLE), (17, FLOAT)],
)
@pytest.mark.parametrize("channels", [1, 10, 64, 97, 600])
def test_against_reference(library, attention, packed, channels, queries, dtype):
    other_dtype = reference.acc_dtype(dtype) if channels in (10, 600) else dtype
    make(library, attention, packed, [7, 0, 13, 1], channels, queries, dtype, other_dtype).check()


@both_pools
@both_layouts
@pytest.mark.parametrize(
    ("channels", "queries", "dtype"),
    [(64, None, BF16), (512, None, HALF), (600, None, FLOAT), (10, 3, FLOAT), (64, 5, HALF), (24, None, DOUBLE)],
)
def test_long_bags_beside_short_ones(library, attention, packed, channels, queries, dtype):
    long = 2000 if packed and channels <= 64 else 600
    make(library, attention, packed, [3, long, 0, 3, 300, 3, 3], channels, queries, dtype).check()


@both_pools
@pytest.mark.parametrize("channels", [64, 97, 600])
def test_many_small_bags(library, attention, channels):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 5, (400,), generator=generator)
    lengths[50:150] = 0
    make(library, attention, True, lengths.tolist(), channels, None, BF16).check()


@both_pools
@pytest.mark.parametrize("channels", [512, 600])
def test_bags_that_end_where_blocks_do(library, attention, channels):
    """Blocks hold 128 or 16 tokens here: ends before, at and after their borders, and several blocks long."""
    lengths = [128, 127, 1, 129, 127, 0, 16, 112, 384, 15, 1, 17, 100]
    pool = make(library, attention, True, lengths, channels, None, HALF)
    pool.check()


@both_pools
@pytest.mark.parametrize(
    ("channels", "queries", "dtype"),
    [(8200, None, BF16), (8200, None, FLOAT), (4099, None, HALF), (2056, 3, BF16), (2049, None, DOUBLE)],
)
def test_rows_longer_than_a_team(library, attention, channels, queries, dtype):
    make(library, attention, True, [5, 0, 30], channels, queries, dtype).check()
    make(library, attention, False, [3, 2], channels, queries, dtype).check(grad_weights=False)


@both_pools
@both_layouts
@pytest.mark.parametrize("queries", [None, 2])
def test_single_tokens(library, attention, packed, queries):
    make(library, attention, packed, [1, 1, 1], 64, queries, FLOAT, mask=False).check()


@both_pools
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("queries", [None, 0, 2])
def test_empty_sizes(library, attention, shape, queries):
    query_axis = () if queries is None else (queries,)
    tokens = torch.randn(shape)
    other = torch.randn(*query_axis, shape[2]) if attention else torch.randn(*shape[:2], *query_axis)
    for mask in (None, torch.ones(shape[:2], dtype=torch.bool)):
        pool = Pool(library, tokens, other, attention=attention, mask=mask)
        out, lse, weights = pool.forward()
        bag_shape = (shape[0], *query_axis)
        assert out.shape == (*bag_shape, shape[2]) and lse.shape == bag_shape
        assert weights.shape == (*shape[:2], *query_axis)
        if shape[1] == 0:
            assert (out == 0).all() and (lse == -INF).all()
        grad_tokens, grad_other = pool.backward((out, lse, weights), torch.randn_like(out), torch.randn_like(weights))
        assert grad_tokens.shape == tokens.shape and grad_other.shape == other.shape
        assert not grad_tokens.isnan().any() and not grad_other.isnan().any()
        if shape[1] == 0 or shape[0] == 0 or queries == 0:
            assert (grad_tokens == 0).all() and (grad_other == 0).all()


@both_pools
def test_empty_packed(library, attention):
    tokens, offsets = torch.randn(0, 16), torch.zeros(6, dtype=torch.int32)
    other = torch.randn(2, 16) if attention else torch.randn(0, 2)
    out, lse, weights = Pool(library, tokens, other, attention=attention, cu_seqlens=offsets).forward()
    assert (out == 0).all() and out.shape == (5, 2, 16) and (lse == -INF).all() and weights.shape == (0, 2)


@both_pools
@both_layouts
@pytest.mark.parametrize("channels", [24, 97])
@pytest.mark.parametrize("queries", [None, 3])
def test_gradients_on_demand(library, attention, packed, channels, queries):
    pool = make(library, attention, packed, [30, 0, 9], channels, queries, FLOAT)
    with_weights, without = pool.forward(True), pool.forward(False)
    assert torch.equal(with_weights[0], without[0]) and torch.equal(with_weights[1], without[1])
    assert without[2].shape == (0,)
    grad_out = torch.randn_like(with_weights[0])
    both = pool.backward(without, grad_out, None)
    for need in ((True, False), (False, True), (False, False)):
        some = pool.backward(without, grad_out, None, *need)
        for needed, gradient, wanted in zip(need, some, both, strict=True):
            assert torch.equal(gradient, wanted) if needed else gradient.shape == (0,)


@both_pools
@pytest.mark.parametrize("queries", [None, 3])
def test_masked_tokens_are_not_read(library, attention, queries):
    pool = make(library, attention, False, [9, 40, 4, 0], 64, queries, HALF)
    pool.mask[2] = False
    wanted, wanted_grads = pool.check()
    for garbage in (NAN, INF, -INF):
        pool.tokens[~pool.mask] = garbage
        if not attention:
            pool.other[~pool.mask] = garbage
        torch.manual_seed(0)
        results = pool.forward()
        gradients = pool.backward(results, torch.randn_like(results[0]), torch.randn_like(results[2]))
        for actual, expected in zip((*results, *gradients), (*wanted, *wanted_grads), strict=True):
            assert torch.equal(bits(actual), bits(expected))
    assert (results[0][2:] == 0).all() and (results[1][2:] == -INF).all() and (results[2][2:] == 0).all()
    assert (gradients[0][2:] == 0).all()


@both_layouts
@pytest.mark.parametrize("channels", [10, 64, 600])
@pytest.mark.parametrize("garbage", [1.0, NAN, INF, -INF])
def test_scores_of_minus_infinity(library, packed, channels, garbage):
    """Some tokens for one query, some for all, and a whole bag; their values must not leak."""
    pool = make(library, False, packed, [40, 40, 40], channels, 3, FLOAT, mask=False)
    tokens, scores = pool.tokens.reshape(3, 40, -1), pool.other.reshape(3, 40, 3)
    scores[0, ::2, 1] = -INF
    scores[1, :7] = -INF
    tokens[1, :7] = garbage
    scores[2, :, 0] = -INF
    scores[2, 5] = -INF
    tokens[2, 5] = garbage
    results, gradients = pool.check()
    assert not any(tensor.isnan().any() for tensor in (results[0], results[2], *gradients))
    assert (results[0][2, 0] == 0).all() and results[1][2, 0] == -INF


@both_layouts
@pytest.mark.parametrize("channels", [10, 64, 600])
@pytest.mark.parametrize("queries", [None, 3])
def test_tokens_scored_minus_infinity(library, packed, channels, queries):
    """An infinite channel drops a token for queries that are positive there, whatever else it holds."""
    pool = make(library, True, packed, [40, 40, 40], channels, queries, FLOAT, mask=False)
    tokens = pool.tokens.reshape(3, 40, -1)
    pool.other[..., 0] = 1
    tokens[0, 3:20, 0] = -INF
    tokens[1, :, 0] = -INF
    results, gradients = pool.check()
    assert not any(tensor.isnan().any() for tensor in (*results, *gradients))
    assert (results[0][1] == 0).all() and (results[1][1] == -INF).all()
    gradient = gradients[0].reshape(3, 40, -1)
    assert (gradient[1] == 0).all() and (gradient[0, 3:20] == 0).all()


def test_token_dropped_by_one_query_only(library):
    """A score that overflows to -inf drops the token for that query; the other one keeps it."""
    pool = make(library, True, False, [20, 20], 64, 2, FLOAT, mask=False)
    pool.tokens[0, 4, 0] = -3e38
    pool.other[0, 0], pool.other[1, 0] = 4, 1e-38
    pool.reference_dtype = FLOAT
    results = pool.forward()
    grad_out = torch.randn_like(results[0])
    gradients = pool.backward(results, grad_out, None)
    (out, lse, weights), wanted = pool.expected(grad_out)
    assert weights[0, 4, 0] == 0 and results[2][0, 4, 0] == 0 and results[2][0, 4, 1] > 0
    for actual, expected in zip((*results, *gradients), (out, lse, weights, *wanted), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@both_pools
@both_layouts
@pytest.mark.parametrize("special", [NAN, INF])
@pytest.mark.parametrize("channels", [10, 64])
def test_special_values_stay_in_their_bag(library, attention, packed, special, channels):
    lengths = [30, 200, 50]
    pool = make(library, attention, packed, lengths, channels, 2, FLOAT, mask=False)
    clean = pool.forward()
    grad_out, grad_weights = torch.randn_like(clean[0]), torch.randn_like(clean[2])
    clean_grads = pool.backward(clean, grad_out, grad_weights)
    at = (40,) if packed else (1, 10)
    if attention:
        pool.other[..., 3] = pool.other[..., 3].abs() + 0.1
        clean = pool.forward()
        clean_grads = pool.backward(clean, grad_out, grad_weights)
        pool.tokens[(*at, 3)] = special
    else:
        pool.other[(*at, 0)] = special
    results = pool.forward()
    gradients = pool.backward(results, grad_out, grad_weights)

    hit = torch.zeros(3, 2, dtype=torch.bool)
    hit[1] = True
    if not attention:
        hit[1, 1] = False
    if packed:
        token_hit = torch.repeat_interleave(hit, torch.tensor(lengths), 0)
    else:
        token_hit = hit[:, None].expand(3, max(lengths), 2)
    for actual, wanted, where in (
        (results[0], clean[0], hit[..., None].expand_as(clean[0])),
        (results[1], clean[1], hit),
        (results[2], clean[2], token_hit),
        (gradients[0], clean_grads[0], token_hit.any(-1)[..., None].expand_as(clean_grads[0])),
    ):
        assert actual[where].isnan().all()
        assert torch.equal(bits(actual[~where]), bits(wanted[~where]))
    if attention:
        assert gradients[1].isnan().all()
    else:
        assert gradients[1][token_hit].isnan().all()
        assert torch.equal(bits(gradients[1][~token_hit]), bits(clean_grads[1][~token_hit]))


@both_pools
def test_nan_in_the_first_and_only_token(library, attention):
    """A running peak that has seen NaN alone must not hide it."""
    pool = make(library, attention, True, [1, 2], 64, None, FLOAT)
    pool.tokens[0] = NAN
    if not attention:
        pool.other[0] = NAN
    out, lse, weights = pool.forward()
    assert out[0].isnan().all() and lse[0].isnan() and weights[0].isnan()
    assert out[1].isfinite().all() and lse[1].isfinite()


def strided(tensor, how):
    """The same values in another memory layout."""
    if how == "transposed":
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    if how == "offset":
        return torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view(tensor.shape)
    if how == "rows apart":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 8), NAN if tensor.is_floating_point() else 0)
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    assert how == "every second"
    wide = torch.stack([tensor, torch.zeros_like(tensor)], -1)
    return wide[..., 0]


@both_pools
@both_layouts
@pytest.mark.parametrize("how", ["transposed", "offset", "rows apart", "every second"])
@pytest.mark.parametrize("queries", [None, 3])
def test_strides(library, attention, packed, how, queries):
    pool = make(library, attention, packed, [20, 33], 64, queries, BF16)
    results = pool.forward()
    grad_out, grad_weights = torch.randn_like(results[0]), torch.randn_like(results[2])
    gradients = pool.backward(results, grad_out, grad_weights)
    pool.tokens, pool.other = strided(pool.tokens, how), strided(pool.other, how)
    if packed:
        pool.cu_seqlens = strided(pool.cu_seqlens.int(), how)
    else:
        pool.mask = strided(pool.mask, how)
    again = pool.forward()
    grads_again = pool.backward(
        [strided(tensor, how) for tensor in again], strided(grad_out, how), strided(grad_weights, how)
    )
    for name, actual, wanted in zip("olwto", (*again, *grads_again), (*results, *gradients), strict=True):
        close(actual, wanted, name, BF16 if actual.dtype == BF16 else FLOAT)
    assert all(gradient.is_contiguous() for gradient in grads_again)


@both_pools
@pytest.mark.parametrize("queries", [None, 3])
def test_expanded(library, attention, queries):
    """Stride 0 in every input and incoming gradient."""
    query_axis = () if queries is None else (queries,)
    tokens = torch.randn(1, 30, 64).expand(4, 30, 64)
    other = (
        torch.randn(64).expand(*query_axis, 64)
        if attention
        else torch.randn(1, 30, *query_axis).expand(4, 30, *query_axis)
    )
    mask = (torch.rand(1, 30) > 0.3).expand(4, 30)
    pool = Pool(library, tokens, other, attention=attention, mask=mask, scale=0.2)
    grad_out = torch.ones(()).expand(4, *query_axis, 64)
    grad_weights = torch.randn(1, 30, *([1] * len(query_axis))).expand(4, 30, *query_axis)
    results = pool.forward()
    _, wanted = pool.expected(grad_out, grad_weights)
    for name, actual, expected in zip("to", pool.backward(results, grad_out, grad_weights), wanted, strict=True):
        close(actual, expected, name)


@both_pools
def test_zero_stride_channels(library, attention):
    tokens = torch.randn(3, 20, 1).expand(3, 20, 48)
    other = torch.randn(48) if attention else torch.randn(3, 20)
    Pool(library, tokens, other, attention=attention, scale=0.3).check()


@both_pools
@pytest.mark.parametrize("channels", [10, 64, 600])
@pytest.mark.parametrize(
    "offsets",
    [
        [0, 30, 1000],
        [-7, 30, 300],
        [-9, -3, 40, 2**40, 300],
        [0, 200, 100, 300],
        [300, 0, 300, 0],
        [50, 40, 30, 20],
        [0, *range(250), 248, 300],
    ],
    ids=lambda offsets: str(offsets[:5]),
)
def test_bad_offsets_give_nan(library, attention, channels, offsets):
    """No access out of bounds (see test_cuda_on_cpu_memory) and no number that looks right."""
    pool = make(library, attention, True, [300], channels, None, FLOAT)
    pool.cu_seqlens = torch.tensor(offsets)
    results = pool.forward()
    assert results[0].shape == (len(offsets) - 1, channels)
    assert results[0].isnan().all() and results[1].isnan().all()
    gradients = pool.backward(results, torch.randn_like(results[0]), None)
    assert gradients[0].shape == pool.tokens.shape
    pool.cu_seqlens = torch.tensor([20, 100, 250], dtype=torch.int32)
    pool.check()


@both_pools
def test_tokens_of_no_bag(library, attention):
    pool = make(library, attention, True, [100], 64, None, FLOAT)
    pool.cu_seqlens = torch.tensor([20, 50, 50, 90])
    pool.tokens[:20] = NAN
    pool.tokens[90:] = NAN
    results = pool.forward()
    gradients = pool.backward(results, torch.randn_like(results[0]), torch.randn_like(results[2]))
    outside = torch.ones(100, dtype=torch.bool)
    outside[20:90] = False
    assert (results[2][outside] == 0).all() and (gradients[0][outside] == 0).all()
    assert not results[0].isnan().any() and not gradients[1].isnan().any()
    if not attention:
        assert (gradients[1][outside] == 0).all()


@both_pools
def test_repeats_are_bitwise_equal(library, attention):
    pool = make(library, attention, True, [3, 900, 0, 3, 200], 96, None, BF16)
    first = pool.forward()
    grad_out = torch.randn_like(first[0])
    gradients = pool.backward(first, grad_out, None)
    for _ in range(2):
        for actual, wanted in zip(pool.forward(), first, strict=True):
            assert torch.equal(bits(actual), bits(wanted))
        for actual, wanted in zip(pool.backward(first, grad_out, None), gradients, strict=True):
            assert torch.equal(bits(actual), bits(wanted))


def test_arguments_are_checked(library):
    ops = getattr(torch.ops, NAMESPACE)
    x, query = torch.randn(2, 3, 4), torch.randn(4)
    with pytest.raises(RuntimeError, match="query must be"):
        ops.attention_pool(x, torch.randn(5), None, None, 1.0, False)
    with pytest.raises(RuntimeError, match="mask must be bool"):
        ops.attention_pool(x, query, torch.ones(2, 3), None, 1.0, False)
    with pytest.raises(RuntimeError, match="mask is not allowed"):
        ops.attention_pool(x[0], query, torch.ones(3).bool(), torch.tensor([0, 3]), 1.0, False)
    with pytest.raises(RuntimeError, match="scores has the wrong shape"):
        ops.softmax_pool(x, torch.randn(2, 4), None, None, False)
