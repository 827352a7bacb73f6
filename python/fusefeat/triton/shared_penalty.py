"""Shared assignment and its statistics in Triton: arguments and results as in the operator schema.

Nothing here looks at a tensor's values. The work is cut into chunks of rows, as many as the shape asks for, which is
why torch.compile does not trace into these operators.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusefeat.triton._launch import opaque_operator
from fusefeat.triton._shared_penalty_gradients import LogitGradients, run_assignment_gradients, run_gradients
from fusefeat.triton._shared_penalty_problem import check, check_values, in_acc, make_problem
from fusefeat.triton._shared_penalty_statistics import run_matrix, run_statistics
from fusefeat.triton._shared_penalty_sums import Gradients


@opaque_operator("shared_penalty_triton")
def shared_penalty(
    context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, margin: float,
    row_weight: Tensor | None, operand: int, with_clamp: bool, keep_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = make_problem(context, input, weight, bias, margin, row_weight, operand)
    check(0 <= keep_rows <= problem.rows, "keep_rows must be in [0, N]")
    found, kept = run_statistics(problem, True, with_clamp, keep_rows)
    return found.row_entropy, found.lse, found.prob_sum, found.row_excess, found.fired, kept


@opaque_operator("shared_penalty_backward_triton")
def shared_penalty_backward(
    grad_row_entropy: Tensor | None, grad_lse: Tensor | None, grad_prob_sum: Tensor | None,
    grad_row_excess: Tensor | None, context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None,
    margin: float, row_weight: Tensor | None, operand: int, row_entropy: Tensor, lse: Tensor, kept: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = make_problem(context, input, weight, bias, margin, row_weight, operand)
    check(len(needs) == 5, "needs must have 5 entries")
    rows, acc = problem.rows, problem.acc
    check_values(input, grad_row_entropy, (rows,), "grad_row_entropy")
    check_values(input, grad_lse, (rows,), "grad_lse")
    check_values(input, grad_prob_sum, (problem.features,), "grad_prob_sum")
    check_values(input, grad_row_excess, (rows,), "grad_row_excess")
    check_values(input, row_entropy, (rows,), "row_entropy")
    check_values(input, lse, (rows,), "lse")
    if kept.dim() == 2:
        fits = kept.shape[0] <= rows and kept.shape[1] == problem.features
        check(fits and kept.dtype == acc and kept.is_contiguous(), "kept must be as the forward left it")
    gradients = Gradients(problem, (context, input, weight, bias), needs[:4])
    incoming = LogitGradients(
        problem,
        entropy=in_acc(grad_row_entropy, acc),
        lse=in_acc(grad_lse, acc),
        prob_sum=in_acc(grad_prob_sum, acc),
        excess=in_acc(grad_row_excess, acc),
        row_entropy=in_acc(row_entropy, acc),
        row_lse=in_acc(lse, acc),
    )
    need_dots = needs[4] and row_weight is not None
    dots = run_gradients(problem, gradients, incoming, kept, need_dots)
    return *gradients.results(), dots if row_weight is None else dots.to(row_weight.dtype)


@opaque_operator("shared_assignment_triton")
def shared_assignment(
    context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, margin: float, operand: int
) -> Tensor:
    return run_matrix(make_problem(context, input, weight, bias, margin, None, operand), True, input.dtype)


@opaque_operator("shared_assignment_backward_triton")
def shared_assignment_backward(
    grad: Tensor, context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, margin: float,
    operand: int, assignment: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = make_problem(context, input, weight, bias, margin, None, operand)
    check(len(needs) == 4, "needs must have 4 entries")
    shape = (problem.rows, problem.features)
    check_values(input, grad, shape, "grad")
    check_values(input, assignment, shape, "assignment")
    gradients = Gradients(problem, (context, input, weight, bias), needs)
    run_assignment_gradients(problem, gradients, grad, assignment)
    return gradients.results()
