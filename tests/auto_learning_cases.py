"""Layers, losses and the step by hand that the tests of nn.AutoLearningLayer share."""

from __future__ import annotations

from typing import Any

import fusefeat
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

RATE = 0.1


def decorrelate(weight: Tensor, activation: Tensor) -> Tensor:
    return activation.square().mean() + 0.1 * weight.abs().sum()


LOSSES = pytest.mark.parametrize("loss", [None, decorrelate], ids=["default", "own"])


def make(loss: Any = None, **keywords: Any) -> fusefeat.AutoLearningLayer:
    torch.manual_seed(0)
    arguments = {"scale": 2.0, "dtype": torch.float64, **keywords}
    return fusefeat.AutoLearningLayer(3, 6, RATE, loss=loss, **arguments)


def local_loss(layer: fusefeat.AutoLearningLayer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The local loss written out."""
    z = F.linear(x.reshape(-1, 3), weight, bias)
    if layer.loss is not None:
        return layer.loss(weight, (layer.scale * z).relu())
    p = z.softmax(1)
    used = p.mean(0)
    penalty = -(p * p.log()).sum(1).mean() + (used * (used * len(used)).log()).sum()
    return penalty + torch.where(z > 1, z, 1.0).mean()


def stepped(layer: fusefeat.AutoLearningLayer, x: Tensor) -> list[Tensor]:
    """Weight and bias after one local step."""
    leaves = [p.detach().clone().requires_grad_() for p in layer.net.parameters()]
    grads = torch.autograd.grad(local_loss(layer, x.detach(), *leaves), leaves)
    return [(leaf - RATE * grad).detach() for leaf, grad in zip(leaves, grads, strict=True)]


def parameters(layer: fusefeat.AutoLearningLayer) -> list[Tensor]:
    return [p.detach().clone() for p in layer.net.parameters()]


def body(layer: fusefeat.AutoLearningLayer, x: Tensor) -> Tensor:
    """The layer twice, between others."""
    mixed = torch.tanh(layer(torch.sin(x)))
    return layer(mixed[:, :3] - mixed[:, 3:]).square()
