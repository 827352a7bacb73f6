"""The C++ operators: one name each for the CPU kernel and the CUDA kernel behind it."""

from __future__ import annotations

from typing import Any

import torch


class NativeOperators:
    """``ops.name`` is the overload ``torch.ops.fusefeat.name.default``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.fusefeat, name).default
