"""The CPU operators as kernels: every instruction set this machine has, the borders of blocks and work items, strides,
untouched memory, bad offsets, threads. What the public functions promise is tested elsewhere, for all backends.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from cpu_isas import every_isa, rounds_weights  # noqa: F401 (the fixture isa)
from fusefeat.reference import attention_pool as reference
from torch import Tensor

NAN, INF = float("nan"), float("inf")
OPS = torch.ops.fusefeat
HALF_TYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """glibc fills what it hands out with -6.02 and what it gets back with 0.747: elements nobody writes show."""
    perturb = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if perturb is None:
        pytest.skip("needs glibc")
    perturb(-6, 0x3F)
    yield
    perturb(-6, 0)


@dataclass
class Call:
    """One problem for both pools, or for one of them."""

    x: Tensor
    query: Tensor
    scores: Tensor
    mask: Tensor | None = None
    cu: Tensor | None = None
    scale: float = 0.7
    grads: tuple[Tensor, Tensor] | None = None  # incoming, for out and weights
    kinds: tuple[str, ...] = ("attention_pool", "softmax_pool")

    def incoming(self, out: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.grads is None:
            generator = torch.Generator().manual_seed(1)
            made = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (out, weights)]
            # Behind a result of bfloat16 stands a gradient of bfloat16.
            self.grads = (made[0].to(self.x.dtype) if self.x.dtype in HALF_TYPES else made[0]), made[1]
        return self.grads[0].to(out.dtype), self.grads[1].to(out.dtype)


def run(call: Call, kind: str) -> dict[str, Tensor]:
    """Everything the operators of one pool give: out, lse, weights and both gradients."""
    other, extra = (call.query, (call.scale,)) if kind == "attention_pool" else (call.scores, ())
    with torch.no_grad():
        out, lse, weights = getattr(OPS, kind)(call.x, other, call.mask, call.cu, *extra, True)
        backward = getattr(OPS, f"{kind}_backward")
        saved = (call.x, other, call.mask, call.cu, *extra, out, lse, weights)
        grad_x, grad_other = backward(*call.incoming(out, weights), *saved, True, True)
    return {"out": out, "lse": lse, "weights": weights, "grad_x": grad_x, "grad_other": grad_other}


def expect(call: Call, kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same from the reference."""
    x = call.x.to(dtype).requires_grad_()
    other = (call.query if kind == "attention_pool" else call.scores).to(dtype).requires_grad_()
    extra = (call.scale,) if kind == "attention_pool" else ()
    out, lse, weights = getattr(reference, kind)(x, other, call.mask, call.cu, *extra)
    grads = torch.autograd.grad((out, weights), (x, other), call.incoming(out, weights))
    named = {"out": out, "lse": lse, "weights": weights, "grad_x": grads[0], "grad_other": grads[1]}
    return {name: t.detach() for name, t in named.items()}


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def usual_size(want: dict[str, Tensor]) -> float:
    """Of grad_other for incoming gradients of 1: what rounding is relative to when its terms cancel."""
    weights, x = want["weights"], want["grad_x"]
    terms = 1 if want["grad_other"].shape == weights.shape else weights.numel()
    return rms(weights[weights.isfinite()]) * (x.shape[-1] * terms) ** 0.5


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 4e-6) -> None:
    """Same NaN, same infinities, and otherwise a small RMS error; half types round once more, at most half an ulp."""
    grad_dtypes = {got[name].dtype for name in ("grad_x", "grad_other") if name in got}
    paired = len(grad_dtypes) == 1 and rounds_weights(*grad_dtypes)
    for name, two in want.items():
        one = got[name]
        assert one.shape == two.shape, name
        assert torch.equal(one.isnan(), two.isnan()), f"NaN in {name}"
        assert torch.equal(one[two.isinf()].double(), two[two.isinf()].double()), f"infinities in {name}"
        finite = two.isfinite()
        error = (one[finite].double() - two[finite]).abs()
        if one.dtype in HALF_TYPES:
            info = torch.finfo(one.dtype)
            error = (error - two[finite].abs() * info.eps / 2 - info.smallest_normal * info.eps).clamp(min=0)
        size = max(rms(two[finite]), usual_size(want) if name == "grad_other" else 0.0)
        # The rounding of a weight, relative.
        limit = 2.0**-8 if paired and name in ("out", "grad_x", "grad_other") else tolerance
        assert rms(error) <= limit * size, f"{name}: {rms(error) / size:.2e} of its size"


