"""The shared list of cases that every backend of both pools is held to, and the comparison itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fusefeat.reference import attention_pool as reference
from torch import Tensor

NAN, INF = float("nan"), float("inf")

# Relative RMS against float64: rounding of the result for half types, a few ulp of summation otherwise.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@dataclass
class Inputs:
    """Arguments of one call. ``other`` is the query (attention_pool) or the scores (softmax_pool)."""

    x: Tensor
    other: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float = 1.0
    grad_out: Callable[[Tensor], Tensor] = field(default=lambda g: g)


Maker = Callable[[torch.dtype], Inputs]
ATTENTION: dict[str, Maker] = {}
SOFTMAX: dict[str, Maker] = {}


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def offsets(*lengths: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)


def attention(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        ATTENTION[name] = maker
        return maker

    return add


def softmax(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        SOFTMAX[name] = maker
        return maker

    return add


def _sizes() -> Iterator[tuple[str, int, int, int, int | None]]:
    yield "one of everything", 1, 1, 1, None
    yield "one token", 3, 1, 20, None
    yield "odd", 3, 7, 13, None
    yield "tail lanes", 2, 37, 33, 1
    yield "recipe", 4, 30, 10, None
    yield "two queries", 2, 19, 48, 2
    yield "many queries", 2, 40, 24, 17
    yield "wide", 2, 9, 1100, 3
    yield "long", 2, 3000, 16, None
    yield "no bags", 0, 5, 8, None
    yield "no tokens", 3, 0, 8, 2
    yield "no channels", 2, 5, 0, 2


for _name, _b, _t, _d, _k in _sizes():

    def _attention(dtype: torch.dtype, b: int = _b, t: int = _t, d: int = _d, k: int | None = _k) -> Inputs:
        query = rand(d, dtype=dtype) if k is None else rand(k, d, dtype=dtype)
        return Inputs(rand(b, t, d, dtype=dtype), query, scale=max(d, 1) ** -0.5)

    def _softmax(dtype: torch.dtype, b: int = _b, t: int = _t, d: int = _d, k: int | None = _k) -> Inputs:
        scores = rand(b, t, dtype=dtype) if k is None else rand(b, t, k, dtype=dtype)
        return Inputs(rand(b, t, d, dtype=dtype), scores)

    ATTENTION[f"padded, {_name}"] = _attention
    SOFTMAX[f"padded, {_name}"] = _softmax


LENGTHS = {
    "small bags": (3, 0, 5, 1, 0, 0, 7, 2, 0),
    "a long bag beside short ones": (3, 5000, 3, 1, 3),
    "only empty bags": (0, 0, 0),
    "one bag": (50,),
    "no bags": (),
    "many bags": tuple((i * 7) % 5 for i in range(150)),
}

for _name, _lengths in LENGTHS.items():

    def _packed_attention(dtype: torch.dtype, lengths: tuple[int, ...] = _lengths) -> Inputs:
        cu = offsets(*lengths, dtype=torch.int32 if len(lengths) % 2 else torch.int64)
        return Inputs(rand(sum(lengths), 24, dtype=dtype), rand(2, 24, dtype=dtype), cu_seqlens=cu, scale=0.3)

    def _packed_softmax(dtype: torch.dtype, lengths: tuple[int, ...] = _lengths) -> Inputs:
        return Inputs(
            rand(sum(lengths), 21, dtype=dtype), rand(sum(lengths), dtype=dtype), cu_seqlens=offsets(*lengths)
        )

    ATTENTION[f"packed, {_name}"] = _packed_attention
    SOFTMAX[f"packed, {_name}"] = _packed_softmax


def some_mask(b: int, t: int) -> Tensor:
    mask = torch.rand(b, t) > 0.4
    mask[0] = False  # an all-masked bag
    mask[1] = True
    mask[2] = False
    mask[2, t - 1] = True
    return mask


def behind(x: Tensor, mask: Tensor) -> Tensor:
    """Garbage where no one may look."""
    garbage = torch.tensor([NAN, INF, -INF], dtype=x.dtype)[torch.randint(3, x.shape)]
    return torch.where(mask[..., None], x, garbage)


@attention("mask with garbage behind")
def _(dtype: torch.dtype) -> Inputs:
    mask = some_mask(5, 23)
    return Inputs(behind(rand(5, 23, 18, dtype=dtype), mask), rand(3, 18, dtype=dtype), mask, scale=0.2)


@softmax("mask with garbage behind")
def _(dtype: torch.dtype) -> Inputs:
    mask = some_mask(5, 23)
    scores = behind(rand(5, 23, 2, dtype=dtype), mask)
    return Inputs(behind(rand(5, 23, 18, dtype=dtype), mask), scores, mask)


@attention("strided mask")
def _(dtype: torch.dtype) -> Inputs:
    mask = some_mask(20, 6).t().contiguous().t()
    return Inputs(rand(20, 6, 9, dtype=dtype), rand(9, dtype=dtype), mask)


@attention("expanded mask")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(4, 6, 9, dtype=dtype), rand(9, dtype=dtype), (torch.arange(6) < 4).expand(4, 6))


@softmax("-inf scores with garbage behind")
def _(dtype: torch.dtype) -> Inputs:
    mask = some_mask(5, 40)
    scores = torch.where(mask, rand(5, 40), -INF).to(dtype)
    return Inputs(behind(rand(5, 40, 19, dtype=dtype), mask), scores)


@softmax("-inf scores per query with garbage behind")
def _(dtype: torch.dtype) -> Inputs:
    keep = torch.stack([some_mask(5, 40), some_mask(5, 40), torch.ones(5, 40, dtype=torch.bool)], -1)
    keep[:, 7] = False
    scores = torch.where(keep, rand(5, 40, 3), -INF).to(dtype)
    values = rand(5, 40, 19, dtype=dtype)
    values[:, 7] = NAN
    return Inputs(values, scores)


@softmax("a token dropped by one query and infinite")
def _(dtype: torch.dtype) -> Inputs:
    scores = rand(2, 11, 2, dtype=dtype)
    values = rand(2, 11, 17, dtype=dtype)
    scores[0, 4, 1] = -INF
    values[0, 4, 3] = INF
    return Inputs(values, scores)


@softmax("packed -inf scores, a bag of nothing else")
def _(dtype: torch.dtype) -> Inputs:
    scores = rand(30, dtype=dtype)
    scores[4:12] = -INF
    return Inputs(rand(30, 8, dtype=dtype), scores, cu_seqlens=offsets(5, 6, 0, 19))


@attention("score of -inf from an infinite token")
def _(dtype: torch.dtype) -> Inputs:
    x = rand(3, 12, 10, dtype=dtype)
    query = rand(2, 10, dtype=dtype)
    query[:, 0] = query[:, 0].abs() + 0.5
    x[0, 3, 0] = -INF
    x[1, :, 0] = -INF  # a bag of only -inf scores is empty
    return Inputs(x, query)


@attention("score of -inf beside a mask")
def _(dtype: torch.dtype) -> Inputs:
    x = rand(3, 12, 10, dtype=dtype)
    query = rand(10, dtype=dtype)
    query[0] = query[0].abs() + 0.5
    x[0, 3, 0] = -INF
    x[1, 2:, 0] = -INF  # all that the mask leaves
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1:, :2] = False
    return Inputs(x, query, mask)


@attention("score of -inf for one query, +inf for the other")
def _(dtype: torch.dtype) -> Inputs:
    x = rand(3, 12, 10, dtype=dtype)
    query = rand(2, 10, dtype=dtype)
    query[0, 0], query[1, 0] = 1.0, -1.0
    x[0, 3, 0] = -INF
    return Inputs(x, query)


@attention("kept NaN")
def _(dtype: torch.dtype) -> Inputs:
    x = rand(4, 12, 10, dtype=dtype)
    x[1, 5, 2] = NAN
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[1, 3] = False
    return Inputs(x, rand(10, dtype=dtype), mask)


@softmax("kept NaN and +inf scores")
def _(dtype: torch.dtype) -> Inputs:
    scores = rand(5, 12, dtype=dtype)
    scores[1, 5], scores[2, 4], scores[3, 0] = NAN, INF, -INF
    values = rand(5, 12, 10, dtype=dtype)
    values[4, 2, 1] = NAN
    return Inputs(values, scores)


@softmax("packed NaN stays in its bag")
def _(dtype: torch.dtype) -> Inputs:
    scores = rand(40, 2, dtype=dtype)
    scores[12, 1] = NAN
    return Inputs(rand(40, 7, dtype=dtype), scores, cu_seqlens=offsets(10, 0, 10, 20))


@attention("large scores")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(3, 30, 16, dtype=dtype), rand(16, dtype=dtype), scale=1.0)


@softmax("scores far from zero")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(3, 40, 6, dtype=dtype), (rand(3, 40, 2) + 1000).to(dtype))


@attention("growing scores rescale every step")
def _(dtype: torch.dtype) -> Inputs:
    x = rand(2, 200, 8, dtype=dtype)
    x[:, :, 0] = torch.linspace(-3, 3, 200).to(dtype)
    return Inputs(x, torch.tensor([1.0] + [0.0] * 7).to(dtype))


@attention("transposed tokens")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(3, 26, 15, dtype=dtype).transpose(1, 2), rand(2, 26, dtype=dtype), scale=0.2)


@attention("channels last moved from the front")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(18, 3, 15, dtype=dtype).permute(1, 2, 0), rand(18, 2, dtype=dtype).t(), scale=0.2)


@attention("sliced with an offset and steps")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(5, 40, 70, dtype=dtype)[1:, 3::2, 5:69:2], rand(70, dtype=dtype)[3:67:2], scale=0.2)


@attention("expanded bags and channels")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(1, 9, 1, dtype=dtype).expand(4, 9, 12), rand(1, dtype=dtype).expand(3, 12), scale=0.2)


@softmax("transposed scores, sliced values")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(3, 9, 40, dtype=dtype)[:, :, 7:27], rand(3, 5, 9, dtype=dtype).transpose(1, 2))


@softmax("expanded scores")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(3, 9, 20, dtype=dtype), rand(9, 1, dtype=dtype).expand(3, 9, 4))


@softmax("packed columns")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(20, 31, dtype=dtype).t(), rand(62, dtype=dtype)[::2], cu_seqlens=offsets(4, 26, 1)[::1])


@attention("strided offsets")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(rand(31, 20, dtype=dtype), rand(20, dtype=dtype), cu_seqlens=offsets(4, 0, 26, 0, 1, 0)[::2])


@attention("expanded gradient")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(
        rand(3, 9, 20, dtype=dtype), rand(2, 20, dtype=dtype), grad_out=lambda g: g.flatten()[:1].expand(g.shape)
    )


@attention("transposed gradient")
def _(dtype: torch.dtype) -> Inputs:
    return Inputs(
        rand(3, 9, 20, dtype=dtype),
        rand(2, 20, dtype=dtype),
        grad_out=lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
    )


def sum_dtypes(inputs: Inputs) -> Inputs:
    """The query or scores in the accumulation type."""
    return Inputs(**{**inputs.__dict__, "other": inputs.other.to(reference.acc_dtype(inputs.x.dtype))})


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of the exact values; both finite."""
    if exact.numel() == 0:
        return 0.0
    scale = exact.double().square().mean().sqrt().item()
    error = (actual.double() - exact.double()).square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_close(actual: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = special(actual) != special(exact)
        assert not wrong.any(), f"{what}: {special.__name__} differs at {wrong.nonzero()[:5].tolist()}"
    finite = torch.isfinite(exact)
    error = relative_rms(actual[finite], exact[finite])
    assert error <= tolerance, f"{what}: relative RMS error {error:.3g} > {tolerance:.3g}"


Call = Callable[..., Any]


def on_device(tensor: Tensor | None, device: str) -> Tensor | None:
    """A copy on another device with the same strides and storage offset."""
    if tensor is None or device == "cpu":
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
    return storage.to(device).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def run(
    call: Call, inputs: Inputs, extra: dict[str, Any], grad_dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """out, weights and all gradients of one call, for gradients drawn from a fixed seed."""
    x, other, mask, cu_seqlens = (
        on_device(t, device) for t in (inputs.x, inputs.other, inputs.mask, inputs.cu_seqlens)
    )
    x, other = x.detach().requires_grad_(), other.detach().requires_grad_()
    keywords = {"mask": mask, "cu_seqlens": cu_seqlens, **extra}
    out, weights = call(x, other, **keywords, return_weights=True)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(grad_dtype) for t in (out, weights)]
    cotangents = [inputs.grad_out(grads[0].to(device)).to(out.dtype), grads[1].to(device, weights.dtype)]
    result = {"out": out, "weights": weights}
    result["grad x"], result["grad other"] = torch.autograd.grad([out, weights], [x, other], cotangents)
    out_alone = call(x, other, **keywords)
    only_out = torch.autograd.grad(out_alone, [x, other], cotangents[0])
    result["out without weights"] = out_alone
    result["grad x of out alone"], result["grad other of out alone"] = only_out
    return {name: tensor.detach().cpu() for name, tensor in result.items()}


def compare(call: Call, function: Call, inputs: Inputs, with_scale: bool, device: str = "cpu") -> None:
    """Hold ``call`` to the reference backend of ``function`` in float64 on the same (already rounded) inputs.

    Four times the error that the reference itself makes in the type at hand is allowed where that is more: these
    tensors are too small for its RMS to be steadier than that.
    """
    extra = {"scale": inputs.scale} if with_scale else {}
    narrow = inputs.x.dtype
    double = Inputs(**{**inputs.__dict__, "x": inputs.x.double(), "other": inputs.other.double()})
    exact = run(functools.partial(function, backend="reference"), double, extra, narrow)
    plain = run(functools.partial(function, backend="reference"), inputs, extra, narrow)
    for name, tensor in run(call, inputs, extra, narrow, device).items():
        of_other = name.startswith("grad other") or (name == "weights" and not with_scale)
        want = inputs.other.dtype if of_other else narrow
        assert tensor.dtype == want, f"{name}: dtype {tensor.dtype}, expected {want}"
        assert tensor.shape == exact[name].shape, f"{name}: shape {list(tensor.shape)}"
        finite = torch.isfinite(exact[name])
        own = relative_rms(plain[name][finite], exact[name][finite])
        assert_close(tensor, exact[name], max(TOLERANCE[want], 4 * own), name)
