"""The C++ operators, one name each for the CPU kernel and the CUDA kernel behind it, and how they are called."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class NativeOperators:
    """``ops.name`` is the overload ``torch.ops.fusefeat.name.default``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.fusefeat, name).default


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Nothing on the device of x is cast inside; free where autocast is off anyway, and meta has none to ask."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
