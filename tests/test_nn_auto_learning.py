"""nn.AutoLearningLayer: its own steps by hand, when there is none, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import fusefeat
import pytest
import torch
from auto_learning_cases import LOSSES, RATE, decorrelate, make, parameters, stepped
from pool_cases import rand
from torch import Tensor, nn
from torch.nn import functional as F


@LOSSES
@pytest.mark.parametrize("lead", [(5,), (), (2, 4), (2, 1, 3)], ids=str)
def test_step_and_surrounding_gradients(loss: Any, lead: tuple[int, ...]) -> None:
    layer = make(loss)
    plain = copy.deepcopy(layer).eval()
    x = rand(*lead, 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    want = stepped(layer, x)
    out, truth = layer(x), plain(y)
    torch.testing.assert_close(parameters(layer), want)
    torch.testing.assert_close(truth, (2.0 * F.linear(y, *plain.net.parameters())).relu())
    assert torch.equal(out, truth)
    out.sin().sum().backward()
    truth.sin().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for mine, other in zip(layer.net.parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    torch.testing.assert_close(parameters(layer), want)


def test_published_scale() -> None:
    layer = fusefeat.AutoLearningLayer(3, 7, 0.01).eval()
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), torch.relu(7 * layer.net(x)))


class Probe(nn.Module):
    """A local loss with parameters of its own, which remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 1, dtype=torch.float64)

    def forward(self, weight: Tensor, activation: Tensor) -> Tensor:
        self.seen = weight.detach().clone(), activation.detach()
        return self.head(activation).mean()


def test_the_gradient_goes_to_the_layers_own_parameters_only() -> None:
    probe = Probe()
    layer = make(probe)
    x = rand(2, 4, 3).requires_grad_()
    before = layer.net.weight.detach().clone()
    out = layer(x)
    assert torch.equal(probe.seen[0], before) and torch.equal(probe.seen[1], out)
    assert not torch.equal(layer.net.weight, before)
    assert x.grad is None and probe.head.weight.grad is None and layer.net.weight.grad is None
    assert "loss.head.weight" in layer.state_dict()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_stay(frozen: str) -> None:
    layer = make(decorrelate)
    getattr(layer.net, frozen).requires_grad_(False)
    before, x = parameters(layer), rand(5, 3).requires_grad_()
    layer(x).sum().backward()
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters(layer), strict=True)]
    assert moved == ([False, True] if frozen == "weight" else [True, False])
    layer.net.requires_grad_(False)
    before = parameters(layer)
    layer(x)
    assert all(map(torch.equal, before, parameters(layer)))


def test_without_a_bias_and_with_a_computed_weight() -> None:
    layer = make(decorrelate)
    layer.net = nn.Linear(3, 6, bias=False, dtype=torch.float64)
    before = layer.net.weight.detach().clone()
    layer(rand(5, 3)).sum().backward()
    assert not torch.equal(layer.net.weight, before)
    layer.net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 6, dtype=torch.float64))
    before = [p.detach().clone() for p in layer.net.parameters()]
    layer(rand(5, 3)).sum().backward()
    changed = [not torch.equal(a, b) for a, b in zip(before, layer.net.parameters(), strict=True)]
    assert sum(changed) == 1 and not torch.equal(layer.net.bias, before[0])


