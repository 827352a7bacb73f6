"""nn.ShareableLoss and nn.ShareableReg: the published return values, the scalars, torch's rules for lazy modules."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import fusefeat
import pytest
import torch
from pool_cases import rand
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import UninitializedParameter

BOTH = pytest.mark.parametrize("kind", [fusefeat.ShareableLoss, fusefeat.ShareableReg])
Kind = Callable[..., Any]
MARGIN = 0.8


def logits(module: Any, x: Tensor) -> Tensor:
    z = x @ module.weight.t()
    return MARGIN * (z if module.bias is None else z + module.bias)


def matrix(module: Any, x: Tensor) -> Tensor:
    z = logits(module, x)
    return z.softmax(1) if isinstance(module, fusefeat.ShareableLoss) else z.relu().clamp(min=MARGIN)


def scalar(module: Any, x: Tensor) -> Tensor:
    """The mean, by hand."""
    p = matrix(module, x)
    if isinstance(module, fusefeat.ShareableReg):
        return p.mean()
    used = p.mean(0)
    return -(p * p.log()).sum(1).mean() + (used * (used * len(used)).log()).sum()


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_context", [False, True])
def test_values_and_gradients(kind: Kind, bias: bool, with_context: bool) -> None:
    module = kind(7, MARGIN, 5, bias, dtype=torch.float64)
    x, context = rand(6, 5).requires_grad_(), rand(3, 5).requires_grad_() if with_context else None
    rows = x if context is None else torch.cat([context, x])
    leaves = [x, *module.parameters()] + ([] if context is None else [context])
    for reduction, want in (
        ("none", matrix(module, rows)),
        ("mean", scalar(module, rows)),
        ("sum", scalar(module, rows) * (len(rows) * (7 if kind is fusefeat.ShareableReg else 1))),
    ):
        module.reduction = reduction
        got = module(x, context)
        torch.testing.assert_close(got, want)
        incoming = torch.randn_like(got)
        for mine, truth in zip(
            torch.autograd.grad(got, leaves, incoming), torch.autograd.grad(want, leaves, incoming), strict=True
        ):
            torch.testing.assert_close(mine, truth)


def test_the_published_matrix_teaches_nothing_and_the_penalty_does() -> None:
    module = fusefeat.ShareableLoss(4, in_features=3, reduction="none", dtype=torch.float64)
    published = module(rand(9, 3)).mean()
    torch.testing.assert_close(published, torch.tensor(0.25, dtype=torch.float64))
    (grad,) = torch.autograd.grad(published, module.weight)
    assert grad.abs().max() < 1e-15
    module.reduction = "mean"
    (grad,) = torch.autograd.grad(module(rand(9, 3)), module.weight)
    assert grad.abs().max() > 1e-3


@BOTH
def test_gradcheck(kind: Kind) -> None:
    module = kind(5, MARGIN, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(module, (rand(4, 3).requires_grad_(), rand(2, 3).requires_grad_()))


@BOTH
def test_no_rows(kind: Kind) -> None:
    module = kind(5, in_features=3, reduction="sum")
    loss = module(torch.zeros(0, 3))
    loss.backward()
    assert loss == 0 and not module.weight.grad.any()


@BOTH
def test_initialised_as_linear_is(kind: Kind) -> None:
    torch.manual_seed(0)
    module = kind(400, in_features=25, bias=True)
    for parameter in module.parameters():
        assert 0.19 < parameter.abs().max() <= 1 / 5
        assert abs(parameter.std() - 0.2 / math.sqrt(3)) < 0.01


@BOTH
def test_lazy_until_the_first_input(kind: Kind) -> None:
    module = kind(4, MARGIN, bias=True)
    assert isinstance(module.weight, UninitializedParameter) and isinstance(module.bias, UninitializedParameter)
    assert module.in_features is None and "in_features=None" in repr(module)
    module.to(torch.float64)
    x = rand(5, 3)
    loss = module(x)
    assert module.weight.shape == (4, 3) and module.bias.shape == (4,) and module.weight.dtype == torch.float64
    assert module.in_features == 3 and not isinstance(module.weight, UninitializedParameter)
    torch.testing.assert_close(loss, scalar(module, x))
    before = module.weight.clone()
    assert torch.equal(module(x), loss) and torch.equal(module.weight, before)
    with pytest.raises(ValueError, match="input must have in_features = 3 columns"):
        module(rand(5, 4))


@BOTH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
def test_copies_before_and_after_the_first_input(kind: Kind, copied: Callable[[Any], Any]) -> None:
    x = torch.randn(5, 3)
    module = kind(4, bias=True)
    twin = copied(module)
    twin(x)
    assert isinstance(module.weight, UninitializedParameter) and twin.weight.shape == (4, 3)
    module(x)
    twin = copied(module)
    assert torch.equal(twin(x), module(x)) and twin.weight is not module.weight


@BOTH
def test_state_dicts_between_all_states(kind: Kind) -> None:
    x = torch.randn(5, 3)
    known, lazy = kind(4, in_features=3, bias=True), kind(4, bias=True)
    lazy.load_state_dict(lazy.state_dict())
    lazy.load_state_dict(kind(4, bias=True).state_dict())
    assert lazy.in_features is None
    with pytest.raises(RuntimeError, match="uninitialized"):
        known.load_state_dict(lazy.state_dict())
    with pytest.raises(RuntimeError, match="num_features = 9"):
        kind(9, bias=True).load_state_dict(known.state_dict())
    lazy.load_state_dict(known.state_dict())
    assert lazy.in_features == 3 and torch.equal(lazy(x), known(x))
    kind(4, in_features=3, bias=True).load_state_dict(lazy.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        kind(4, in_features=2, bias=True).load_state_dict(known.state_dict())
    model = nn.Sequential(kind(4, bias=True))
    model.load_state_dict({f"0.{key}": value for key, value in known.state_dict().items()})
    assert torch.equal(model(x), known(x))


@BOTH
def test_the_first_input_is_checked_before_anything_is_made(kind: Kind) -> None:
    module = kind(4)
    for bad in (torch.randn(3), torch.randn(2, 3, 4), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="input must be 2-D"):
            module(bad)
    with pytest.raises(TypeError, match="input must be float16"):
        module(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="input must be a torch"):
        module([[1.0]])
    assert isinstance(module.weight, UninitializedParameter)
    with pytest.raises(RuntimeError, match="uninitialized"):
        module._replicate_for_data_parallel()
    module(torch.randn(3, 2))
    module._replicate_for_data_parallel()


@BOTH
def test_half_types_and_autocast(kind: Kind) -> None:
    module = kind(6, MARGIN, 4)
    x = torch.randn(8, 4)
    exact = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for rows in (x, x.bfloat16()):
            loss = module(rows)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.03)
    loss.backward()
    assert module.weight.grad.dtype == torch.float32
    half = copy.deepcopy(module).to(torch.bfloat16)
    half.reduction = "none"
    assert half(x.bfloat16()).dtype == torch.bfloat16


@BOTH
def test_compiled_from_the_first_input_on(kind: Kind) -> None:
    module = kind(4, bias=True)
    x, context = torch.randn(5, 3), torch.randn(2, 3)
    fast = torch.compile(module, backend="aot_eager")
    loss = fast(x, context)
    torch.testing.assert_close(loss, module(x, context))
    loss.backward()
    assert module.weight.grad is not None
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x, context), loss)


@BOTH
def test_meta_fake_and_export(kind: Kind) -> None:
    lazy = kind(4, bias=True, device="meta")
    assert lazy(torch.randn(5, 3, device="meta")).shape == () and lazy.weight.is_meta
    with FakeTensorMode():
        assert kind(4, in_features=3)(torch.randn(5, 3)).shape == ()
    module, x = kind(4, in_features=3), torch.randn(5, 3)
    torch.testing.assert_close(torch.export.export(module, (x, x)).module()(x, x), module(x, x))


@BOTH
@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "num_features must be an int", {"num_features": 4.0}),
        (TypeError, "num_features must be an int", {"num_features": True}),
        (ValueError, "num_features must be at least 1", {"num_features": 0}),
        (TypeError, "margin must be a real number", {"margin": "1"}),
        (ValueError, "margin must be greater than 0", {"margin": 0}),
        (ValueError, "margin must be finite", {"margin": float("nan")}),
        (TypeError, "in_features must be an int", {"in_features": 2.5}),
        (ValueError, "in_features must be at least 1", {"in_features": 0}),
        (TypeError, "bias must be a bool", {"bias": 1}),
        (TypeError, "reduction must be a string", {"reduction": None}),
        (ValueError, "reduction must be 'none', 'mean' or 'sum'", {"reduction": "max"}),
    ],
)
def test_bad_arguments(kind: Kind, error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"{kind.__name__}: {match}"):
        kind(**{"num_features": 4, **arguments})


def test_bad_process_group() -> None:
    with pytest.raises(TypeError, match="ShareableLoss: process_group must be"):
        fusefeat.ShareableLoss(4, process_group="world")


@BOTH
def test_bad_rows(kind: Kind) -> None:
    module, x = kind(4, in_features=3), torch.randn(5, 3)
    for name, call in (("input", lambda bad: module(bad)), ("context", lambda bad: module(x, bad))):
        for error, match, bad in (
            (TypeError, "a torch.Tensor", 3.0),
            (TypeError, "float16, bfloat16", torch.ones(2, 3, dtype=torch.int32)),
            (TypeError, "torch.float32 as the parameters are", x.double()),
            (ValueError, r"2-D \[N,in_features\]", x[0]),
            (ValueError, "in_features = 3 columns", torch.randn(5, 4)),
            (ValueError, "on the weight's device", x.to("meta")),
        ):
            with pytest.raises(error, match=f"{kind.__name__}: {name} must .*{match}"):
                call(bad)
