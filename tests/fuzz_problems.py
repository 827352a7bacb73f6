"""The problems that the fuzz tests draw, and what holds a backend to the reference on each."""

from __future__ import annotations

import math
from typing import Any

import fusefeat
import fuzz
import torch
from hypothesis import strategies as st
from torch import Tensor

# The largest of the incoming gradients, about.
INCOMING = 4.0


@st.composite
def bags(draw: st.DrawFn, tiny: bool = False) -> dict[str, Any]:
    """A pool: tokens, query or scores, and a mask or offsets. Tiny: of few tokens."""
    sizes, longest = (fuzz.tiny_sizes, 20) if tiny else (fuzz.sizes, 120)
    torch.manual_seed(draw(fuzz.seeds))
    dtype = draw(st.sampled_from(fuzz.DTYPES))
    channels = draw(st.one_of(sizes, sizes, st.sampled_from([128, 520, 1030])))
    queries = draw(st.sampled_from([None, None, 1, 2, 3, 9]))
    packed, given_scores = draw(st.booleans()), draw(st.booleans())
    mask = offsets = None
    if packed:
        lengths = draw(st.lists(st.one_of(st.integers(0, 4), st.integers(0, longest)), max_size=7))
        index = draw(st.sampled_from([torch.int32, torch.int64]))
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(index)
        shape = [sum(lengths)]
    else:
        shape = [draw(st.integers(0, 4)), draw(st.one_of(st.integers(0, 5), sizes))]
        if draw(st.booleans()):
            mask = torch.rand(shape) < draw(st.sampled_from([0.1, 0.5, 0.95]))
            mask = draw(fuzz.layouts())(mask.float()).bool() if draw(st.booleans()) else mask
    size = draw(st.sampled_from([1e-3, 1.0, 1.0, 20.0]))
    x = (torch.randn(*shape, channels) * size).to(dtype)
    tail = [] if queries is None else [queries]
    other = torch.randn(*(shape + tail if given_scores else [*tail, channels]))
    other = (other * draw(st.sampled_from([0.01, 1.0, 8.0]))).to(dtype)
    if draw(st.booleans()):
        x = fuzz.place(x, draw(fuzz.specials()))
        other = fuzz.place(other, draw(fuzz.specials())) if given_scores else other
    if mask is not None:  # nobody looks behind the mask
        x = torch.where(mask[..., None], x, fuzz.NAN)
    leaves = {"x": draw(fuzz.layouts())(x), "other": draw(fuzz.layouts())(other)}
    scale = draw(st.sampled_from([1.0, channels**-0.5, -0.3]))
    weights = draw(st.booleans())
    return {"leaves": leaves, "mask": mask, "offsets": offsets, "scores": given_scores, "scale": scale, "need": weights}


def check_pool(problem: dict[str, Any], backend: str, seed: int) -> None:
    def run(leaves: dict[str, Tensor], backend: str | None) -> fuzz.Outputs:
        keywords = {"mask": problem["mask"], "cu_seqlens": problem["offsets"], "backend": backend}
        if not problem["scores"]:
            keywords["scale"] = problem["scale"]
        pool = fusefeat.softmax_pool if problem["scores"] else fusefeat.attention_pool
        if not problem["need"]:
            return {"out": pool(leaves["x"], leaves["other"], **keywords)}
        out, weights = pool(leaves["x"], leaves["other"], **keywords, return_weights=True)
        return {"out": out, "weights": weights}

    x = problem["leaves"]["x"]
    terms = INCOMING * fuzz.largest(x) * (1 if problem["scores"] else abs(problem["scale"]) * fuzz.largest(x))
    if problem["need"]:
        terms += INCOMING * fuzz.largest(x)
    magnitude = {"grad other": terms * x.shape[-1]}
    if (backend != "cpu" or x.dtype == torch.float64) and not problem["scores"]:
        # The CPU kernels take <grad, x - out>; those of GPUs the difference of two products, which rounds where one
        # token has all the weight. So does the reference, which is no more exact than a result in float64.
        products = INCOMING * fuzz.largest(x) * x.shape[-1] ** 0.5
        magnitude["grad x"] = products * abs(problem["scale"]) * fuzz.largest(problem["leaves"]["other"])
    fuzz.compare(run, problem["leaves"], backend, seed, magnitude=magnitude)


