"""The clamp statistics and the clamped matrix as operators."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import clamped_reg as reference
from ..reference.attention_pool import acc_dtype
from .differentiable import Operator, run_when_compiling
from .native import NativeOperators
from .shared_penalty import fake_gradients, row_count


def _activation_formula(*args: Any) -> tuple[Tensor]:
    return (reference.activation(*args),)


def _operators(ops: Any) -> dict[str, Operator]:
    torch.library.register_fake(ops.clamped_reg, _fake_statistics)
    torch.library.register_fake(ops.clamped_activation, _fake_activation)
    torch.library.register_fake(ops.clamped_reg_backward, _fake_backward)
    torch.library.register_fake(ops.clamped_activation_backward, _fake_backward)
    return {
        "clamped_reg": Operator(
            ops.clamped_reg,
            ops.clamped_reg_backward,
            reference.statistics,
            wrt=(0, 1, 2, 3),
            backward_args=7,
            grads=(0,),
            saved=(),
        ).register(),
        "clamped_activation": Operator(
            ops.clamped_activation,
            ops.clamped_activation_backward,
            _activation_formula,
            wrt=(0, 1, 2, 3),
            backward_args=6,
            grads=(0,),
            saved=(),
        ).register(),
    }


def _fake_statistics(context: Any, input: Tensor, weight: Tensor, *rest: Any) -> Any:
    return (
        input.new_empty((row_count(context, input),), dtype=acc_dtype(input.dtype)),
        input.new_empty((weight.shape[0],), dtype=torch.int64),
    )


def _fake_activation(context: Any, input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return input.new_empty((row_count(context, input), weight.shape[0]))


def _fake_backward(grad: Tensor, context: Any, input: Tensor, weight: Tensor, bias: Any, *rest: Any) -> Any:
    return fake_gradients(rest[-1], context, input, weight, bias)


def _native() -> dict[str, Operator]:
    return _operators(NativeOperators())


_NATIVE = _native() if _library.STATE.cpu_loaded else {}
_LOADED = {"cpu": _NATIVE, "cuda": _NATIVE}
_LOCK = threading.Lock()


@run_when_compiling
def _load_triton() -> bool:
    with _LOCK:
        if "triton" in _LOADED:
            return True
        from ..triton import clamped_reg as kernels  # imports triton, which is optional

        _LOADED["triton"] = _operators(kernels)
    return True


def operator(name: str, backend: str) -> Operator:
    """``clamped_reg`` (the statistics) or ``clamped_activation`` on backend "cpu", "cuda" or "triton"."""
    if backend == "triton":
        _load_triton()
    return _LOADED[backend][name]
