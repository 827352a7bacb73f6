"""nn.AutoLearningLayer: its own steps by hand, and a surrounding graph that must not notice them."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import fusefeat
import pytest
import torch
from pool_cases import rand
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


@LOSSES
def test_two_forwards_before_one_backward(loss: Any) -> None:
    layer = make(loss)
    x, y = rand(5, 3).requires_grad_(), rand(4, 3).requires_grad_()
    first, second = copy.deepcopy(layer).eval(), copy.deepcopy(layer).eval()
    out = layer(x).square().sum()
    second.load_state_dict(layer.state_dict())
    out = out + layer(y).square().sum()
    grads = torch.autograd.grad(out, [x, y, layer.net.weight])
    want_x = torch.autograd.grad(first(x).square().sum(), [x, first.net.weight])
    want_y = torch.autograd.grad(second(y).square().sum(), [y, second.net.weight])
    torch.testing.assert_close(grads, (want_x[0], want_y[0], want_x[1] + want_y[1]))


def test_gradcheck_with_a_step_of_zero() -> None:
    layer = make(lambda weight, activation: 0.0 * weight.sum())
    x = rand(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_an_optimiser_may_own_the_parameters_too() -> None:
    layer = make(decorrelate)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    for _ in range(3):
        x = rand(5, 3)
        plain = copy.deepcopy(layer).eval()
        grads = torch.autograd.grad(plain(x).square().sum(), list(plain.net.parameters()))
        want = [p - 0.05 * g for p, g in zip(stepped(layer, x), grads, strict=True)]
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(parameters(layer), want)


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


def body(layer: fusefeat.AutoLearningLayer, x: Tensor) -> Tensor:
    """The layer twice, between others."""
    mixed = torch.tanh(layer(torch.sin(x)))
    return layer(mixed[:, :3] - mixed[:, 3:]).square()


@LOSSES
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("same", [False, True], ids=["other input", "same input"])
def test_checkpointing_neither_steps_again_nor_sees_other_weights(loss: Any, reentrant: bool, same: bool) -> None:
    layer = make(loss)
    plain = copy.deepcopy(layer)
    inputs = [rand(5, 3)] * 2 if same else [rand(5, 3), rand(5, 3)]
    outs, grads = [], []
    for model, wrap in ((layer, True), (plain, False)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = [checkpoint(body, model, x, use_reentrant=reentrant) if wrap else body(model, x) for x in leaves]
        after = parameters(model)
        torch.stack(results).sum().backward()
        assert all(map(torch.equal, after, parameters(model)))
        outs.append([r.detach() for r in results] + after)
        grads.append([leaf.grad for leaf in leaves] + [p.grad for p in model.net.parameters()])
    assert all(map(torch.equal, *outs))
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)
    assert all(grad.any() for grad in grads[1])


def test_checkpointing_through_a_second_backward_and_beside_a_plain_forward() -> None:
    layer = make(decorrelate)
    plain = copy.deepcopy(layer)
    x, other = rand(5, 3).requires_grad_(), rand(5, 3).requires_grad_()
    results = []
    for model, wrap in ((layer, True), (plain, False)):
        first = body(model, other).sum()
        second = (checkpoint(body, model, x, use_reentrant=False) if wrap else body(model, x)).sum()
        with torch.no_grad():
            model(x)
        out = first + second
        for _ in range(2):
            results.append(torch.autograd.grad(out, [x, other, model.net.weight], retain_graph=True))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-13, atol=1e-13)


def test_recomputations_are_told_apart_despite_nan() -> None:
    layer = make(lambda weight, activation: weight.square().sum())
    plain = copy.deepcopy(layer)
    x = rand(5, 3)
    x[0, 0] = float("nan")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for out in (checkpoint(body, layer, leaves[0], use_reentrant=False), body(plain, leaves[1])):
        out[1:].sum().backward()
    grads = [leaf.grad[1:] for leaf in leaves]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)
    assert grads[0].isfinite().all() and grads[0].any()


def test_what_a_forward_kept_goes_with_its_graph() -> None:
    layer, x = make(), rand(5, 3)
    gc.disable()
    try:
        out = layer(x).sum()
        (kept,) = layer._record._with_graph
        assert kept() is not None
        out.backward()
        del out
        assert kept() is None
    finally:
        gc.enable()
    with torch.no_grad():
        for _ in range(9):
            layer(x)
    assert len(layer._record._without) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
def test_copies_between_forward_and_backward(copied: Callable[[Any], Any]) -> None:
    layer, x = make(decorrelate), rand(5, 3).requires_grad_()
    out = layer(x * 2)
    twin = copied(layer)
    assert not twin._record._with_graph
    out.sum().backward()
    layer(x)
    twin(x)
    assert all(map(torch.equal, parameters(layer), parameters(twin)))
    assert list(layer.state_dict()) == ["net.weight", "net.bias"]
    other = make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), twin.eval()(x))


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


@pytest.mark.parametrize("hooks", [torch.autograd.graph.save_on_cpu, contextlib.nullcontext])
def test_hooks_on_saved_tensors_see_the_surrounding_graph_only(hooks: Any) -> None:
    seen: list[Tensor] = []
    layer, x = make(), rand(5, 3).requires_grad_()
    with hooks(), torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        out = layer(x)
        count = len(seen)
        layer.eval()(x)
    out.sum().backward()
    assert len(seen) == 2 * count


@LOSSES
def test_compiled(loss: Any) -> None:
    layer = make(loss)
    plain = copy.deepcopy(layer)
    torch._dynamo.reset()
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for i in range(3):
        layer.learning_rate = plain.learning_rate = RATE / (1 + i)
        x = rand(5, 3).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, want = fast(x), plain(y)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(parameters(layer), parameters(plain))
        out.square().sum().backward()
        want.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        torch.testing.assert_close(layer.net.weight.grad, plain.net.weight.grad)
    before = parameters(layer)
    layer.eval()
    torch.testing.assert_close(fast(x), plain.eval()(x))
    assert all(map(torch.equal, before, parameters(layer)))
    layer.train()
    out = checkpoint(fast, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="a compiled layer cannot be recomputed"):
        out.sum().backward()


def test_meta_and_fake() -> None:
    assert make(device="meta")(rand(4, 3).to("meta")).shape == (4, 6)
    with FakeTensorMode():
        assert make()(rand(4, 3)).shape == (4, 6)


def test_checkpointed_in_a_compiled_model_when_left_out_of_it() -> None:
    layer = make(decorrelate)
    plain = copy.deepcopy(layer)
    left_out = torch.compiler.disable(layer)
    torch._dynamo.reset()
    model = torch.compile(lambda x: checkpoint(body, left_out, x, use_reentrant=False), backend="aot_eager")
    x = rand(5, 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    model(x).sum().backward()
    body(plain, y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(parameters(layer), parameters(plain))


def test_the_compiled_copy_is_a_sound_operator() -> None:
    torch.library.opcheck(torch.ops.fusefeat.copy_before_step.default, (rand(3, 2).requires_grad_(),))


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
