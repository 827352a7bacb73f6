"""Import this before fusefeat.triton: kernels then run in Triton's interpreter, on CPU tensors.

Where there is a GPU the kernels run on it, in the same process: modules that want the interpreter are skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels run on the GPU here", allow_module_level=True)

os.environ["TRITON_INTERPRET"] = "1"

interpreter = pytest.importorskip("triton.runtime.interpreter")
_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 reads loop bounds by int() of an array of one element, which NumPy 2.4 no longer allows."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
