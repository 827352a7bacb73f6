"""The forward of the shared-logits family: statistics of rows, then sums over them or the matrix itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fusefeat.triton._launch import launch
from fusefeat.triton._shared_penalty_chunks import Chunk, chunks_of, sum_parts
from fusefeat.triton._shared_penalty_forward import (
    shared_column_sums,
    shared_combine_rows,
    shared_matrix,
    shared_row_statistics,
)
from fusefeat.triton._shared_penalty_problem import Problem
from fusefeat.triton._shared_penalty_tuning import cdiv


class Statistics:
    """Results of a forward; what is not asked for has shape [0]."""

    def __init__(self, problem: Problem, softmax: bool, clamp: bool, columns: bool) -> None:
        rows, features = problem.rows, problem.features
        self.problem, self.softmax, self.clamp, self.columns = problem, softmax, clamp, columns
        self.row_entropy, self.lse = problem.new(rows if softmax else 0), problem.new(rows if softmax else 0)
        self.prob_sum = problem.new(features if columns else 0)
        self.row_excess = problem.new(rows if clamp else 0)
        self.fired = problem.new(features if clamp else 0, dtype=torch.int64)
        if rows == 0:
            self.prob_sum.zero_()
            self.fired.zero_()

    @property
    def row_bytes(self) -> float:
        """Scratch per row."""
        tile = self.problem.tile(self.problem.operand is None)
        kinds, features, acc = 3 * self.softmax + self.clamp, self.problem.features, self.problem.acc.itemsize
        return (
            kinds * acc * cdiv(features, tile.block_f) + (acc * self.columns + 4 * self.clamp) * features / tile.block_m
        )

    def rows_of(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Statistics of the chunk's rows; returns peak and scale of shared_combine_rows."""
        problem, features = self.problem, self.problem.features
        row_tiles, column_tiles = chunk.tiles
        statistics = problem.new(3 * self.softmax + self.clamp, column_tiles, chunk.rows)
        fired = problem.new(row_tiles if self.clamp else 0, features, dtype=torch.int32)
        store_raw = chunk.raw is not None and not chunk.ready
        chunk.run(shared_row_statistics, statistics, fired, store_raw=store_raw, SOFTMAX=self.softmax, CLAMP=self.clamp)
        chunk.ready = chunk.ready or store_raw
        if self.clamp:
            sum_parts(statistics[-1], self.row_excess[chunk.begin : chunk.end])
            sum_parts(fired, self.fired, add=chunk.begin > 0)
        peak, scale = problem.new(2, chunk.rows if self.softmax else 0)
        if self.softmax:
            launch(
                shared_combine_rows, (cdiv(chunk.rows, 16),), statistics,
                problem.input if problem.row_weight is None else problem.row_weight,
                self.row_entropy, self.lse, peak, scale, chunk.begin, chunk.end, column_tiles,
                HAS_WEIGHT=problem.row_weight is not None, BLOCK_S=64, BLOCK_M=16, num_warps=4,
            )  # fmt: skip
        return peak, scale

    def columns_of(self, chunk: Chunk, peak: Tensor, scale: Tensor) -> None:
        parts = self.problem.new(chunk.tiles[0], self.problem.features)
        chunk.run(shared_column_sums, peak, scale, parts)
        sum_parts(parts, self.prob_sum, add=chunk.begin > 0)


def run_statistics(problem: Problem, softmax: bool, clamp: bool, keep_rows: int) -> tuple[Statistics, Tensor]:
    """The statistics, and the products of the first keep_rows rows."""
    results = Statistics(problem, softmax, clamp, columns=softmax)
    kept = problem.new(keep_rows, problem.features) if keep_rows > 0 else problem.new(0)
    for chunk in chunks_of(problem, results.row_bytes, kept, keep_rows, kept_ready=False):
        peak, scale = results.rows_of(chunk)
        if softmax:
            results.columns_of(chunk, peak, scale)
    return results, kept


def run_matrix(problem: Problem, softmax: bool, dtype: torch.dtype) -> Tensor:
    """P, or the clamped logits."""
    results = Statistics(problem, softmax, clamp=False, columns=False)
    matrix = problem.new(problem.rows, problem.features, dtype=dtype)
    for chunk in chunks_of(problem, results.row_bytes, None, 0, kept_ready=False):
        peak, scale = results.rows_of(chunk) if softmax else (problem.input, problem.input)
        chunk.run(shared_matrix, peak, scale, matrix, SOFTMAX=softmax)
    return matrix
