"""How Triton operators are registered and kernels launched, compiled or interpreted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
# The debug mode that the compiled kernels have too: what nobody writes shows.
POISON = os.environ.get("FUSEFEAT_POISON") == "1"


def new_empty(like: Tensor, shape: Sequence[int | torch.SymInt], dtype: torch.dtype | None = None) -> Tensor:
    """As ``Tensor.new_empty``; with FUSEFEAT_POISON=1 full of NaN, or -1 in integers."""
    tensor = like.new_empty(shape, dtype=dtype)
    if POISON:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    return tensor


def opaque_operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register `fn` as operator fusefeat::<name>, which torch.compile calls as it is. It has no fake kernel yet."""

    def register(fn: Callable[..., Any]) -> Any:
        return torch.library.custom_op(f"fusefeat::{name}", fn, mutates_args=())

    return register


def triton_operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register `fn` as operator fusefeat::<name>, which torch.compile traces into.

    An interpreted kernel cannot be traced: there the operator is opaque, and `fn` is its fake kernel too.
    """

    def register(fn: Callable[..., Any]) -> Any:
        if not INTERPRETED:
            return torch.library.triton_op(f"fusefeat::{name}", fn, mutates_args={})
        op = torch.library.custom_op(f"fusefeat::{name}", fn, mutates_args=())
        op.register_fake(fn)
        return op

    return register


class wrap_triton:
    """`torch.library.wrap_triton` that also takes interpreted kernels and launches on the tensors' device."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        def launch(*args: Any, **config: Any) -> None:
            tensor = args[0]
            if INTERPRETED:
                if not isinstance(tensor, FakeTensor):
                    self.kernel[grid](*args, **config)
                return
            with _device_guard(tensor):
                torch.library.wrap_triton(self.kernel)[grid](*args, **config)

        return launch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **config: Any) -> None:
    """Run a kernel on the device of its first argument, which is a tensor."""
    with _device_guard(args[0]):
        kernel[grid](*args, **config)


def _device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device. Tracing, whose tensors are of a subclass, has no need of one."""
    if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
