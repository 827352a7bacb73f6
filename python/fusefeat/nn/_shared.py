"""What the modules on shared features have in common: checks of their rows, and a weight that may come later."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import Parameter, UninitializedParameter, is_lazy

from .. import checks
from ..functional._shared import autocast_enabled

REDUCTIONS = ("none", "mean", "sum")


def positive_number(module: str, name: str, value: Any) -> float:
    number = checks.finite_number(module, name, value)
    if number <= 0:
        raise ValueError(f"{module}: {name} must be greater than 0, got {value}")
    return number


def check_rows(module: str, name: str, value: Any, parameter: Tensor, width: str, leading: bool = False) -> None:
    """[N,D] (or [...,D] with ``leading``) rows that go with a parameter [F,D]; ``width`` is D's name."""
    checks.floating(module, name, value)
    if value.dim() != 2 if not leading else value.dim() < 1:
        want = f"[...,{width}]" if leading else f"2-D [N,{width}]"
        raise ValueError(f"{module}: {name} must be {want}, got {checks.describe(value)}")
    if value.shape[-1] != parameter.shape[1]:
        raise ValueError(
            f"{module}: {name} must have {width} = {parameter.shape[1]} columns, got {checks.describe(value)}"
        )
    checks.same_device(module, name, value, "the weight", parameter)
    mixed = autocast_enabled(value.device.type) and torch.float64 not in (value.dtype, parameter.dtype)
    if value.dtype != parameter.dtype and not mixed:
        raise TypeError(
            f"{module}: {name} must be {parameter.dtype} as the parameters are, got {checks.describe(value)}"
        )


def deepcopy_sharing_group(module: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that talks to the same process group: groups cannot be copied."""
    memo[id(module.process_group)] = module.process_group
    twin = module.__class__.__new__(module.__class__)
    memo[id(module)] = twin
    twin.__setstate__(copy.deepcopy(module.__dict__, memo))
    return twin


class SharedFeatures(LazyModuleMixin, nn.Module):
    """A weight [num_features,in_features], and a bias on demand, that rows are multiplied with.

    With ``in_features=None`` the parameters follow torch's rules for lazy modules: they are
    :class:`torch.nn.UninitializedParameter` until the first call, or until a state_dict with values is loaded.
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(
        self,
        num_features: int,
        margin: float,
        in_features: int | None,
        bias: bool,
        reduction: str,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        name = type(self).__name__
        checks.positive_int(name, "num_features", num_features)
        positive_number(name, "margin", margin)
        if in_features is not None:
            checks.positive_int(name, "in_features", in_features)
        if not isinstance(bias, bool):
            raise TypeError(f"{name}: bias must be a bool, got {checks.describe(bias)}")
        if not isinstance(reduction, str):
            raise TypeError(f"{name}: reduction must be a string, got {checks.describe(reduction)}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"{name}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
        super().__init__()
        self.num_features = num_features
        self.margin = margin
        self.reduction = reduction
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if in_features is None:
            self.weight = cast(Parameter, UninitializedParameter(**factory))
            self.bias = cast(Parameter, UninitializedParameter(**factory)) if bias else None
        else:
            self.weight = Parameter(torch.empty(num_features, in_features, **factory))
            self.bias = Parameter(torch.empty(num_features, **factory)) if bias else None
            self.reset_parameters()
            self._initialize_hook.remove()
            self._load_hook.remove()
            del self._initialize_hook, self._load_hook

    @property
    def in_features(self) -> int | None:
        """Columns of the rows; None as long as the weight is uninitialised."""
        return None if is_lazy(self.weight) else self.weight.shape[1]

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(-1/sqrt(in_features), 1/sqrt(in_features)), as ``torch.nn.Linear`` does."""
        if self.in_features is None:
            return
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def initialize_parameters(self, input: Any, context: Any = None) -> None:
        """What torch's lazy modules call before the first forward."""
        if not is_lazy(self.weight):
            return
        name = type(self).__name__
        checks.floating(name, "input", input)
        if input.dim() != 2 or input.shape[1] == 0:
            raise ValueError(
                f"{name}: input must be 2-D [N,in_features] with in_features >= 1, got {checks.describe(input)}"
            )
        with torch.no_grad():
            self.weight.materialize((self.num_features, input.shape[1]))
            if isinstance(self.bias, UninitializedParameter):
                self.bias.materialize((self.num_features,))
        self.reset_parameters()

    def _lazy_load_hook(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        known = isinstance(weight, Tensor) and not is_lazy(weight)
        if known and (weight.dim() != 2 or weight.shape[0] != self.num_features):
            rest[-1].append(
                f"size mismatch for {prefix}weight: {type(self).__name__} has num_features = {self.num_features}, "
                f"got {checks.describe(weight)}."
            )
        else:
            super()._lazy_load_hook(state_dict, prefix, *rest)

    def _replicate_for_data_parallel(self) -> Any:
        if self.in_features is None:
            return super()._replicate_for_data_parallel()
        return nn.Module._replicate_for_data_parallel(self)

    def _check(self, input: Any, context: Any) -> None:
        name = type(self).__name__
        check_rows(name, "input", input, self.weight, "in_features")
        if context is not None:
            check_rows(name, "context", context, self.weight, "in_features")

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, margin={self.margin}, in_features={self.in_features}, "
            f"bias={self.bias is not None}, reduction={self.reduction!r}"
        )
