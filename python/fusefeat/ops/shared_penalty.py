"""The shared-assignment statistics and the assignment matrix as operators."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import shared_penalty as reference
from ..reference.attention_pool import acc_dtype
from .differentiable import Operator, run_when_compiling
from .native import NativeOperators

# Logits that the forward keeps for its backward, in bytes: at most so many, and with the tile of logits that the
# kernels have in scratch at one time (256 rows; 64 where logits are float16 and all channels are multiplied at a time)
# at most SHARED_BYTES, which leaves the rest of the 64 MiB to packed operands and partial sums. The C library's
# allocator has new pages for each block of 32 MiB or more.
KEPT_BYTES = 31 * 2**20
SHARED_BYTES = 48 * 2**20
DEPTH_BLOCK = 1024
# With fewer channels than this the product costs less than fresh memory for its result, unless that is small.
FEW_CHANNELS, FEW_BYTES = 32, 8 * 2**20


def rows_to_keep(
    rows: int,
    features: int,
    channels: int,
    dtype: torch.dtype,
    backend: str = "cpu",
    operand: int = 0,
    kept: torch.dtype | None = None,
) -> int:
    """How many rows' logits are kept for the backward, in the type ``kept`` (the accumulation type when None): as many
    as the memory bound allows, the others are recomputed.

    On a GPU, where it has not been measured: all or none; and none on Triton's tensor cores, which compute a product
    of half types about as fast as memory gives it back in float32.
    """
    row_bytes = features * acc_dtype(dtype).itemsize
    if backend != "cpu":
        half = operand != 0 or dtype.itemsize == 2
        return 0 if rows * row_bytes > KEPT_BYTES or (backend == "triton" and half) else rows
    in_scratch = min(rows, 256) * row_bytes
    if kept is not None:
        row_bytes = features * kept.itemsize
        if kept == torch.float16 and channels <= DEPTH_BLOCK:
            in_scratch = min(rows, 64) * row_bytes
    room = max(min(KEPT_BYTES, SHARED_BYTES - in_scratch), 0)
    if channels < FEW_CHANNELS and rows * row_bytes > FEW_BYTES:
        return 0
    return rows if rows * row_bytes <= room else room // row_bytes // 32 * 32


def row_count(context: Tensor | None, input: Tensor) -> Any:
    return input.shape[0] if context is None else context.shape[0] + input.shape[0]


def _formula(context: Any, input: Any, weight: Any, bias: Any, margin: Any, row_weight: Any, operand: Any) -> Any:
    return *reference.statistics(context, input, weight, bias, margin, row_weight, operand, True), input.new_empty(0)


def _assignment_formula(*args: Any) -> tuple[Tensor]:
    return (reference.assignment(*args),)


def _operators(ops: Any) -> dict[str, Operator]:
    torch.library.register_fake(ops.shared_penalty, _fake_statistics)
    torch.library.register_fake(ops.shared_penalty_backward, _fake_statistics_backward)
    torch.library.register_fake(ops.shared_assignment, _fake_assignment)
    torch.library.register_fake(ops.shared_assignment_backward, _fake_assignment_backward)
    return {
        "shared_penalty": Operator(
            ops.shared_penalty,
            ops.shared_penalty_backward,
            _formula,
            wrt=(0, 1, 2, 3, 5),
            backward_args=7,
            grads=(0, 1, 2, 3),
            saved=(0, 1, 5),
            optional=(3, 7),
        ).register(),
        "shared_assignment": Operator(
            ops.shared_assignment,
            ops.shared_assignment_backward,
            _assignment_formula,
            wrt=(0, 1, 2, 3),
            backward_args=6,
            grads=(0,),
            saved=(0,),
        ).register(),
    }


def fake_gradients(needs: Any, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """One gradient per tensor, empty where none is asked for."""
    like = next(tensor for tensor in tensors if tensor is not None)
    return tuple(
        like.new_empty((0,)) if tensor is None else tensor.new_empty(tensor.shape if need else (0,))
        for need, tensor in zip(needs, tensors, strict=True)
    )


def _fake_statistics(
    context: Any, input: Tensor, weight: Tensor, bias: Any, margin: float, row_weight: Any, operand: int,
    with_clamp: bool, keep_rows: int,
) -> Any:  # fmt: skip
    acc, rows, features = acc_dtype(input.dtype), row_count(context, input), weight.shape[0]
    return (
        input.new_empty((rows,), dtype=acc),
        input.new_empty((rows,), dtype=acc),
        input.new_empty((features,), dtype=acc),
        input.new_empty((rows if with_clamp else 0,), dtype=acc),
        input.new_empty((features if with_clamp else 0,), dtype=torch.int64),
        input.new_empty((keep_rows, features) if keep_rows else (0,), dtype=acc),
    )


def _fake_statistics_backward(
    grad_row_entropy: Any, grad_lse: Any, grad_prob_sum: Any, grad_row_excess: Any, context: Any, input: Tensor,
    weight: Tensor, bias: Any, margin: float, row_weight: Any, operand: int, row_entropy: Tensor, lse: Tensor,
    kept: Tensor, needs: Any,
) -> Any:  # fmt: skip
    return fake_gradients(needs, context, input, weight, bias, row_weight)


def _fake_assignment(context: Any, input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return input.new_empty((row_count(context, input), weight.shape[0]))


def _fake_assignment_backward(
    grad: Tensor, context: Any, input: Tensor, weight: Tensor, bias: Any, margin: float, operand: int,
    assignment: Tensor, needs: Any,
) -> Any:  # fmt: skip
    return fake_gradients(needs, context, input, weight, bias)


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
        from ..triton import shared_penalty as kernels  # imports triton, which is optional

        _LOADED["triton"] = _operators(kernels)
    return True


def operator(name: str, backend: str) -> Operator:
    """``shared_penalty`` (the statistics) or ``shared_assignment`` on backend "cpu", "cuda" or "triton"."""
    if backend == "triton":
        _load_triton()
    return _LOADED[backend][name]
