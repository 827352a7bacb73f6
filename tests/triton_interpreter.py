"""Import this before fusefeat.triton: kernels then run in Triton's interpreter, on CPU tensors, and what they write
starts as NaN.

Where there is a GPU the kernels run on it, in the same process: modules that want the interpreter are skipped.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
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


def _cast(builder: Any, source: Any, target: Any) -> Any:
    """Between float32 and bfloat16 as hardware does it, rounding to nearest even; Triton's own cuts the bits off."""
    language = interpreter.tl
    kinds = (source.dtype.scalar, target.scalar)
    if kinds == (language.float32, language.bfloat16):
        bits = source.data.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), target.scalar)
    if kinds == (language.bfloat16, language.float32):
        bits = source.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), target.scalar)
    return _cast_impl(builder, source, target)


def _dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
    """Triton's own multiplies the bits of bfloat16 as integers."""
    float32 = interpreter.tl.float32
    a, b = (_cast(builder, t, float32) if t.dtype.scalar == interpreter.tl.bfloat16 else t for t in (a, b))
    return _create_dot(builder, a, b, *rest)


def _patch_once(function: Any) -> Any:
    """Triton patches its language again at every call of a device function: what is patched already need not be."""
    modules = [interpreter.tl, interpreter.tl.core]
    seen = [value for value in function.__globals__.values() if any(value is module for module in modules)]
    if any(interpreter.tl.core.is_builtin(module.load) for module in seen):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


_patch_lang = interpreter._patch_lang
_cast_impl = interpreter.InterpreterBuilder.cast_impl
_create_dot = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.cast_impl = _cast
interpreter.InterpreterBuilder.create_dot = _dot
interpreter._patch_lang = _patch_once

from fusefeat.triton import _launch  # noqa: E402 - reads the variable above

_launch.POISON = True
