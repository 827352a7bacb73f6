"""nn.AutoLearningLayer in a graph that must not notice its steps: recomputed, copied, hooked, compiled."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from auto_learning_cases import LOSSES, RATE, body, decorrelate, make, parameters, stepped
from pool_cases import rand
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint


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


@pytest.mark.parametrize("regions", [1, 2])
def test_the_same_input_twice_in_checkpoints(regions: int) -> None:
    """In one region, and in two that are recomputed in the order in which they ran."""
    layer = make(decorrelate)
    plain = copy.deepcopy(layer)
    x = rand(5, 3)
    grads = []
    for model, wrap in ((layer, True), (plain, False)):
        leaf = x.clone().requires_grad_()
        functions = [lambda t, m=model: body(m, t).square(), lambda t, m=model: 2 * body(m, t).pow(3)]
        if regions == 1:
            functions = [lambda t, both=tuple(functions): both[0](t) + both[1](t)]
        outs = [checkpoint(f, leaf, use_reentrant=False) if wrap else f(leaf) for f in functions]
        for out in outs:
            out.sum().backward()
        grads.append([leaf.grad, *(p.grad for p in model.net.parameters())])
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
