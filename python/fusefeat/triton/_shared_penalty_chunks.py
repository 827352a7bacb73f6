"""Chunks of rows, and kernels run on one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusefeat.triton import _shared_penalty_tuning as tuning
from fusefeat.triton._launch import launch
from fusefeat.triton._shared_penalty_forward import shared_sum
from fusefeat.triton._shared_penalty_problem import Problem
from fusefeat.triton._shared_penalty_tuning import cdiv


@dataclass
class Chunk:
    """Rows [begin, end). raw [rows, features] is where their products lie (ready) or are to be left, if anywhere."""

    problem: Problem
    begin: int
    end: int
    raw: Tensor | None
    ready: bool
    kept: bool

    @property
    def rows(self) -> int:
        return self.end - self.begin

    @property
    def tiles(self) -> tuple[int, int]:
        """Row tiles and column tiles of kernels on logits."""
        tile = self.problem.tile(self.ready)
        return self.problem.row_tiles(self.begin, self.end, tile.block_m), cdiv(self.problem.features, tile.block_f)

    def run(self, kernel: Any, *args: Any, store_raw: bool = False, **flags: bool) -> None:
        """A kernel on logits, which takes `args` and `flags` beside what they are made of."""
        row_tiles, column_tiles = self.tiles
        launch(
            kernel,
            (row_tiles * column_tiles,),
            *self.problem.logits_args(self.begin, self.end, self.raw),
            *args,
            **flags,
            **self.problem.logits_config(self.ready, store_raw),
        )


def chunks_of(
    problem: Problem, row_bytes: float, kept: Tensor | None, keep_rows: int, kept_ready: bool
) -> Iterator[Chunk]:
    """All chunks. row_bytes: scratch of the caller per row. kept holds the products of the first rows, or gets them."""
    with_library = problem.operand is None
    if with_library and keep_rows < problem.rows:
        row_bytes += problem.features * problem.acc.itemsize
    kept_bytes = 0 if kept is None else kept.numel() * kept.element_size()
    block = problem.tile(with_library).block_m
    ranges = tuning.chunks(problem.rows, int(row_bytes), kept_bytes, block, keep_rows)
    longest = max((end - begin for begin, end in ranges if end > keep_rows), default=0)
    scratch = problem.new(longest, problem.features) if with_library and longest else None
    for begin, end in ranges:
        is_kept = end <= keep_rows
        raw = scratch[: end - begin] if scratch is not None else None
        if is_kept and kept is not None:
            raw = kept[begin:end]
        ready = is_kept and kept_ready
        if with_library and not ready:
            assert raw is not None
            problem.multiply(begin, end, raw)
            ready = True
        yield Chunk(problem, begin, end, raw, ready, is_kept)


def sum_parts(parts: Tensor, total: Tensor, add: bool = False) -> None:
    """total = parts.sum(0), or += it, in a fixed order; the rows of parts may lie apart."""
    width = total.numel()
    if width:
        block_s, block_n = (1, 1024) if parts.shape[0] == 1 else (32, 64)
        launch(
            shared_sum, (cdiv(width, block_n),), parts, parts.stride(0), total, parts.shape[0], width,
            ADD=add, BLOCK_S=block_s, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