def test_when_it_does_not_step() -> None:
    layer, x = make(), rand(5, 3)
    before = parameters(layer)

    def rate_zero() -> None:
        layer.learning_rate = 0
        layer(x).sum().backward()
        layer.learning_rate = RATE

    def inference() -> None:
        with torch.inference_mode():
            layer(x)

    def functional() -> None:
        values = dict(layer.named_parameters())
        torch.func.grad(lambda values: torch.func.functional_call(layer, values, (x,)).sum())(values)

    for name, call in {
        "eval": lambda: layer.eval()(x).sum().backward(),
        "rate": lambda: layer.train() and rate_zero(),
        "inference": inference,
        "grad": lambda: torch.func.grad(lambda x: layer(x).sum())(x),
        "functional": functional,
        "vmap": lambda: torch.func.vmap(layer)(x),
        "no rows": lambda: layer(x[:0]).sum().backward(),
    }.items():
        call()
        assert all(map(torch.equal, before, parameters(layer))), name
    with torch.no_grad():
        layer(x)
    assert not torch.equal(before[0], layer.net.weight)


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    x = rand(5, 3)
    x[0, 1] = float("nan")
    layer = make()
    before = parameters(layer)
    assert layer(x)[0].isnan().any()
    assert all(map(torch.equal, before, parameters(layer)))
    layer = make(lambda weight, activation: weight.sum() / 0)
    before = parameters(layer)
    layer(x.nan_to_num())
    assert all(map(torch.equal, before, parameters(layer)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@LOSSES
def test_dtypes(dtype: torch.dtype, loss: Any) -> None:
    layer = make(loss)
    x = rand(64, 3)
    want = stepped(layer, x)
    layer.to(dtype)
    out = layer(x.to(dtype))
    out.sum().backward()
    assert out.dtype == layer.net.weight.dtype == layer.net.weight.grad.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close([p.double() for p in parameters(layer)], want, rtol=tolerance, atol=tolerance)


@LOSSES
def test_autocast(loss: Any) -> None:
    layer, x = make(loss, dtype=torch.float32), torch.randn(64, 3)
    exact = copy.deepcopy(layer).double()
    want = stepped(exact, x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stale = layer.eval()(x)  # autocast now holds the weights of before the step
        out = layer.train()(x.bfloat16())
        fresh = layer.eval()(x)
        torch.testing.assert_close([p.double() for p in parameters(layer)], want, rtol=0.03, atol=0.03)
        assert out.dtype == torch.bfloat16 and torch.equal(out, stale) and not torch.equal(fresh, stale)
        assert torch.equal(fresh, (2.0 * F.linear(x, layer.net.weight.clone(), layer.net.bias)).relu())
    out.sum().backward()
    assert layer.net.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("error", "match", "loss"),
    [
        (TypeError, "result of loss must be a torch", lambda w, a: 1.0),
        (TypeError, "result of loss must be floating-point", lambda w, a: a.argmax()),
        (ValueError, "result of loss must be a scalar", lambda w, a: a.mean(0)),
        (ValueError, "result of loss must be a scalar", lambda w, a: a.mean().reshape(1)),
        (ValueError, "loss must depend on the weight or the activation", lambda w, a: a.detach().mean()),
    ],
)
def test_bad_losses(error: type[Exception], match: str, loss: Any) -> None:
    layer = make(loss)
    before = parameters(layer)
    with pytest.raises(error, match=f"AutoLearningLayer: .*{match}"):
        layer(rand(5, 3))
    assert all(map(torch.equal, before, parameters(layer)))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input_size must be an int", {"input_size": 3.0}),
        (ValueError, "input_size must be at least 1", {"input_size": 0}),
        (TypeError, "hidden_size must be an int", {"hidden_size": "4"}),
        (ValueError, "hidden_size must be at least 1", {"hidden_size": -4}),
        (TypeError, "learning_rate must be a real number", {"learning_rate": None}),
        (ValueError, "learning_rate must not be negative", {"learning_rate": -0.1}),
        (ValueError, "learning_rate must be finite", {"learning_rate": float("nan")}),
        (TypeError, "loss must be callable or None", {"loss": "mse"}),
        (TypeError, "scale must be a real number", {"scale": True}),
        (ValueError, "scale must be greater than 0", {"scale": 0.0}),
        (TypeError, "process_group must be", {"process_group": 0}),
    ],
)
def test_bad_arguments(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"AutoLearningLayer: {match}"):
        fusefeat.AutoLearningLayer(**{"input_size": 3, "hidden_size": 4, "learning_rate": 0.1, **arguments})


def test_bad_inputs() -> None:
    layer = make()
    for error, match, bad in (
        (TypeError, "a torch.Tensor", [1.0, 2.0, 3.0]),
        (TypeError, "float16, bfloat16", torch.ones(2, 3, dtype=torch.int32)),
        (TypeError, "torch.float64 as the parameters are", torch.randn(2, 3)),
        (ValueError, r"\[...,input_size\]", torch.tensor(1.0, dtype=torch.float64)),
        (ValueError, "input_size = 3 columns", rand(2, 4)),
        (ValueError, "on the weight's device", rand(2, 3).to("meta")),
    ):
        with pytest.raises(error, match=f"AutoLearningLayer: x must .*{match}"):
            layer(bad)