Maker = Callable[[], Iterator[Call]]


@functools.cache
def with_reference(make: Maker) -> list[tuple[Call, dict[str, dict[str, Tensor]]]]:
    torch.manual_seed(0)
    return [(call, {kind: expect(call, kind) for kind in call.kinds}) for call in make()]


def check_all(make: Maker, tolerance: float = 4e-6) -> None:
    for call, wants in with_reference(make):
        for kind, want in wants.items():
            check(run(call, kind), want, 1e-14 if call.x.dtype == torch.float64 else tolerance)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def padded(b: int, t: int, d: int, k: int | None = None, dtype: torch.dtype = torch.float32) -> Call:
    lead = () if k is None else (k,)
    query = rand(*lead, d, dtype=dtype) * max(d, 1) ** -0.5
    return Call(rand(b, t, d, dtype=dtype), query, rand(b, t, *lead, dtype=dtype))


def packed(lengths: Sequence[int], d: int, k: int | None = None, dtype: torch.dtype = torch.float32) -> Call:
    call = padded(1, sum(lengths), d, k, dtype)
    call.x, call.scores = call.x[0], call.scores[0]
    call.cu = torch.tensor([0, *lengths]).cumsum(0)
    return call


def with_mask(call: Call) -> Call:
    """A random mask with an empty bag, and garbage where it says no."""
    call.mask = torch.rand(call.x.shape[:2]) > 0.3
    call.mask[0] = False
    call.x[~call.mask] = NAN
    call.scores[~call.mask] = NAN
    return call


SIZES = [(d, k) for d in (1, 7, 10, 16, 64, 97) for k in (None, 3)]
SIZES += [(10, 17), (16, 64), (64, 1), (97, 2), (600, None), (600, 5), (1025, 1), (1025, 17)]


def sizes(dtype: torch.dtype) -> Iterator[Call]:
    for d, k in SIZES if dtype == torch.float32 else SIZES[3:-2:3]:
        yield with_mask(padded(3, 39, d, k, dtype))
        yield packed((3, 0, 27, 70, 10), d, k, dtype)


def float32_sizes() -> Iterator[Call]:
    yield from sizes(torch.float32)


def other_sizes() -> Iterator[Call]:
    for dtype in (torch.float64, *HALF_TYPES):
        yield from sizes(dtype)


def accumulation_types() -> Iterator[Call]:
    for dtype in HALF_TYPES:
        for k in (None, 6):
            call = padded(2, 30, 40, k, dtype)
            call.query, call.scores = rand(*call.query.shape) * 0.2, rand(*call.scores.shape)
            yield call


@pytest.mark.parametrize("make", [float32_sizes, other_sizes, accumulation_types])
def test_sizes_and_dtypes(isa: str, make: Maker) -> None:
    check_all(make)


def sharp() -> Iterator[Call]:
    for call in (padded(8, 1000, 64, 2), padded(64, 40, 300), packed((3, 9000, 40), 32)):
        call.scores *= 8
        call.query *= 3
        yield call


@functools.cache
def eager_errors() -> list[dict[str, float]]:
    return [
        {name: rms(t - want[name]) for name, t in expect(call, kind, torch.float32).items()}
        for call, wants in with_reference(sharp)
        for kind, want in wants.items()
    ]


def test_error_is_at_most_twice_that_of_eager_float32(isa: str) -> None:
    errors = iter(eager_errors())
    for call, wants in with_reference(sharp):
        for kind, want in wants.items():
            got, eager_error = run(call, kind), next(errors)
            for name, t in want.items():
                limit = max(1e-6 * rms(t), 2 * eager_error[name])
                assert rms(got[name] - t) <= limit, (kind, name, rms(got[name] - t), limit)


def borders() -> Iterator[Call]:
    """Rows go in blocks of 8 to 64, work items take 256 KiB of tokens: each border, one less and one more."""
    for d, lengths in ((512, (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 127, 128, 129, 257)), (64, (63, 64, 65, 1025, 2049))):
        for t in lengths:
            yield padded(2, t, d)
        yield packed(lengths, d)
    yield padded(1, 4097, 16, 2)
    yield packed((4095, 4096, 4097, 1, 0, 9000), 16, 2)


