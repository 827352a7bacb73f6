"""Both pools and nn.AttentionPool beside eager PyTorch, torch.compile, scaled_dot_product_attention and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import fusefeat
import torch
from torch import Tensor
from torch.nn import functional as F

from . import attention_pool_peers as peers
from . import attention_pool_work as work
from . import environment, gpu_targets
from .case import Bound, Case, Contender, Inputs, Target
from .floor import READ
from .results import OURS, Row, best_peer, time_of

FAMILY = "attention_pool"

# A study's slides: a few whole-slide images far above the rest, 150,000 tokens together.
SLIDES = (3, 100_000, 17, 24_000, 60, 12_000, 170, 6_000, 350, 3_500, 700, 2_000, 1_200)


def _random(*shape: int, scale: float = 1.0, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)


def _bags(inputs: Inputs, per_token: Sequence[str]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    lengths = inputs["cu_seqlens"].diff().tolist() if "cu_seqlens" in inputs else None
    tensors = [inputs[name].detach() for name in per_token]
    return enumerate(zip(*(t.unbind(0) if lengths is None else t.split(lengths) for t in tensors), strict=True))


def _by_bag(
    inputs: Inputs,
    shared: Sequence[str],
    pool: Callable[..., Tensor],
    grad_out: Tensor | None,
    per_token: Sequence[str] = ("x",),
) -> Inputs:
    """The reference: one bag after the other in float64, straight from the formula, differentiated by autograd."""
    parameters = [inputs[name].detach().double().requires_grad_() for name in shared]
    outs = []
    parts: dict[str, list[Tensor]] = {name: [] for name in per_token}
    sums = [torch.zeros_like(p) for p in parameters]
    for index, bag in _bags(inputs, per_token):
        tokens = [tensor.double().requires_grad_() for tensor in bag]
        out = pool(*tokens, *parameters)
        outs.append(out.detach())
        if grad_out is not None:
            grads = torch.autograd.grad(out, [*tokens, *parameters], grad_out[index].double())
            for name, grad in zip(per_token, grads, strict=False):
                parts[name].append(grad)
            sums = [total + part for total, part in zip(sums, grads[len(tokens) :], strict=True)]
    wanted = {"out": torch.stack(outs)}
    if grad_out is not None:
        join = torch.cat if "cu_seqlens" in inputs else torch.stack
        wanted |= {f"grad {name}": join(grads) for name, grads in parts.items()}
        wanted |= {f"grad {name}": total for name, total in zip(shared, sums, strict=True)}
    return wanted


def _scored_bag(tokens: Tensor, scores: Tensor) -> Tensor:
    return torch.softmax(scores, 0) @ tokens


def _pool_bag(tokens: Tensor, query: Tensor) -> Tensor:
    weights = torch.softmax(tokens @ query.reshape(-1, tokens.shape[1]).T, 0)
    return (weights.T @ tokens).reshape(query.shape)


def _layer_bag(tokens: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
    # Without the score bias: it cancels in the softmax, and its gradient is 0.
    hidden = F.linear(tokens, weight_in, bias_in)
    return torch.softmax(F.linear(hidden, weight_out), 0).squeeze(1) @ hidden


def _leaves(inputs: Inputs) -> Inputs:
    return {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}


def _bind_pool(inputs: Inputs, backend: str | None) -> Bound:
    x, query, cu_seqlens = inputs["x"], inputs["query"], inputs.get("cu_seqlens")
    return Bound(
        lambda: fusefeat.attention_pool(x, query, cu_seqlens=cu_seqlens, backend=backend),
        _leaves(inputs),
    )


def _bind_softmax_pool(inputs: Inputs, backend: str | None) -> Bound:
    x, scores = inputs["x"], inputs["scores"]
    return Bound(lambda: fusefeat.softmax_pool(x, scores, backend=backend), _leaves(inputs))


def _bind_layer(inputs: Inputs, backend: str | None) -> Bound:
    hidden, channels = inputs["weight_in"].shape
    x = inputs["x"]
    layer = fusefeat.nn.AttentionPool(channels, hidden, backend=backend, device=x.device, dtype=x.dtype)
    names = {"weight_in": "linear_in.weight", "bias_in": "linear_in.bias"}
    names |= {"weight_out": "linear_out.weight", "bias_out": "linear_out.bias"}
    layer.load_state_dict({names[name]: inputs[name].detach() for name in names})
    parameters = dict(layer.named_parameters())
    return Bound(lambda: layer(x), {"x": x, **{name: parameters[names[name]] for name in names}})


def _with_backend(bind: Callable[[Inputs, str | None], Bound], backend: str | None) -> Callable[[Inputs], Bound]:
    return lambda inputs: bind(inputs, backend)


def _ours(bind: Callable[[Inputs, str | None], Bound], device: torch.device) -> list[Contender]:
    named = [
        Contender(f"{OURS} {name}", None, _with_backend(bind, name)) for name in environment.explicit_backends(device)
    ]
    return [Contender(OURS, None, _with_backend(bind, None)), *named]


def padded_case(
    name: str, used_by: str, shape: tuple[int, int, int], queries: int | None, device: torch.device, dtype: torch.dtype
) -> Case:
    bags, length, channels = shape

    def inputs() -> Inputs:
        query_shape = (channels,) if queries is None else (queries, channels)
        return {
            "x": _random(*shape, seed=0, device=device, dtype=dtype),
            "query": _random(*query_shape, scale=channels**-0.5, seed=2, device=device, dtype=dtype),
        }

    text = f"[{bags},{length},{channels}]" + ("" if queries is None else f" K={queries}")
    return Case(
        family=FAMILY,
        name=name,
        shape=text,
        used_by=used_by,
        inputs=inputs,
        leaves=("x", "query"),
        reference=lambda tensors, grad: _by_bag(tensors, ("query",), _pool_bag, grad),
        contenders=[*_ours(_bind_pool, device), *peers.padded(device, one_query=queries is None)],
        work=work.pool(bags * length, channels, queries or 1, bags, dtype.itemsize, grad_x=True),
    )


def scored_case(name: str, used_by: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Case:
    """softmax_pool: the scores come from a network of the caller's."""
    bags, length, channels = shape
    return Case(
        family=FAMILY,
        name=name,
        shape=f"[{bags},{length},{channels}] scored",
        used_by=used_by,
        inputs=lambda: {
            "x": _random(*shape, seed=0, device=device, dtype=dtype),
            "scores": _random(bags, length, seed=2, device=device, dtype=dtype),
        },
        leaves=("x", "scores"),
        reference=lambda tensors, grad: _by_bag(tensors, (), _scored_bag, grad, ("x", "scores")),
        contenders=[*_ours(_bind_softmax_pool, device), *peers.scored(device)],
        work=work.scored(bags * length, channels, bags, dtype.itemsize),
    )


