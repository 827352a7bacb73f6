"""One call of the shared-logits family: checked arguments, and how kernels and library products get at the rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fusefeat.reference.attention_pool import acc_dtype
from fusefeat.reference.shared_penalty import OPERAND_DTYPES
from fusefeat.triton import _shared_penalty_tuning as tuning
from fusefeat.triton._launch import new_empty
from fusefeat.triton._shared_penalty_tuning import Tile, cdiv

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: f"fusefeat: {message}")


@dataclass(frozen=True)
class Problem:
    """Checked arguments.

    Attributes:
        context, input, weight: the operands as they are multiplied; context is input where there is none.
        bias, row_weight: in the accumulation type, contiguous, or None.
        operand: the type in which Triton multiplies; None where torch.mm does, in the accumulation type.
        margin: for the kernels, a float or (float64) a tensor.
    """

    context: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    row_weight: Tensor | None
    margin: Any
    operand: torch.dtype | None
    acc: torch.dtype
    context_rows: int
    rows: int
    features: int
    channels: int

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return new_empty(self.input, shape, dtype or self.acc)

    @property
    def tf32(self) -> bool:
        """Whether dz is TF32: gradients leave the range of float16, and TF32 resolves as much."""
        return self.operand == torch.float16

    @property
    def dz_type(self) -> torch.dtype:
        return torch.bfloat16 if self.operand == torch.bfloat16 else self.acc

    @functools.cached_property
    def aligned(self) -> bool:
        """Whether 16 bytes of the operands and of dz can be loaded at once."""
        operands = (self.context, self.input, self.weight)
        sizes = (self.features, self.channels, *(tensor.stride(0) for tensor in operands))
        return all(size % 16 == 0 for size in sizes) and all(tensor.stride(1) == 1 for tensor in operands)

    def tile(self, from_raw: bool) -> Tile:
        if from_raw:
            return tuning.raw_tile(self.rows, self.features, self.acc)
        return tuning.logits_tile(self.rows, self.features, self.input.dtype.itemsize > 2, self.aligned)

    def row_tiles(self, begin: int, end: int, block: int) -> int:
        border = min(max(self.context_rows, begin), end)
        return cdiv(border - begin, block) + cdiv(end - border, block)

    def logits_args(self, begin: int, end: int, raw: Tensor | None) -> tuple[Any, ...]:
        """What program_logits takes in front of its constants."""
        unused = self.input
        return (
            self.context, *self.context.stride(), self.input, *self.input.stride(),
            self.weight, *self.weight.stride(), unused if self.bias is None else self.bias,
            unused if self.row_weight is None else self.row_weight, unused if raw is None else raw,
            self.margin, self.context_rows, begin, end, self.features, self.channels,
        )  # fmt: skip

    def logits_config(self, from_raw: bool, store_raw: bool = False) -> dict[str, Any]:
        """The constants of program_logits, and the launch."""
        tile = self.tile(from_raw)
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_WEIGHT": self.row_weight is not None,
            "FROM_RAW": from_raw,
            "STORE_RAW": store_raw,
            "ACC": TRITON_TYPES[self.acc],
            "OPERAND": TRITON_TYPES[self.operand or self.acc],
            "GROUP": 8,
            "BLOCK_M": tile.block_m,
            "BLOCK_F": tile.block_f,
            "BLOCK_D": tile.block_d,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def row_args(self) -> tuple[Any, ...]:
        return self.context, *self.context.stride(), self.input, *self.input.stride()

    def parts(self, begin: int, end: int) -> Iterator[tuple[bool, slice, slice]]:
        """Of rows [begin, end): whether they are of the context, where they lie in it or in input, where from begin."""
        border = min(max(self.context_rows, begin), end)
        if border > begin:
            yield True, slice(begin, border), slice(0, border - begin)
        if end > border:
            yield False, slice(border - self.context_rows, end - self.context_rows), slice(border - begin, end - begin)

    def multiply(self, begin: int, end: int, out: Tensor) -> None:
        """row . weight^T of rows [begin, end). Autocast leaves the variants with `out` alone."""
        for of_context, rows, local in self.parts(begin, end):
            torch.mm((self.context if of_context else self.input)[rows], self.weight.t(), out=out[local])


def make_problem(
    context: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    margin: float,
    row_weight: Tensor | None,
    operand: int,
) -> Problem:
    check(input.dim() == 2 and input.dtype in FLOATS, "input must be [N,D] floating point")
    channels = input.shape[1]
    check(weight.dim() == 2 and weight.shape[1] == channels, "weight must be [F,D] with the D of input")
    check_type(input, weight, "weight")
    features = weight.shape[0]
    check(features > 0, "weight must have at least one row")
    if context is not None:
        check(context.dim() == 2 and context.shape[1] == channels, "context must be [Nc,D] with the D of input")
        check_type(input, context, "context")
    context_rows = 0 if context is None else context.shape[0]
    rows = context_rows + input.shape[0]
    check_values(input, bias, (features,), "bias")
    check_values(input, row_weight, (rows,), "row_weight")
    check(0 < margin <= 1e30, "margin must be positive and finite")
    check(0 <= operand <= 2, "operand must be 0, 1 or 2")

    acc = acc_dtype(input.dtype)
    operands = [input if context is None else context, input, weight]
    rounded = OPERAND_DTYPES[operand]
    common = input.dtype if all(tensor.dtype == input.dtype for tensor in operands) else acc
    multiplied: torch.dtype | None = common if rounded is None else rounded
    if acc == torch.float64 or multiplied == torch.float32:
        # No tensor core keeps the accuracy of these types (torch decides about TF32), and the library is fast.
        operands = [_dense((t if rounded is None else t.to(rounded)).to(acc)) for t in operands]
        multiplied = None
    else:
        operands = [tensor.to(common) for tensor in operands]
    return Problem(
        context=operands[0],
        input=operands[1],
        weight=operands[2],
        bias=in_acc(bias, acc),
        row_weight=in_acc(row_weight, acc),
        margin=torch.full((1,), margin, dtype=acc, device=input.device) if acc == torch.float64 else margin,
        operand=multiplied,
        acc=acc,
        context_rows=context_rows,
        rows=rows,
        features=features,
        channels=channels,
    )


def _dense(tensor: Tensor) -> Tensor:
    """With one stride of 1, or the library would copy it at every call."""
    return tensor if 1 in tensor.stride() else tensor.contiguous()


def in_acc(tensor: Tensor | None, acc: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(acc).contiguous()


def check_type(input: Tensor, other: Tensor, name: str) -> None:
    fits = other.dtype in FLOATS and (other.dtype == torch.float64) == (input.dtype == torch.float64)
    check(fits, f"{name} must be floating point, and float64 exactly when input is")
    check(other.device == input.device, f"{name} must be on the device of input")


def check_values(input: Tensor, tensor: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    """An optional vector or matrix: a bias, an incoming gradient, a saved result."""
    if tensor is not None:
        check(tensor.shape == shape, f"{name} must have shape {list(shape)}")
        check_type(input, tensor, name)