def bfloat16_borders() -> Iterator[Call]:
    """Pairs of rows, of channels and of vectors: where one is left over; 32 channels go together."""
    for d in (2, 31, 32, 33, 63, 64, 65, 95, 96, 100):
        for t, k in ((1, None), (2, 1), (3, 2), (9, 3), (16, 4), (17, 5), (33, None), (37, 12), (10, 33)):
            yield with_mask(padded(2, t, d, k, torch.bfloat16))
            yield padded(2, t, d, k, torch.bfloat16)
    yield packed((4095, 4096, 4097, 1, 0, 9001), 16, 2, torch.bfloat16)
    yield padded(2, 300, 64, 1025, torch.bfloat16)  # too many vectors for a cache
    steep = padded(2, 3, 40, None, torch.bfloat16)  # what is computed for that row may be infinite
    steep.query, steep.scale = steep.query * 4096, 1 / 4096
    yield steep
    # Twice the same infinite token, with a weight that is a bfloat16 and with one that is not.
    infinite = padded(2, 3, 40, None, torch.bfloat16)  # times the 0 of a row that is not there it would be NaN
    infinite.x[:, 2, 5], infinite.kinds = INF, ("softmax_pool",)
    infinite.scores[:, 2] = torch.tensor([4.0, 0.5])
    yield infinite


def unusual() -> Iterator[Call]:
    yield from (padded(5, 40, 13), padded(5, 40, 13, 3), packed((0, 7, 0, 0, 2000, 31, 0), 33))
    yield from (with_mask(padded(4, 90, 20, 2)), with_mask(padded(2, 3000, 40)))
    uncovered = packed((10, 20, 30), 9)
    uncovered.cu = torch.tensor([4, 10, 40])
    yield uncovered


@pytest.mark.parametrize("make", [borders, bfloat16_borders, unusual])
def test_every_element_is_written_and_right(isa: str, poisoned: None, make: Maker) -> None:
    check_all(make)


def test_gradients_that_are_no_bfloat16_are_not_rounded_to_it(isa: str) -> None:
    call = padded(2, 40, 40, 3, torch.bfloat16)
    call.grads = rand(2, 3, 40), rand(2, 40, 3)
    got, want = run(call, "attention_pool"), expect(call, "attention_pool")
    for name in ("grad_x", "grad_other"):
        beyond = (got[name].double() - want[name]).abs() - want[name].abs() * torch.finfo(torch.bfloat16).eps / 2
        assert rms(beyond.clamp(min=0)) <= 2e-5 * rms(want[name]), name


def test_nothing_is_made_that_is_not_asked_for(isa: str) -> None:
    call = padded(2, 30, 20, 3)
    for kind, other, extra in (("attention_pool", call.query, (1.0,)), ("softmax_pool", call.scores, ())):
        out, lse, weights = getattr(OPS, kind)(call.x, other, None, None, *extra, False)
        full = getattr(OPS, kind)(call.x, other, None, None, *extra, True)
        assert weights.shape == (0,) and torch.equal(out, full[0]) and torch.equal(lse, full[1])
        args = (torch.randn_like(out), None, call.x, other, None, None, *extra, out, lse, weights)
        backward = getattr(OPS, f"{kind}_backward")
        both = backward(*args, True, True)
        one, none = backward(*args, True, False)
        assert torch.equal(one, both[0]) and none.shape == (0,)
        none, one = backward(*args, False, True)
        assert torch.equal(one, both[1]) and none.shape == (0,)
        assert [g.shape for g in backward(*args, False, False)] == [(0,), (0,)]


def no_tokens() -> Iterator[Call]:
    yield from (padded(0, 5, 4, 2), padded(3, 0, 4, 2), padded(0, 0, 4), packed((), 6), packed((0, 0), 6))


def test_sizes_of_zero(isa: str, poisoned: None) -> None:
    check_all(no_tokens)
    for k in (None, 2):
        got = run(padded(3, 5, 0, k), "attention_pool")  # scores of 0
        assert (got["weights"] == 0.2).all() and (got["lse"] == torch.tensor(5.0).double().log()).all()
        assert got["out"].shape == (3, *(() if k is None else (k,)), 0) and got["grad_x"].shape == (3, 5, 0)
    for kind in ("attention_pool", "softmax_pool"):
        got = run(padded(3, 5, 4, 0), kind)
        assert got["out"].shape == (3, 0, 4) and torch.equal(got["grad_x"], torch.zeros(3, 5, 4))


