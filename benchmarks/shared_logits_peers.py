"""The functions on shared logits as they are written without fusefeat: x [N,D], weight [F,D], margin 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import Bound, Contender, Inputs, Skip
from .peers import compiled, optional

Function = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

MARGIN = 1.0

_TRITON_DEVICES = ("cuda",)


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


def _liger() -> Loss:
    losses = optional("liger_kernel.transformers", "liger-kernel")
    loss = losses.LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, targets: loss(weight, x, targets)


def _cut() -> Loss:
    found: Loss = optional("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return found


def _bind_triton(load: Callable[[], Loss], inputs: Inputs) -> Bound:
    if inputs["x"].device.type not in _TRITON_DEVICES:
        raise Skip("its kernels run on a GPU only")
    loss, targets = load(), _targets(inputs)
    return bind(lambda x, weight: loss(x, weight, targets), inputs)


def cross_entropy_reference(inputs: Inputs, grad_out: Tensor | None) -> Inputs:
    """In float64, a few rows at a time."""
    weight, targets = inputs["weight"].detach().double().requires_grad_(), _targets(inputs)
    rows, at_once = targets.shape[0], max(1, 2**23 // weight.shape[0])
    out, grads_x, grad_weight = weight.new_zeros(()), [], torch.zeros_like(weight)
    for x, chosen in zip(inputs["x"].detach().split(at_once), targets.split(at_once), strict=True):
        leaf = x.double().requires_grad_()
        loss = F.cross_entropy(F.linear(leaf, weight), chosen, reduction="sum") / rows
        out += loss.detach()
        if grad_out is not None:
            grad_x, grad = torch.autograd.grad(loss, [leaf, weight], grad_out.double())
            grads_x.append(grad_x)
            grad_weight += grad
    return {"out": out} if grad_out is None else {"out": out, "grad x": torch.cat(grads_x), "grad weight": grad_weight}


def plain(function: Function, device: torch.device) -> list[Contender]:
    return [
        Contender("eager", "eager", lambda inputs: bind(function, inputs)),
        Contender("compile", "compile", lambda inputs: bind(compiled(function, device), inputs)),
    ]


def cross_entropies() -> list[Contender]:
    """Fused linear layers and losses on the same logits, which do not keep all of them either: not the same
    computation, but what its time and memory are."""

    def contender(name: str, peer: str, bind: Callable[[Inputs], Bound]) -> Contender:
        return Contender(name, peer, bind, cross_entropy_reference)

    return [
        contender("linear_cross_entropy, chunked", "linear_cross_entropy", _bind_cross_entropy),
        contender("Liger-Kernel cross entropy", "liger", partial(_bind_triton, _liger)),
        contender("cut-cross-entropy", "cce", partial(_bind_triton, _cut)),
    ]
