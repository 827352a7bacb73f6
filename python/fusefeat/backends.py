"""Which backend runs an op: what each one takes, why it cannot take an input, and who is asked first."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _library

FAMILIES = ("attention_pool", "shared_penalty", "clamped_reg")


def _cpu_unavailable() -> str | None:
    return None if _library.STATE.cpu_loaded else _library.STATE.cpu_reason


def _cuda_unavailable() -> str | None:
    return None if _library.STATE.cuda_loaded else _library.STATE.cuda_reason


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # kept from being imported, or a stand-in without a spec
        return False


_HAS_TRITON = _has_triton()
# Read once: Triton itself decides at import whether kernels are interpreted.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_unavailable() -> str | None:
    return None if _HAS_TRITON else "triton is not installed (pip install triton)"


def _reference_unavailable() -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of every op. ``device_types`` is None when any device will do."""

    name: str
    device_types: tuple[str, ...] | None
    why_unavailable: Callable[[], str | None]

    def why_not(self, x: Tensor) -> list[str]:
        """Reasons not to run an op on this input; empty when it can."""
        reasons = []
        unavailable = self.why_unavailable()
        if unavailable is not None:
            reasons.append(unavailable)
        # A meta tensor has no data: any registered operator can tell its result's shape.
        if self.device_types is not None and x.device.type not in (*self.device_types, "meta"):
            reasons.append(f"takes tensors on {' or '.join(self.device_types)}, got {x.device.type}")
        return reasons


BACKENDS = {
    "reference": Backend("reference", None, _reference_unavailable),
    "cpu": Backend("cpu", ("cpu",), _cpu_unavailable),
    "cuda": Backend("cuda", ("cuda",), _cuda_unavailable),
    "triton": Backend("triton", ("cuda", "cpu") if _INTERPRETED else ("cuda",), _triton_unavailable),
}

# Automatic order per device. On CUDA it is to follow measurements kept under benchmarks/results;
# there are none yet, and until there are Triton goes first.
_ORDER = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
    "meta": ("cpu", "reference"),
}


def order(family: str, device_type: str) -> list[str]:
    """Backends in the order automatic dispatch asks them."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return list(_ORDER.get(device_type, ("reference",)))


def _first_available(names: tuple[str, ...]) -> str:
    return next(name for name in names if BACKENDS[name].why_unavailable() is None)


# Looked up at every call; what is available does not change.
_AUTOMATIC = {device: _first_available(names) for device, names in _ORDER.items()}


def choose(function: str, requested: str | None, x: Tensor) -> str:
    """The name of the backend to run ``function`` on x, or a ValueError that gives every reason against."""
    if requested is None:
        return _AUTOMATIC.get(x.device.type, "reference")
    if not isinstance(requested, str):
        raise TypeError(f"{function}: backend must be a string or None, got {type(requested).__name__} {requested!r}")
    if requested not in BACKENDS:
        raise ValueError(f"{function}: backend must be None or one of {', '.join(BACKENDS)}, got {requested!r}")
    reasons = BACKENDS[requested].why_not(x)
    if reasons:
        others = "; ".join(
            f"{name}: {', '.join(backend.why_not(x)) or 'available'}"
            for name, backend in BACKENDS.items()
            if name != requested
        )
        raise ValueError(
            f"{function}: backend {requested!r} cannot take this input: {', '.join(reasons)} (the others: {others})"
        )
    return requested


def under_transform() -> bool:
    """Whether a torch.func transform (grad, vmap, ...) is running."""
    return torch._C._are_functorch_transforms_active()
