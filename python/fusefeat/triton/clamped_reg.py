"""The clamp statistics and the clamped matrix in Triton: arguments and results as in the operator schema."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusefeat.triton._launch import opaque_operator
from fusefeat.triton._shared_penalty_gradients import LogitGradients, run_gradients
from fusefeat.triton._shared_penalty_problem import Problem, check, check_values, in_acc, make_problem
from fusefeat.triton._shared_penalty_statistics import run_matrix, run_statistics
from fusefeat.triton._shared_penalty_sums import Gradients


@opaque_operator("clamped_reg_triton")
def clamped_reg(
    context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, margin: float,
    row_weight: Tensor | None, operand: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = make_problem(context, input, weight, bias, margin, row_weight, operand)
    found, _ = run_statistics(problem, False, True, 0)
    return found.row_excess, found.fired


@opaque_operator("clamped_reg_backward_triton")
def clamped_reg_backward(
    grad_row_excess: Tensor, context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None,
    margin: float, row_weight: Tensor | None, operand: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = make_problem(context, input, weight, bias, margin, row_weight, operand)
    check_values(input, grad_row_excess, (problem.rows,), "grad_row_excess")
    incoming = LogitGradients(problem, excess=in_acc(grad_row_excess, problem.acc))
    return _gradients(problem, (context, input, weight, bias), incoming, needs)


@opaque_operator("clamped_activation_triton")
def clamped_activation(
    context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, margin: float, operand: int
) -> Tensor:
    return run_matrix(make_problem(context, input, weight, bias, margin, None, operand), False, input.dtype)


@opaque_operator("clamped_activation_backward_triton")
def clamped_activation_backward(
    grad: Tensor, context: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None, margin: float,
    operand: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = make_problem(context, input, weight, bias, margin, None, operand)
    check_values(input, grad, (problem.rows, problem.features), "grad")
    return _gradients(problem, (context, input, weight, bias), LogitGradients(problem, matrix=grad), needs)


def _gradients(
    problem: Problem, tensors: Sequence[Tensor | None], incoming: LogitGradients, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(len(needs) == 4, "needs must have 4 entries")
    gradients = Gradients(problem, tensors, needs)
    run_gradients(problem, gradients, incoming, None, False)
    return gradients.results()