@pytest.mark.parametrize("kind", ["attention_pool", "softmax_pool"])
def test_threads_and_repeats_change_no_bit(isa: str, kind: str) -> None:
    lengths = [(7 * i) % 50 for i in range(400)]
    calls = [padded(2, 9000, 24), padded(300, 20, 40, 3), packed([20000, *lengths, 7000, 1, 0], 16, 2)]
    calls.append(padded(3, 800, 520, None, torch.bfloat16))
    threads = torch.get_num_threads()
    try:
        for call in calls:
            torch.set_num_threads(1)
            want = run(call, kind)
            for n in (2, 3, 3, 1):
                torch.set_num_threads(n)
                for name, one in run(call, kind).items():
                    assert torch.equal(one, want[name]), (n, name)
    finally:
        torch.set_num_threads(threads)


PRODUCTS = [(1, 7, 5), (5, 128, 64), (67, 33, 130), (129, 1, 65), (3, 0, 4), (0, 3, 4), (2, 3, 0), (40, 600, 97)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_in_every_layout(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, depth, columns = shape
    a, b = rand(rows, depth, dtype=dtype), rand(depth, columns, dtype=dtype)
    want = a.double() @ b.double()
    for left in (a, a.t().contiguous().t(), rand(rows, 2 * depth, dtype=dtype)[:, ::2].copy_(a)):
        for right in (b, b.t().contiguous().t(), rand(2 * depth, columns + 3, dtype=dtype)[::2, :columns].copy_(b)):
            error, size = rms(OPS.mm(left, right) - want), max(rms(want), 1e-30)
            assert error <= (1e-6 if dtype == torch.float32 else 1e-14) * size
    with pytest.raises(RuntimeError, match="mm takes"):
        OPS.mm(a, torch.cat([b, b]) if depth else b.to(torch.bfloat16))


def test_a_bag_is_the_same_wherever_it_stands(isa: str) -> None:
    call = packed([5, 9000, 300, 9000], 16)
    call.x[-9000:] = call.x[5:9005]
    out = run(call, "attention_pool")["out"]
    assert torch.equal(out[1], out[3])


def test_many_python_threads_at_once(isa: str) -> None:
    calls = [padded(4, 500, 30 + i) for i in range(6)]
    want = [run(call, "attention_pool") for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda c: run(c, "attention_pool"), calls * 5), want * 5, strict=True):
            assert all(torch.equal(got[name], expected[name]) for name in got)


def strided(dtype: torch.dtype) -> Iterator[Call]:
    b, t, d, k = 3, 45, 37, 2
    plain = padded(b, t, d, k, dtype)
    wide = rand(b + 1, 2 * t, 3 * d, dtype=dtype)
    for x in (
        rand(d, t, b, dtype=dtype).permute(2, 1, 0),
        rand(t, b, d, dtype=dtype).transpose(0, 1),
        wide[1:, 3 : 3 + t, 5 : 5 + d],
        wide[1:, ::2, 1::3],
        rand(1, t, d, dtype=dtype).expand(b, t, d),
        rand(b, 1, d, dtype=dtype).expand(b, t, d),
        rand(b, t, 1, dtype=dtype).expand(b, t, d),
    ):
        yield Call(x, plain.query, plain.scores)
    yield Call(plain.x, rand(d, k, dtype=dtype).t() * 0.3, rand(k, b, 2 * t, dtype=dtype).permute(1, 2, 0)[:, 1::2])
    yield Call(plain.x, plain.query, plain.scores, (torch.rand(t, 2 * b) > 0.3).t()[::2])
    yield Call(plain.x, plain.query, plain.scores, (torch.rand(t) > 0.3).expand(b, t))
    grads = rand(b, 1, 1).expand(b, k, d), rand(k, t, b).permute(2, 1, 0)
    yield Call(plain.x, plain.query, plain.scores, grads=grads)
    grads = rand(d, k, b).permute(2, 1, 0), rand(1, 1, 1).expand(b, t, k)
    yield Call(plain.x, plain.query, plain.scores, grads=grads)
    offsets = torch.tensor([0, -9, 40, -9, 41, -9, 45], dtype=torch.int32)[::2]
    yield Call(rand(d, t, dtype=dtype).t(), plain.query, rand(k, t, dtype=dtype).t(), cu=offsets)


def float32_strided() -> Iterator[Call]:
    yield from strided(torch.float32)


def bfloat16_strided() -> Iterator[Call]:
    yield from strided(torch.bfloat16)


@pytest.mark.parametrize("make", [float32_strided, bfloat16_strided])
def test_strides(isa: str, make: Maker) -> None:
    check_all(make)


def bag_by_bag(call: Call, kind: str) -> tuple[Tensor, Tensor]:
    """out and lse by the rule for bad offsets: each is clamped to [0, S], a bag that ends before it starts is empty."""
    assert call.cu is not None
    s = call.x.shape[0]
    at = [min(max(int(o), 0), s) for o in call.cu]
    alone = [slice(i, max(i, j)) for i, j in itertools.pairwise(at)]
    results = [expect(Call(call.x[i][None], call.query, call.scores[i][None], scale=call.scale), kind) for i in alone]
    return torch.cat([r["out"] for r in results]), torch.cat([r["lse"] for r in results])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_bad_offsets_stay_in_bounds(isa: str, dtype: torch.dtype) -> None:
    big = 2**31 - 1 if dtype == torch.int32 else 2**62
    surrounded = torch.full((3000, 16), NAN)
    surrounded[500:2500] = rand(2000, 16)
    call = Call(surrounded[500:2500], rand(16) * 0.25, torch.full((4000,), NAN)[1000:3000].copy_(rand(2000)), scale=1.0)
    for bad in (
        [0, 5, 3, 2000],
        [-4, 10, 2100, 7, 2000],
        [-big, big, -big, big],
        [0, 1000, 0, 1000, 0],
        [7, 7, 7],
        [2000, 0],
        [3000, 4000],
        [-2, -1],
        [0],
    ):
        call.cu, call.grads = torch.tensor(bad, dtype=dtype), None
        for kind in ("attention_pool", "softmax_pool"):
            got = run(call, kind)
            assert got["grad_x"].shape == call.x.shape and got["weights"].isfinite().all()
            if len(bad) > 1:
                out, lse = bag_by_bag(call, kind)
                check({"out": got["out"], "lse": got["lse"]}, {"out": out, "lse": lse})


def infinite_scores() -> Iterator[Call]:
    """Bags in parts, some of whose parts keep nothing, or nothing for one of the queries."""
    for k in (None, 3):
        call = padded(5, 4100, 40, k)
        scores = call.scores if k else call.scores[..., None]
        scores[0, :3000] = -INF
        scores[1] = -INF
        scores[2, 10:4000, 0] = -INF
        scores[3, 4050:, -1] = -INF
        scores[3, 1:4050:2] = -INF
        call.x[0, :3000] = NAN
        call.x[1] = INF
        call.x[3, 1:4050:2] = NAN
        call.kinds = ("softmax_pool",)
        yield call


def dropped_for_one_query() -> Iterator[Call]:
    """0 * inf must not leak from a token that one query drops and another keeps."""
    call = padded(4, 150, 21, 3)
    call.kinds = ("softmax_pool",)
    call.scores[:, 5, 0] = -INF
    call.x[0, 5, 2] = INF
    call.x[1, 5, 2] = NAN
    yield call
    call = padded(4, 150, 21, 3)
    call.kinds = ("attention_pool",)
    call.query[:, 4] = torch.tensor([1.0, -1.0, 0.5])
    call.x[2, 7, 4] = -INF  # scores of -inf, +inf, -inf
    call.x[3, :, 4] = -INF
    yield call


def not_finite() -> Iterator[Call]:
    for bad in (NAN, INF):
        for t in (20, 5000):
            call = padded(4, t, 30, 2)
            call.mask = torch.ones(4, t, dtype=torch.bool)
            call.mask[:, 1] = False
            call.x[1, t // 2, 7] = bad
            call.x[:, 1] = NAN
            call.query[:, 7] = 0.5
            call.scores[2, t - 1, 0] = bad
            call.scores[3, 0] = bad
            yield call


@pytest.mark.parametrize("make", [infinite_scores, dropped_for_one_query, not_finite])
def test_nan_and_infinities(isa: str, make: Maker) -> None:
    check_all(make)


def many_items() -> Iterator[Call]:
    """The query's gradient is a sum over work items, of which 32 are summed on their own first."""
    yield padded(45, 128, 512)
    yield packed((100, 120, 60, 9000), 512, 2)


def test_querys_gradient_of_many_work_items(isa: str) -> None:
    check_all(many_items)


def large() -> Iterator[Call]:
    """Gradients of more than 8 MiB are written past the caches when their rows fit cache lines."""
    call = with_mask(padded(2, 140, 8192))
    yield call
    yield padded(2, 270, 8192, dtype=torch.bfloat16)
    yield padded(1, 270, 8195)


def test_large_gradients(isa: str) -> None:
    check_all(large)
