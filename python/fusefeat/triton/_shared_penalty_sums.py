"""Gradients of rows, weight and bias, summed over chunks of dz."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusefeat.triton import _shared_penalty_tuning as tuning
from fusefeat.triton._launch import launch
from fusefeat.triton._shared_penalty_chunks import sum_parts
from fusefeat.triton._shared_penalty_problem import TRITON_TYPES, Problem
from fusefeat.triton._shared_penalty_products import shared_grad_rows, shared_grad_weight
from fusefeat.triton._shared_penalty_tuning import Tile, cdiv


class Gradients:
    """Gradients of context, input, weight and bias, gathered over chunks; [0] for those not needed."""

    def __init__(self, problem: Problem, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> None:
        self.problem, self.tensors = problem, tensors
        needs = [need and tensor is not None for need, tensor in zip(needs, tensors, strict=False)]
        self.need_context, self.need_input, self.need_weight, self.need_bias = needs
        # Triton writes in the type of the operands, the library in that of its sums.
        row_type = problem.acc if problem.operand is None else problem.input.dtype
        weight_type = problem.acc if problem.operand is None else problem.weight.dtype
        types = (row_type, row_type, weight_type, problem.acc)
        self.context, self.input, self.weight, self.bias = (
            problem.new(*(tensor.shape if need else (0,)), dtype=dtype)  # type: ignore[union-attr]
            for tensor, need, dtype in zip(tensors, needs, types, strict=True)
        )
        if problem.rows == 0:
            self.weight.zero_()
            self.bias.zero_()
        self.weight_parts: Tensor | None = None

    @property
    def need_rows(self) -> bool:
        return self.need_context or self.need_input

    @property
    def need_dz(self) -> bool:
        return self.need_rows or self.need_weight

    @property
    def row_bytes(self) -> float:
        """Scratch per row that the products take, beside dz."""
        masked = self.problem.operand is None and self.problem.row_weight is not None and self.need_weight
        return self.problem.channels * self.problem.acc.itemsize if masked else 0

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = (self.context, self.input, self.weight, self.bias)
        like = (self.problem.input if tensor is None else tensor for tensor in self.tensors)
        first, second, third, fourth = (grad.to(tensor.dtype) for grad, tensor in zip(found, like, strict=True))
        return first, second, third, fourth

    def add(self, begin: int, end: int, dz: Tensor, bias_parts: Tensor | None) -> None:
        """The share of rows [begin, end)."""
        if bias_parts is not None:
            sum_parts(bias_parts, self.bias, add=begin > 0)
        if self.problem.operand is None:
            self._add_by_library(begin, end, dz)
            return
        if self.need_rows:
            self._rows(begin, end, dz)
        if self.need_weight:
            self._weight(begin, end, dz)

    def _add_by_library(self, begin: int, end: int, dz: Tensor) -> None:
        problem = self.problem
        for of_context, rows, local in problem.parts(begin, end):
            x = (problem.context if of_context else problem.input)[rows]
            unused = None
            if problem.row_weight is not None:
                # What is not read must not get into a product: 0 * NaN is NaN.
                unused = (problem.row_weight[begin:end][local] == 0)[:, None]
            if self.need_weight:
                x = x if unused is None else x.masked_fill(unused, 0.0)
                if begin + local.start == 0:
                    torch.mm(dz[local].t(), x, out=self.weight)
                else:
                    torch.addmm(self.weight, dz[local].t(), x, out=self.weight)
            if self.need_context if of_context else self.need_input:
                grad = (self.context if of_context else self.input)[rows]
                torch.mm(dz[local], problem.weight, out=grad)
                if unused is not None:
                    grad.masked_fill_(unused, 0.0)

    def _rows(self, begin: int, end: int, dz: Tensor) -> None:
        problem, span = self.problem, end - begin
        short = problem.tf32 or problem.input.dtype.itemsize > 2
        tile = tuning.grad_rows_tile(problem.rows, problem.channels, problem.features, short, problem.aligned)
        programs = problem.row_tiles(begin, end, tile.block_m) * cdiv(problem.channels, tile.block_d)
        splits = tuning.splits(programs, problem.features, span * problem.channels * 4)
        length = cdiv(cdiv(problem.features, splits), tile.block_f) * tile.block_f
        parts = problem.new(splits if splits > 1 else 0, span, problem.channels)
        grads = (self.context if self.need_context else self.input, self.input if self.need_input else self.context)
        if programs:
            launch(
                shared_grad_rows, (programs, splits), dz, problem.weight, *problem.weight.stride(),
                problem.input if problem.row_weight is None else problem.row_weight, *grads, parts,
                problem.context_rows, begin, end, problem.features, problem.channels, length,
                NEED_CONTEXT=self.need_context, NEED_INPUT=self.need_input,
                HAS_WEIGHT=problem.row_weight is not None, SPLIT=splits > 1, **_config(tile, dz),
            )  # fmt: skip
        if splits > 1:
            for of_context, rows, local in problem.parts(begin, end):
                if self.need_context if of_context else self.need_input:
                    sum_parts(parts[:, local], (self.context if of_context else self.input)[rows])

    def _weight(self, begin: int, end: int, dz: Tensor) -> None:
        problem = self.problem
        short = problem.tf32 or problem.input.dtype.itemsize > 2
        tile = tuning.grad_weight_tile(problem.rows, problem.channels, problem.features, short, problem.aligned)
        row_tiles = problem.row_tiles(begin, end, tile.block_m)
        programs = cdiv(problem.features, tile.block_f) * cdiv(problem.channels, tile.block_d)
        if not programs:
            return
        if begin == 0:
            # As many splits for all chunks as for the first.
            splits = tuning.splits(programs, end, self.weight.numel() * 4)
            direct = splits == 1 and (end == problem.rows or self.weight.dtype == problem.acc)
            self.weight_parts = self.weight[None] if direct else problem.new(splits, *self.weight.shape)
        assert self.weight_parts is not None
        splits = self.weight_parts.shape[0]
        launch(
            shared_grad_weight, (programs, splits), dz, *problem.row_args(),
            problem.input if problem.row_weight is None else problem.row_weight, self.weight_parts,
            problem.context_rows, begin, end, problem.features, problem.channels, row_tiles, cdiv(row_tiles, splits),
            HAS_WEIGHT=problem.row_weight is not None, ADD=begin > 0, **_config(tile, dz),
        )  # fmt: skip
        if end == problem.rows and self.weight_parts.data_ptr() != self.weight.data_ptr():
            sum_parts(self.weight_parts, self.weight)


def _config(tile: Tile, dz: Tensor) -> dict[str, Any]:
    return {
        "OPERAND": TRITON_TYPES[dz.dtype],
        "GROUP": 8,
        "BLOCK_M": tile.block_m,
        "BLOCK_F": tile.block_f,
        "BLOCK_D": tile.block_d,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