def packed_case(
    name: str,
    used_by: str,
    lengths: Sequence[int],
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    frozen: bool = False,
) -> Case:
    """``frozen``: the tokens are features from elsewhere and need no gradient."""
    tokens = sum(lengths)

    def inputs() -> Inputs:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        return {
            "x": _random(tokens, channels, seed=0, device=device, dtype=dtype),
            "query": _random(channels, scale=channels**-0.5, seed=2, device=device, dtype=dtype),
            "cu_seqlens": offsets.to(device=device, dtype=torch.int32),
        }

    return Case(
        family=FAMILY,
        name=name,
        shape=f"[{tokens},{channels}] in {len(lengths)} bags of {min(lengths)}..{max(lengths)}",
        used_by=used_by,
        inputs=inputs,
        leaves=("query",) if frozen else ("x", "query"),
        reference=lambda tensors, grad: _by_bag(tensors, ("query",), _pool_bag, grad),
        contenders=[*_ours(_bind_pool, device), *peers.packed(lengths, device)],
        work=work.pool(tokens, channels, 1, len(lengths), dtype.itemsize, grad_x=not frozen),
    )


def layer_case(
    name: str, used_by: str, shape: tuple[int, int, int], hidden: int, device: torch.device, dtype: torch.dtype
) -> Case:
    bags, length, channels = shape

    def inputs() -> Inputs:
        make = partial(_random, device=device, dtype=dtype)
        return {
            "x": make(*shape, seed=0),
            "weight_in": make(hidden, channels, scale=channels**-0.5, seed=2),
            "bias_in": make(hidden, scale=0.1, seed=3),
            "weight_out": make(1, hidden, scale=hidden**-0.5, seed=4),
            "bias_out": make(1, seed=5),
        }

    return Case(
        family=FAMILY,
        name=name,
        shape=f"[{bags},{length},{channels}]->{hidden}",
        used_by=used_by,
        inputs=inputs,
        leaves=("x", "weight_in", "bias_in", "weight_out", "bias_out"),
        reference=lambda tensors, grad: _by_bag(tensors, ("weight_in", "bias_in", "weight_out"), _layer_bag, grad),
        contenders=[*_ours(_bind_layer, device), *peers.layer(device)],
        work=work.layer(bags * length, channels, hidden, bags, dtype.itemsize),
        gradient_slack=(4.0, 1e-5),
        matmul=(bags * length, channels, hidden),
    )