@st.composite
def rows(draw: st.DrawFn, tiny: bool = False) -> dict[str, Any]:
    """Context and input rows, shared features, and what goes with them."""
    sizes, most_features = (fuzz.tiny_sizes, [64, 130]) if tiny else (fuzz.sizes, [127, 130, 257, 600])
    torch.manual_seed(draw(fuzz.seeds))
    dtype = draw(st.sampled_from(fuzz.DTYPES))
    inputs, context = draw(st.one_of(st.just(0), sizes)), draw(st.one_of(st.none(), st.just(0), sizes))
    channels, features = draw(sizes), draw(st.one_of(sizes, st.sampled_from(most_features)))
    leaves = {"input": torch.randn(inputs, channels), "weight": torch.randn(features, channels)}
    if context is not None:
        leaves["context"] = torch.randn(context, channels)
    if draw(st.booleans()):
        off = draw(fuzz.specials((-fuzz.INF,)))
        bias = fuzz.place(torch.randn(features), off)
        leaves["bias"] = bias if bias.isfinite().any() else torch.zeros(features)
    count = inputs + (context or 0)
    weighted = draw(st.booleans())
    if weighted:
        leaves["row_weight"] = fuzz.place(torch.rand(count), draw(fuzz.specials((0.0,))))
    if draw(st.booleans()):
        leaves["prior"] = torch.rand(features) + 0.01
    if draw(st.integers(0, 3)) == 0:
        leaves["input"] = fuzz.place(leaves["input"], draw(fuzz.specials((fuzz.NAN, 0.0, -0.0))))
    leaves = {name: draw(fuzz.layouts())(leaf.to(dtype)) for name, leaf in leaves.items()}
    margin = draw(st.sampled_from([1e-3, 0.3, 1.0, 7.0, 100.0])) * channels**-0.5
    return {"leaves": leaves, "margin": margin, "weighted": weighted}


def magnitudes(leaves: dict[str, Tensor], margin: float) -> dict[str, float]:
    """The size of the terms of each result; those of gradients times that of a logit, whose rounding exp passes on."""
    x, weight = fuzz.largest(leaves["input"], leaves.get("context")), fuzz.largest(leaves["weight"])
    bias, channels = fuzz.largest(leaves.get("bias")), leaves["weight"].shape[1]
    logit = margin * (x * weight * channels + bias)
    terms = INCOMING * margin * (1 + logit)
    entropy = 1 + logit + math.log(leaves["weight"].shape[0])
    values = dict.fromkeys(("penalty", "conditional_entropy", "marginal_entropy", "row_entropy", "lse"), entropy)
    sums = leaves["weight"].shape[0] ** 0.5 * weight
    grads = {"grad input": terms * sums, "grad context": terms * sums, "grad weight": terms * x, "grad bias": terms}
    if "row_weight" in leaves:
        # Differences of what a row and what all rows give, over the sum of the weights; and the sum of a row's logits.
        total = max(leaves["row_weight"].double().sum().item(), 1e-3)
        grads["grad row_weight"] = INCOMING * (entropy / total + logit * leaves["weight"].shape[0])
    return values | grads


def check_objective(problem: dict[str, Any], backend: str, seed: int) -> None:
    def run(leaves: dict[str, Tensor], backend: str | None) -> fuzz.Outputs:
        args = [leaves.get(name) for name in ("input", "context", "weight", "bias")]
        keywords = {"margin": problem["margin"], "row_weight": leaves.get("row_weight"), "backend": backend}
        penalty, reg, stats, clamp = fusefeat.shared_objective(
            *args, prior=leaves.get("prior"), return_stats=True, **keywords
        )
        total = fusefeat.clamped_reg(*args, reduction="sum", subtract_floor=True, **keywords)
        return {"penalty": penalty, "reg": reg, "total": total, **stats._asdict(), "fired": clamp.fired}

    fuzz.compare(run, problem["leaves"], backend, seed, magnitude=magnitudes(problem["leaves"], problem["margin"]))


def check_matrices(problem: dict[str, Any], backend: str, seed: int) -> None:
    names = [name for name in ("input", "context", "weight", "bias") if name in problem["leaves"]]

    def run(leaves: dict[str, Tensor], backend: str | None) -> fuzz.Outputs:
        args = [leaves.get(name) for name in ("input", "context", "weight", "bias")]
        keywords = {"margin": problem["margin"], "backend": backend}
        return {
            "assignment": fusefeat.shared_assignment(*args, **keywords),
            "activation": fusefeat.clamped_activation(*args, **keywords),
        }

    def eager(leaves: dict[str, Tensor], backend: str | None) -> fuzz.Outputs:
        """As PyTorch would: the gradient of a half-typed softmax starts from its rounded result."""
        present = [leaves[name] for name in ("context", "input") if name in leaves]
        z = torch.nn.functional.linear(torch.cat(present), leaves["weight"], leaves.get("bias")) * problem["margin"]
        return {"assignment": z.softmax(1), "activation": torch.where(z > problem["margin"], z, problem["margin"])}

    leaves = {name: problem["leaves"][name] for name in names}
    rough = None if leaves["input"].dtype == torch.float64 else eager
    fuzz.compare(run, leaves, backend, seed, rough, magnitudes(leaves, problem["margin"]))
