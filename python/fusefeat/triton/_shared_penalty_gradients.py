"""The backward of the shared-logits family: a chunk of rows at a time, dz, and from it every gradient."""

from __future__ import annotations

from torch import Tensor

from fusefeat.triton import _shared_penalty_tuning as tuning
from fusefeat.triton._launch import launch
from fusefeat.triton._shared_penalty_backward import (
    shared_assignment_dots,
    shared_grad_assignment,
    shared_grad_logits,
    shared_row_dots,
)
from fusefeat.triton._shared_penalty_chunks import Chunk, chunks_of, sum_parts
from fusefeat.triton._shared_penalty_problem import Problem
from fusefeat.triton._shared_penalty_sums import Gradients
from fusefeat.triton._shared_penalty_tuning import cdiv


class LogitGradients:
    """Incoming gradients of the statistics or of the clamped matrix, and what the formula of dz needs of the rows."""

    def __init__(
        self,
        problem: Problem,
        *,
        entropy: Tensor | None = None,
        lse: Tensor | None = None,
        prob_sum: Tensor | None = None,
        excess: Tensor | None = None,
        matrix: Tensor | None = None,
        row_entropy: Tensor | None = None,
        row_lse: Tensor | None = None,
    ) -> None:
        self.problem = problem
        self.entropy, self.lse, self.prob_sum, self.excess = entropy, lse, prob_sum, excess
        self.matrix, self.row_entropy, self.row_lse = matrix, row_entropy, row_lse

    def dots_of(self, chunk: Chunk, dots: Tensor) -> None:
        """dots = sum_k P_nk prob_sum_k of the chunk's rows."""
        parts = self.problem.new(chunk.tiles[1], chunk.rows)
        chunk.run(shared_row_dots, self.row_lse, self.prob_sum, parts)
        sum_parts(parts, dots)

    def dz_of(self, chunk: Chunk, dots: Tensor, dz: Tensor | None, bias_parts: Tensor | None) -> None:
        given = (self.row_lse, self.row_entropy, self.entropy, self.lse, self.prob_sum, dots, self.excess)
        unused = self.problem.input
        matrix = unused if self.matrix is None else self.matrix
        chunk.run(
            shared_grad_logits,
            *(unused if tensor is None else tensor for tensor in given),
            matrix, *matrix.stride(), unused if dz is None else dz, unused if bias_parts is None else bias_parts,
            HAS_ENTROPY=self.entropy is not None, HAS_LSE=self.lse is not None, HAS_PROB=self.prob_sum is not None,
            HAS_EXCESS=self.excess is not None, HAS_MATRIX=self.matrix is not None,
            NEED_DZ=dz is not None, NEED_BIAS=bias_parts is not None, TF32=self.problem.tf32,
        )  # fmt: skip


def run_gradients(
    problem: Problem, gradients: Gradients, incoming: LogitGradients, kept: Tensor | None, need_dots: bool
) -> Tensor:
    """Everything that depends on the logits. Returns sum_k P_nk prob_sum_k per row where need_dots."""
    tile = problem.tile(problem.operand is None)
    keep_rows = kept.shape[0] if kept is not None and kept.dim() == 2 else 0
    wanted = gradients.need_dz or gradients.need_bias
    with_dots = incoming.prob_sum is not None and (wanted or need_dots)
    features, acc = problem.features, problem.acc.itemsize
    row_bytes = gradients.row_bytes + features * acc / tile.block_m + acc * cdiv(features, tile.block_f)
    # The library's products become dz in place, but for those that are kept.
    own_dz = gradients.need_dz and (problem.operand is not None or keep_rows > 0)
    row_bytes += features * problem.dz_type.itemsize * own_dz
    all_dots = problem.new(problem.rows if need_dots else 0)
    if not with_dots:
        all_dots.zero_()
    if not (wanted or with_dots):
        return all_dots
    scratch = problem.new(0)
    for chunk in chunks_of(problem, row_bytes, kept, keep_rows, kept_ready=True):
        dots = all_dots[chunk.begin : chunk.end] if need_dots else problem.new(chunk.rows if with_dots else 0)
        if with_dots:
            incoming.dots_of(chunk, dots)
        if not wanted:
            continue
        dz = None
        if gradients.need_dz:
            if problem.operand is None and not chunk.kept:
                dz = chunk.raw
            else:
                if scratch.numel() < chunk.rows * features:
                    scratch = problem.new(chunk.rows, features, dtype=problem.dz_type)
                dz = scratch[: chunk.rows]
        bias_parts = problem.new(chunk.tiles[0], features) if gradients.need_bias else None
        incoming.dz_of(chunk, dots, dz, bias_parts)
        gradients.add(chunk.begin, chunk.end, problem.input if dz is None else dz, bias_parts)
    return all_dots


def run_assignment_gradients(problem: Problem, gradients: Gradients, grad: Tensor, assignment: Tensor) -> None:
    """The same of a given assignment and its incoming gradient."""
    if not (gradients.need_dz or gradients.need_bias):
        return
    tile = problem.tile(from_raw=True)
    features, acc = problem.features, problem.acc.itemsize
    column_tiles = cdiv(features, tile.block_f)
    row_bytes = gradients.row_bytes + features * acc / tile.block_m + acc * column_tiles
    row_bytes += features * problem.dz_type.itemsize
    config = {"GROUP": 8, "BLOCK_M": tile.block_m, "BLOCK_F": tile.block_f, "num_warps": tile.num_warps}
    matrices = (grad, *grad.stride(), assignment, *assignment.stride())
    for begin, end in tuning.chunks(problem.rows, int(row_bytes), 0, tile.block_m, 0):
        span = end - begin
        row_tiles = cdiv(span, tile.block_m)
        grid = (row_tiles * column_tiles,)
        dots, parts = problem.new(span), problem.new(column_tiles, span)
        launch(shared_assignment_dots, grid, *matrices, begin, end, features, parts, **config)
        sum_parts(parts, dots)
        dz = problem.new(span if gradients.need_dz else 0, features, dtype=problem.dz_type)
        bias_parts = problem.new(row_tiles, features) if gradients.need_bias else None
        launch(
            shared_grad_assignment, grid, *matrices, begin, end, features,
            problem.margin, dots, dz, dots if bias_parts is None else bias_parts,
            NEED_DZ=gradients.need_dz, NEED_BIAS=bias_parts is not None, TF32=problem.tf32, **config,
        )  # fmt: skip
        gradients.add(begin, end, dz, bias_parts)
