"""What the fuzz tests draw from, and the comparison that allows for how well conditioned a drawn problem is."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from fusefeat.reference.attention_pool import acc_dtype
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

NAN, INF = float("nan"), float("inf")
# How many examples the fuzz tests of the CPU kernels draw together; those of the other kernels draw a third more.
EXAMPLES = int(os.environ.get("FUSEFEAT_FUZZ", "300"))
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Relative RMS of one rounding to the type of a result, and of a sum in the accumulation type.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 1e-6, torch.float64: 1e-14}
UNIT = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def fuzzed(share: float) -> Callable[[Any], Any]:
    """Settings of a test that draws its share of EXAMPLES; a failure prints what reproduces it."""
    return settings(
        max_examples=max(4, round(EXAMPLES * share)),
        deadline=None,
        derandomize="FUSEFEAT_FUZZ" not in os.environ,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 100]))
# For the interpreter, which is slow.
tiny_sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 24, 33]))
seeds = st.integers(0, 2**31 - 1)


@st.composite
def layouts(draw: st.DrawFn) -> Callable[[Tensor], Tensor]:
    """The same values in another layout: transposed, stepped, with an offset."""
    kind = draw(st.sampled_from(["plain", "plain", "reversed axes", "stepped", "offset"]))
    step, start = draw(st.integers(2, 3)), draw(st.integers(1, 5))

    def apply(value: Tensor) -> Tensor:
        if kind == "plain" or value.dim() == 0 or value.numel() == 0:
            return value
        if kind == "reversed axes":
            axes = list(range(value.dim() - 1, -1, -1))
            return value.permute(axes).contiguous().permute(axes)
        if kind == "stepped":
            wide = value.new_full((*value.shape[:-1], value.shape[-1] * step), NAN)
            wide[..., ::step] = value
            return wide[..., ::step]
        longer = value.new_full((value.shape[0] + start, *value.shape[1:]), NAN)
        longer[start:] = value
        return longer[start:]

    return apply


@st.composite
def specials(draw: st.DrawFn, kinds: tuple[float, ...] = (NAN, INF, -INF, 0.0, -0.0)) -> list[tuple[float, float]]:
    """A few (where, what) that are put into a tensor."""
    return draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(kinds)), max_size=3))


def place(value: Tensor, what: list[tuple[float, float]]) -> Tensor:
    value = value.clone()
    for where, special in what:
        if value.numel():
            value.view(-1)[int(where * value.numel())] = special
    return value


Outputs = dict[str, Tensor]
Run = Callable[[dict[str, Tensor], str | None], Outputs]


def with_gradients(run: Run, leaves: dict[str, Tensor], backend: str | None, seed: int, narrow: torch.dtype) -> Outputs:
    """All outputs, and the gradients for random incoming gradients (representable in ``narrow``) on all at once."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = run(leaves, backend)
    differentiable = [out for out in outputs.values() if out.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    incoming = [torch.randn(out.shape, generator=generator).to(narrow).to(out.dtype) for out in differentiable]
    grads = torch.autograd.grad(differentiable, list(leaves.values()), incoming, allow_unused=True)
    found = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {name: value.detach() for name, value in (outputs | found).items()}


def rms(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item() if value.numel() else 0.0


def largest(*values: Tensor | None) -> float:
    """The largest finite magnitude."""
    found = [value.detach().double()[value.detach().isfinite()].abs() for value in values if value is not None]
    return max((float(value.max()) for value in found if value.numel()), default=0.0)


def compare(
    run: Run,
    leaves: dict[str, Tensor],
    backend: str,
    seed: int,
    eager: Run | None = None,
    magnitude: dict[str, float] | None = None,
) -> None:
    """Hold a backend to the reference in float64, and its special values to the reference in the type at hand.

    Allowed is a multiple of what a few roundings of the inputs do to the exact result, and of the error of the
    reference in the type at hand, or of ``eager``. In float64 that error cannot be seen; it is then float32's, scaled.
    ``magnitude`` gives the size of the terms that a result is the sum of, where they may cancel: a few roundings
    of these are allowed as well.
    """
    narrow = min((leaf.dtype for leaf in leaves.values()), key=lambda dtype: dtype.itemsize)
    acc = acc_dtype(narrow)
    double = {name: leaf.detach().double() for name, leaf in leaves.items()}
    generator = torch.Generator().manual_seed(seed + 1)

    def shifted() -> dict[str, Tensor]:
        noise = {name: torch.randn(leaf.shape, generator=generator) for name, leaf in double.items()}
        return {name: leaf * (1 + 4 * UNIT[acc] * noise[name]) for name, leaf in double.items()}

    exact = with_gradients(run, double, "reference", seed, narrow)
    near = [with_gradients(run, shifted(), "reference", seed, narrow) for _ in range(3)]
    plain = with_gradients(run, leaves, "reference", seed, narrow)
    shrink = 1.0
    rough, rough_exact = plain if eager is None else with_gradients(eager, leaves, None, seed, narrow), exact
    if narrow == torch.float64:
        shrink = UNIT[torch.float64] / UNIT[torch.float32]
        single = {name: leaf.float() for name, leaf in leaves.items()}
        rough = with_gradients(run, single, "reference", seed, narrow)
        rough_exact = with_gradients(
            run, {name: leaf.double() for name, leaf in single.items()}, "reference", seed, narrow
        )
    actual = with_gradients(run, leaves, backend, seed, narrow)
    assert actual.keys() == plain.keys()
    for name, got in actual.items():
        want = exact[name]
        assert got.dtype == plain[name].dtype and got.shape == want.shape, name
        if got.dtype == torch.int64:
            assert torch.equal(got, plain[name]), f"{name}: {got} against {plain[name]}"
            continue
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            # A half type overflows where float64 does not: there the reference in that type is the measure.
            agrees = (special(got) == special(want)) | (special(got) == special(plain[name]))
            assert agrees.all(), f"{name}: {special.__name__} differs at {(~agrees).nonzero()[:5].tolist()}"
        finite = got.isfinite() & want.isfinite() & plain[name].isfinite()
        for other in near:
            finite &= other[name].isfinite()
        change = max(rms((other[name] - want)[finite]) for other in near)
        difference = rough[name].double() - rough_exact[name]
        own = rms(difference[difference.isfinite()]) * shrink
        smallest = torch.finfo(got.dtype).smallest_normal  # below it a number is not rounded relatively
        allowed = ROUNDING[got.dtype] * rms(want[finite]) + 16 * (own + change) + smallest
        allowed += 4 * UNIT[acc] * (magnitude or {}).get(name, 0.0)
        error = rms((got.double() - want)[finite])
        assert error <= allowed, f"{name}: RMS error {error:.3g}, allowed {allowed:.3g}, of {rms(want[finite]):.3g}"
