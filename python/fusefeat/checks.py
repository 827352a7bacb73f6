"""Argument checks of the public functions: every bad input becomes a ValueError or TypeError before a kernel runs."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .reference.attention_pool import acc_dtype

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def describe(value: Any) -> str:
    """What came in, short: shape, dtype and device of a tensor, type and value of anything else."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def tensor(function: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {describe(value)}")
    if value.layout != torch.strided:
        hint = "; pass packed values with cu_seqlens instead" if value.is_nested else ""
        raise TypeError(f"{function}: {name} must be a dense (strided) tensor, got layout {value.layout}{hint}")
    if value.is_nested:
        raise TypeError(
            f"{function}: {name} must be a dense tensor, got a nested one; pass packed values with cu_seqlens instead"
        )


def floating(function: str, name: str, value: Any) -> None:
    tensor(function, name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{function}: {name} must be float16, bfloat16, float32 or float64, got {describe(value)}")


def same_device(function: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{function}: {name} must be on {like_name}'s device {like.device}, got {describe(value)}")


def dtype_of_or_acc(function: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    acc = acc_dtype(like.dtype)
    if value.dtype != like.dtype and value.dtype != acc:
        want = str(like.dtype) if like.dtype == acc else f"{like.dtype} or {acc}"
        raise TypeError(f"{function}: {name} must be {want} to go with {like_name}, got {describe(value)}")


def finite_number(function: str, name: str, value: Any) -> float:
    if type(value) is float and -math.inf < value < math.inf:
        return value
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]  # its value is not known while tracing
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {name} must be a real number, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction without end
        number = math.inf
    if not -math.inf < number < math.inf:
        raise ValueError(f"{function}: {name} must be finite, got {describe(value)}")
    return number


def flag(function: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be True or False, got {describe(value)}")


def positive_int(function: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: {name} must be an int, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1, got {value}")


def values_can_be_read(value: Tensor) -> bool:
    """Whether looking at the values is free: an eager CPU tensor, neither traced nor vmapped."""
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(value) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and not torch._is_functional_tensor(value)
    )


def offsets(function: str, cu_seqlens: Any, name: str, like: Tensor) -> None:
    """cu_seqlens: [B+1] int32/int64, first 0, last S, non-decreasing."""
    tensor(function, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in INDEX_DTYPES:
        raise TypeError(f"{function}: cu_seqlens must be int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{function}: cu_seqlens must be 1-D with at least one entry, got {describe(cu_seqlens)}")
    same_device(function, "cu_seqlens", cu_seqlens, name, like)
    if values_can_be_read(cu_seqlens):
        tokens = like.shape[0]
        # Python's own numbers are the fastest way to look at a few offsets, tensor operations at many.
        if cu_seqlens.shape[0] <= 256:
            values = cu_seqlens.tolist()
            if values[0] == 0 and values[-1] == tokens and values == sorted(values):
                return
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != tokens:
            raise ValueError(
                f"{function}: cu_seqlens must start at 0 and end at {tokens}, the number of tokens of {name}, "
                f"got first {first} and last {last}"
            )
        if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
            where = int((cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()[0])
            raise ValueError(
                f"{function}: cu_seqlens must not decrease, got {int(cu_seqlens[where])} followed by "
                f"{int(cu_seqlens[where + 1])} at index {where}"
            )


def tokens_and_layout(function: str, name: str, x: Any, mask: Any, cu_seqlens: Any) -> None:
    """The pooled tensor with its mask (padded) or offsets (packed)."""
    floating(function, name, x)
    if cu_seqlens is None:
        if x.dim() != 3:
            hint = "; a packed [S,D] tensor needs cu_seqlens" if x.dim() == 2 else ""
            raise ValueError(f"{function}: {name} must be [B,T,D], got {describe(x)}{hint}")
        if mask is not None:
            tensor(function, "mask", mask)
            if mask.dtype != torch.bool:
                raise TypeError(f"{function}: mask must be bool with True = keep, got {describe(mask)}")
            if mask.shape != x.shape[:2]:
                raise ValueError(f"{function}: mask must be [B,T] = {list(x.shape[:2])}, got {describe(mask)}")
            same_device(function, "mask", mask, name, x)
        return
    if mask is not None:
        raise ValueError(f"{function}: mask cannot be combined with cu_seqlens, got both; leave masked tokens out")
    if x.dim() != 2:
        raise ValueError(f"{function}: {name} must be packed [S,D] when cu_seqlens is given, got {describe(x)}")
    offsets(function, cu_seqlens, name, x)


def query(function: str, value: Any, x: Tensor) -> None:
    floating(function, "query", value)
    channels = x.shape[-1]
    if value.dim() not in (1, 2) or value.shape[-1] != channels or (value.shape[0] == 0 and value.dim() == 2):
        raise ValueError(
            f"{function}: query must be [D] or [K,D] with D = {channels} (as in x) and K >= 1, got {describe(value)}"
        )
    dtype_of_or_acc(function, "query", value, "x", x)
    same_device(function, "query", value, "x", x)


def scores(function: str, value: Any, values: Tensor) -> None:
    floating(function, "scores", value)
    lead = values.shape[:-1]
    with_queries = value.dim() == values.dim()
    if value.shape[: len(lead)] != lead or value.dim() not in (len(lead), values.dim()):
        want = "[S] or [S,K]" if values.dim() == 2 else "[B,T] or [B,T,K]"
        raise ValueError(f"{function}: scores must be {want} with leading {list(lead)}, got {describe(value)}")
    if with_queries and value.shape[-1] == 0:
        raise ValueError(f"{function}: scores must have at least one query, got {describe(value)}")
    dtype_of_or_acc(function, "scores", value, "values", values)
    same_device(function, "scores", value, "values", values)


def matrix(
    function: str, name: str, value: Any, like: Tensor | None, *, mixed_dtypes: bool = False, width_of: str = ""
) -> None:
    """A 2-D floating tensor, with the width, device and (unless mixed_dtypes) dtype of ``like``."""
    floating(function, name, value)
    if value.dim() != 2:
        want = "[F,D]" if name == "weight" else "[N,D]"
        raise ValueError(f"{function}: {name} must be 2-D {want}, got {describe(value)}")
    if like is None:
        return
    if value.shape[1] != like.shape[1]:
        raise ValueError(
            f"{function}: {name} must have D = {like.shape[1]} columns as {width_of} has, got {describe(value)}"
        )
    if value.dtype != like.dtype and (not mixed_dtypes or torch.float64 in (value.dtype, like.dtype)):
        raise TypeError(f"{function}: {name} must be {like.dtype} as input is, got {describe(value)}")
    same_device(function, name, value, "input", like)


def vector(
    function: str, name: str, value: Any, length: Any, meaning: str, like: Tensor, *, any_dtype: bool = True
) -> None:
    """A 1-D floating tensor of a given length on the device of ``like``."""
    floating(function, name, value)
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{function}: {name} must be 1-D of length {meaning} = {length}, got {describe(value)}")
    if not any_dtype:
        dtype_of_or_acc(function, name, value, "input", like)
    same_device(function, name, value, "input", like)


def not_negative(function: str, name: str, value: Tensor) -> None:
    if values_can_be_read(value) and bool((value < 0).any()):
        where = int((value < 0).nonzero()[0])
        raise ValueError(f"{function}: {name} must not be negative, got {float(value[where])} at index {where}")


def process_group(function: str, value: Any) -> None:
    if not torch.distributed.is_available() or not isinstance(value, torch.distributed.ProcessGroup):
        raise TypeError(f"{function}: process_group must be a torch.distributed.ProcessGroup, got {describe(value)}")


def no_forward_mode(function: str, *tensors: Any) -> None:
    """Kernels have no forward-mode derivative; dropping the tangent in silence would be a wrong number."""
    if torch.autograd.forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return  # compiled transforms run plain PyTorch
    if any(isinstance(value, Tensor) and _has_tangent(value) for value in tensors):
        raise forward_mode_error(function)


def _has_tangent(value: Tensor) -> bool:
    # Below vmap there is no telling yet: the rule for jvp that the operators have will, one level further down.
    if torch._C._functorch.is_batchedtensor(value):
        return False
    return torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def forward_mode_error(function: str) -> NotImplementedError:
    return NotImplementedError(
        f"{function}: forward-mode differentiation (jvp, jacfwd, hessian, dual tensors) is not available on compiled "
        "backends; use reverse mode (jacrev of jacrev for a hessian) or backend='reference'"
    )
