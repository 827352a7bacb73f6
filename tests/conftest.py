"""Settings that must be made before anything is imported."""

from __future__ import annotations

import importlib.util
import os

import torch

# What an earlier version of an operator left in the compiler's cache is not what is to be tested.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    import triton_interpreter  # noqa: F401
