"""Import this before fusefeat.triton: kernels then run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest

interpreter = pytest.importorskip("triton.runtime.interpreter")
_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 reads loop bounds by int() of an array of one element, which NumPy 2.4 no longer allows."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
