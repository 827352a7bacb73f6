"""Settings that must be made before anything is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton kernels run in the interpreter, on CPU tensors; Triton decides that when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