def cases(device: torch.device, dtype: torch.dtype, quick: bool) -> list[Case]:
    padded = partial(padded_case, device=device, dtype=dtype)
    packed = partial(packed_case, device=device, dtype=dtype)
    scored = partial(scored_case, device=device, dtype=dtype)
    layer = partial(layer_case, device=device, dtype=dtype)
    if quick:
        return [
            padded("quick-padded", "a check of the harness", (3, 17, 8), None),
            padded("quick-queries", "a check of the harness", (2, 9, 8), 3),
            packed("quick-packed", "a check of the harness", (3, 1, 40), 8),
            scored("quick-scored", "a check of the harness", (3, 17, 8)),
            layer("quick-layer", "a check of the harness", (2, 9, 8), 4),
            layer("quick-square", "a check of the harness", (2, 9, 8), 8),
        ]
    generator = torch.Generator().manual_seed(7)
    graphs = torch.randint(3, 61, (2048,), generator=generator).tolist()
    return [
        padded("abmil-padded", "attention MIL, bags padded to one length", (16, 4096, 512), None),
        padded("small", "short sequences, per-call overhead", (32, 128, 64), None),
        padded("vit-tokens", "pooling of ViT-like tokens", (64, 512, 256), None),
        padded("siglip-map", "SigLIP's MAP head, one probe", (16, 729, 1152), 1),
        padded("set-pma", "set transformer's PMA, many seeds", (8, 1024, 256), 16),
        scored("ecapa", "attentive statistics pooling of ECAPA-TDNN, 3 s of speech", (32, 300, 1536)),
        packed("abmil-1k", "attention MIL, one biopsy a step", (1_000,), 512),
        packed("abmil-10k", "attention MIL, one slide a step", (10_000,), 512),
        packed("abmil-100k", "attention MIL, one large slide a step", (100_000,), 512),
        packed("slides", "whole-slide bags, packed", SLIDES, 512),
        packed("slides-frozen", "the same on frozen features", SLIDES, 512, frozen=True),
        packed("graphs", "graph readout, many small bags", graphs, 128),
        packed("graphs-batch", "graph readout, one mini-batch of molecules", graphs[:128], 64),
        layer("layer", "nn.AttentionPool, the published layer", (16, 4096, 512), 128),
        layer("layer-recipe", "the published recipe: 1000 rows of 10 values in bags of 10", (100, 10, 10), 128),
        layer("layer-map", "the layer at the size of SigLIP's head", (8, 729, 1152), 1152),
    ]


def scaling(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, list[tuple[int, Case]]]:
    """By axis: sizes and their cases."""
    lengths, channels = ((4, 16), 8) if quick else ((16, 64, 256, 1024, 4096, 16384), 512)
    widths, length = ((4, 16), 8) if quick else ((16, 64, 256, 1024, 4096), 512)
    padded = partial(padded_case, used_by="scaling", queries=None, device=device, dtype=dtype)
    return {
        "T": [(t, padded(f"T={t}", shape=(16, t, channels))) for t in lengths],
        "D": [(d, padded(f"D={d}", shape=(16, length, d))) for d in widths],
    }


def _against(rows: list[Row], text: str, case: str, mode: str, wanted: float, names: Sequence[str]) -> Target:
    ours, best = time_of(rows, case, mode, OURS), best_peer(rows, case, mode, names)
    if ours is None or best is None or best.median_ms is None:
        return Target(text, None, False)
    factor = best.median_ms / ours
    got = f"{factor:.2f}x ({ours:.3g} ms against {best.median_ms:.3g} ms of {best.contender})"
    return Target(text, got, factor >= wanted)


def targets(rows: list[Row]) -> list[Target]:
    """The project's promises for float32 on two CPU threads, and for a GPU, of what was run."""
    rows = [row for row in rows if row.family == FAMILY]
    on_gpu = gpu_targets.pools(rows)
    rows = [row for row in rows if row.dtype == "fp32" and row.device == "cpu"]
    if not rows:
        return on_gpu
    rivals = ("eager", "compile", "sdpa")
    found = [
        _against(
            rows,
            "[16,4096,512] forward at least 1.5x the best of eager, compile, SDPA",
            "abmil-padded",
            "forward",
            1.5,
            rivals,
        )
    ]
    ours, read = (time_of(rows, "abmil-padded", "forward", name) for name in (OURS, READ))
    text = "[16,4096,512] forward within 1.6x of x.sum()"
    if ours is None or read is None:
        found.append(Target(text, None, False))
    else:
        found.append(Target(text, f"{ours / read:.2f}x ({ours:.3g} ms over {read:.3g} ms)", ours / read <= 1.6))
    found += [
        _against(
            rows,
            "[16,4096,512] forward+backward at least 3x the best of eager, compile, SDPA",
            "abmil-padded",
            "both",
            3.0,
            rivals,
        ),
        _against(
            rows,
            "nn.AttentionPool(512,128) forward+backward at least 10x the published layer, eager or compiled",
            "layer",
            "both",
            10.0,
            ("eager", "compile"),
        ),
        _against(rows, "[32,128,64] forward not slower than eager", "small", "forward", 1.0, ("eager",)),
        _against(rows, "[32,128,64] forward+backward not slower than eager", "small", "both", 1.0, ("eager",)),
    ]
    return found + on_gpu
