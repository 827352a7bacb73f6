"""The functions on shared logits as they are written without fusefeat: x [N,D], weight [F,D], margin 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import Bound, Contender, Inputs, Skip
from .peers import compiled

Function = Callable[[Tensor, Tensor], Tensor]

MARGIN = 1.0


def _penalty(z: Tensor) -> Tensor:
    # Half types go on in float32, as under autocast: the entropies' gradients would be lost in less.
    log_probs = F.log_softmax(z, 1, dtype=torch.promote_types(z.dtype, torch.float32))
    probs = log_probs.exp()
    conditional = -(probs * log_probs).sum(1).mean()
    mean_probs = probs.mean(0)
    # xlogy is right where a feature is never used.
    divergence = torch.xlogy(mean_probs, mean_probs).sum() + math.log(z.shape[1])
    return conditional + divergence


def _reg(z: Tensor) -> Tensor:
    return z.relu().clamp(min=MARGIN).mean(dtype=torch.promote_types(z.dtype, torch.float32))


def shared_penalty(x: Tensor, weight: Tensor) -> Tensor:
    return _penalty(MARGIN * F.linear(x, weight))


def clamped_reg(x: Tensor, weight: Tensor) -> Tensor:
    return _reg(MARGIN * F.linear(x, weight))


def shared_objective(x: Tensor, weight: Tensor) -> Tensor:
    z = MARGIN * F.linear(x, weight)
    return _penalty(z) + _reg(z)


def bind(function: Function, inputs: Inputs) -> Bound:
    x, weight = inputs["x"], inputs["weight"]
    return Bound(lambda: function(x, weight), {"x": x, "weight": weight})


def _targets(inputs: Inputs) -> Tensor:
    rows, features = inputs["x"].shape[0], inputs["weight"].shape[0]
    generator = torch.Generator().manual_seed(3)
    return torch.randint(features, (rows,), generator=generator).to(inputs["x"].device)


def _bind_cross_entropy(inputs: Inputs) -> Bound:
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip("torch.nn.functional.linear_cross_entropy is not in this torch")
    targets, options = _targets(inputs), torch.nn.LinearCrossEntropyOptions()
    return bind(lambda x, weight: F.linear_cross_entropy(x, weight, targets, options=options), inputs)


def cross_entropy_reference(inputs: Inputs, grad_out: Tensor | None) -> Inputs:
    x, weight = (inputs[name].detach().double().requires_grad_() for name in ("x", "weight"))
    out = F.cross_entropy(F.linear(x, weight), _targets(inputs))
    wanted = {"out": out.detach()}
    if grad_out is not None:
        grads = torch.autograd.grad(out, [x, weight], grad_out.double())
        wanted |= {"grad x": grads[0], "grad weight": grads[1]}
    return wanted


def plain(function: Function, device: torch.device) -> list[Contender]:
    return [
        Contender("eager", "eager", lambda inputs: bind(function, inputs)),
        Contender("compile", "compile", lambda inputs: bind(compiled(function, device), inputs)),
    ]


def cross_entropy() -> Contender:
    """Torch's own fused linear layer and loss on the same logits, in chunks: what its time and memory are."""
    return Contender(
        "linear_cross_entropy, chunked", "linear_cross_entropy", _bind_cross_entropy, cross_entropy_reference
    )
