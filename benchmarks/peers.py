"""What the contenders need from outside of eager PyTorch; each says why when it is not there."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .case import Skip


def optional(name: str, install: str) -> ModuleType:
    """An optional package's module, or Skip with the way to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"{name} cannot be imported ({error}); pip install {install}") from error


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """torch.compile for the very shapes at hand."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        raise Skip("torch.compile needs a C++ compiler on CPU")
    if device.type == "cuda":
        optional("triton", "triton")
    return torch.compile(function, dynamic=False)
