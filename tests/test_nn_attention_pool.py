"""nn.AttentionPool against the published layer written out."""

from __future__ import annotations

import copy
import pickle

import fusefeat
import pool_cases
import pytest
import torch
from torch import Tensor, nn


class Published(nn.Module):
    """linear_in, linear_out, softmax over tokens, weighted sum of the hidden sequence."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(input_size, hidden_size)
        self.linear_out = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q = self.linear_in(x)
        scores = self.linear_out(q).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, 1)
        return (weights.unsqueeze(-1) * q).sum(1), weights


def pair(dtype: torch.dtype = torch.float64) -> tuple[fusefeat.AttentionPool, Published]:
    torch.manual_seed(0)
    published = Published(6, 5).to(dtype)
    layer = fusefeat.AttentionPool(6, 5, dtype=dtype)
    assert layer.load_state_dict(published.state_dict()).missing_keys == []
    return layer, published


def test_the_alias() -> None:
    assert fusefeat.Attention is fusefeat.AttentionPool is fusefeat.nn.Attention


@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_every_gradient(masked: bool) -> None:
    layer, published = pair()
    mask = None
    if masked:
        mask = torch.rand(3, 9) > 0.4
        mask[:, 0] = True
    x, y = (pool_cases.rand(3, 9, 6) for _ in range(2))
    y = x.clone().requires_grad_()
    x.requires_grad_()
    out, weights = layer(x, mask, return_weights=True)
    want, want_weights = published(y, mask)
    torch.testing.assert_close((out, weights), (want, want_weights))
    (out.sin().sum() + weights.square().sum()).backward()
    (want.sin().sum() + want_weights.square().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    for name, parameter in published.named_parameters():
        mine = layer.get_parameter(name).grad
        assert mine is not None, name
        torch.testing.assert_close(mine, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(layer.linear_out.bias.grad, torch.zeros(1, dtype=torch.float64))


def test_packed_and_empty_bags() -> None:
    layer, published = pair()
    x = pool_cases.rand(10, 6)
    out, weights = layer(x, cu_seqlens=torch.tensor([0, 4, 4, 10]), return_weights=True)
    assert torch.equal(out[1], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(out[0], published(x[None, :4])[0][0])
    torch.testing.assert_close(out[2], published(x[None, 4:])[0][0])
    assert weights.shape == (10,)
    mask = torch.tensor([[True] * 5, [False] * 5])
    padded = layer(x.view(2, 5, 6), mask)
    assert torch.equal(padded[1], torch.zeros(5, dtype=torch.float64))


def test_a_bias_of_any_value_cancels() -> None:
    layer, _ = pair()
    x = pool_cases.rand(2, 3, 6)
    want = layer(x)
    with torch.no_grad():
        layer.linear_out.bias.fill_(float("inf"))
    torch.testing.assert_close(layer(x), want)


def test_composition_under_transforms_and_on_the_reference() -> None:
    """Where the layer is no single step of autograd, it gives the same."""
    layer, _ = pair()
    x, cu_seqlens = pool_cases.rand(10, 6), torch.tensor([0, 4, 4, 10])
    slow = copy.deepcopy(layer)
    slow.backend = "reference"
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,), {"cu_seqlens": cu_seqlens}).sin().sum()

    assert torch.equal(slow(x, cu_seqlens=cu_seqlens)[1], torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(slow(x, cu_seqlens=cu_seqlens), layer(x, cu_seqlens=cu_seqlens))
    loss(parameters).backward()
    slow(x, cu_seqlens=cu_seqlens).sin().sum().backward()
    transformed = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    for name, parameter in parameters.items():
        torch.testing.assert_close(transformed[name], parameter.grad)
        torch.testing.assert_close(slow.get_parameter(name).grad, parameter.grad)
    with torch.no_grad():
        slow.linear_out.bias.fill_(float("inf"))
    torch.testing.assert_close(slow(x, cu_seqlens=cu_seqlens), layer(x, cu_seqlens=cu_seqlens))


def test_gradcheck() -> None:
    layer, _ = pair()
    x = pool_cases.rand(2, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_relative_to_the_published_layers_own(dtype: torch.dtype) -> None:
    """Outputs within 2x and gradients within 4x of what the written-out layer makes in the same type."""
    torch.manual_seed(0)
    published = Published(64, 32)
    x, grad = torch.randn(4, 200, 64), torch.randn(4, 32)

    def results(module: nn.Module, kind: torch.dtype) -> list[Tensor]:
        module = copy.deepcopy(module).to(dtype).to(kind)
        leaf = x.to(dtype).to(kind).requires_grad_()
        out = module(leaf)
        out = out[0] if isinstance(out, tuple) else out
        names = ["linear_in.weight", "linear_in.bias", "linear_out.weight"]
        leaves = [leaf, *(module.get_parameter(name) for name in names)]
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype).to(kind))]

    layer = fusefeat.AttentionPool(64, 32)
    layer.load_state_dict(published.state_dict())
    exact, plain, ours = results(published, torch.float64), results(published, dtype), results(layer, dtype)
    floor = 1e-5 if dtype == torch.float32 else 0.0
    for i, (mine, eager, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        error, own = pool_cases.relative_rms(mine, truth), pool_cases.relative_rms(eager, truth)
        assert error <= max((4 if i else 2) * own, floor), (i, error, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bitwise_equal_over_threads(dtype: torch.dtype) -> None:
    """A library's matrix products are not."""
    torch.manual_seed(0)
    layer = fusefeat.AttentionPool(48, 64, backend="cpu").to(dtype)
    x, grad = torch.randn(5, 300, 48, dtype=dtype, requires_grad=True), torch.randn(5, 64, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            out = layer(x)
            results.append([out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_half_inputs_with_float_parameters_and_autocast() -> None:
    layer, published = pair(torch.float32)
    x = torch.randn(2, 7, 6)
    want = published(x)[0]
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        loss = layer(x.bfloat16()).sum()
    assert out.dtype == torch.float32 and torch.equal(out, layer(x))
    loss.backward()
    assert layer.linear_in.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("wrap", ["eager", "compile"])
def test_autocast_reaches_no_gradient(wrap: str) -> None:
    layer, _ = pair(torch.float32)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if wrap == "compile" else layer
    variables = [torch.randn(2, 7, 6, requires_grad=True), *layer.parameters()]
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = call(variables[0]).square().sum()
            firsts = torch.autograd.grad(loss, variables, create_graph=wrap == "eager")
            grads.append(torch.autograd.grad(firsts[0].square().sum(), variables) if wrap == "eager" else firsts)
    for cast, plain in zip(*grads, strict=True):
        assert torch.equal(cast, plain)


def test_autocast_reaches_no_gradient_of_a_transform() -> None:
    layer, _ = pair(torch.float32)
    x, parameters = torch.randn(3, 2, 7, 6), dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    def second(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.grad(loss, 1)(parameters, x).square().sum()

    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads = [torch.func.vmap(torch.func.grad(f), (None, 0))(parameters, x) for f in (loss, second)]
        found.append([value for grad in grads for value in grad.values()])
    for cast, plain in zip(*found, strict=True):
        assert torch.equal(cast, plain)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_that_comes_in_for_an_empty_bag_goes_nowhere(backend: str) -> None:
    layer = fusefeat.AttentionPool(6, 5, backend=backend)
    x = torch.randn(5, 6, requires_grad=True)
    out = layer(x, cu_seqlens=torch.tensor([0, 3, 3, 5]))
    (out / out.norm(dim=1, keepdim=True))[[0, 2]].sum().backward()  # 0 / 0 for the bag between
    for variable in (x, *layer.parameters()):
        assert not variable.grad.isnan().any()


def test_batched_gradients_through_the_weights_alone() -> None:
    layer, _ = pair()
    _, weights = layer(pool_cases.rand(2, 4, 6), return_weights=True)
    parameters, incoming = list(layer.parameters()), pool_cases.rand(3, 2, 4)
    batched = torch.autograd.grad(weights, parameters, incoming, retain_graph=True, is_grads_batched=True)
    for index, grad in enumerate(incoming):
        single = torch.autograd.grad(weights, parameters, grad, retain_graph=True)
        torch.testing.assert_close(single, tuple(parameter[index] for parameter in batched))


def test_copies_and_compile() -> None:
    layer, _ = pair()
    x = pool_cases.rand(2, 4, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x), layer(x))
    fast(x).sum().backward()
    assert layer.linear_out.bias.grad is not None
