"""Settings that must be made before anything is imported."""

from __future__ import annotations

import importlib.util

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    import triton_interpreter  # noqa: F401
