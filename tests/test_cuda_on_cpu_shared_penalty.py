"""The CUDA kernels of the shared-penalty family, run on the CPU, against the reference in float64.

They are compiled with small chunks of rows, so that most cases take several.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import fusefeat
import pytest
import shared_calls
import shared_cases
import torch
from cuda_on_cpu.build import NAMESPACE
from cuda_on_cpu.kernels import cuda_backend, in_both_orders, kernel_library, poisoned_memory  # noqa: F401 (fixtures)
from fusefeat.reference import clamped_reg as clamp_reference
from fusefeat.reference import shared_penalty as reference
from shared_calls import INF, NAMES, NAN, STATISTICS, TOLERANCE, Call, check, error, expect, incoming, make, strided
from torch import Tensor

pytestmark = pytest.mark.usefixtures("library", "poisoned_memory", "seeded")

DOUBLE, FLOAT, BF16, HALF = torch.float64, torch.float32, torch.bfloat16, torch.float16
TYPES = [DOUBLE, FLOAT, BF16, HALF]
each_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


class Ops:
    """The operators in the test's namespace, each called twice: with threads in ascending and descending order."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(getattr(torch.ops, NAMESPACE), name)

        def call(*args: Any) -> Any:
            results: Sequence[Tensor] = []

            def run() -> Sequence[Tensor]:
                nonlocal results
                results = operator(*args)
                return [results] if isinstance(results, Tensor) else results

            in_both_orders(self.library, run)
            return results

        return call


@pytest.fixture
def ops(library: ctypes.CDLL) -> Ops:
    return Ops(library)


# rows, context rows, channels, features: tails and borders of tiles, chunks, segments of features and parts of sums;
# rows of whole 16-byte vectors (channels are a multiple of 8) and others.
SHAPES = [
    (1, 0, 1, 1),
    (70, 30, 33, 1),
    (3, 2, 40, 129),
    (65, 31, 64, 258),
    (300, 77, 24, 50),
    (128, None, 128, 128),
    (257, 0, 136, 20),
    (33, 7, 1100, 37),
    (9, 4, 16, 2500),
    (20, 4, 8, 1100),
    (1100, 50, 8, 12),
    (1000, None, 3, 16),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_gradients(ops: Ops, shape: tuple[int, int | None, int, int], dtype: torch.dtype) -> None:
    call = make(*shape, dtype)
    grads = incoming(call)
    check(shared_calls.run(ops, call, grads), expect(call, grads), dtype)


@each_dtype
@pytest.mark.parametrize("channels", [16, 30])
@pytest.mark.parametrize("keep", [1, 64, 100, 231])
def test_kept_logits_give_the_same(ops: Ops, keep: int, channels: int, dtype: torch.dtype) -> None:
    call = make(180, 51, channels, 150, dtype, row_weight=keep < 231)
    grads = incoming(call)
    recomputed, kept = shared_calls.run(ops, call, grads), shared_calls.run(ops, call, grads, keep=keep)
    for name, want in recomputed.items():
        if name in STATISTICS:
            assert error(kept[name], want) <= 1e-6, name  # chunks end elsewhere
        else:
            assert error(kept[name], want) <= TOLERANCE[dtype] / 4, name
    check(kept, expect(call, grads), dtype)


@pytest.mark.parametrize("operand", [1, 2])
@pytest.mark.parametrize("channels", [72, 13])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF], ids=str)
def test_rounded_operands(ops: Ops, dtype: torch.dtype, channels: int, operand: int) -> None:
    call = make(50, 20, channels, 40, dtype, operand=operand)
    grads = incoming(call)
    got, want = shared_calls.run(ops, call, grads), expect(call, grads)
    for name in STATISTICS[:4]:
        assert error(got[name], want[name]) <= 2e-6, name
    coarse = BF16 if BF16 in (dtype, reference.OPERAND_DTYPES[operand]) else HALF
    for name in ("grad_context", "grad_input", "grad_weight", "grad_bias"):
        assert error(got[name], want[name]) <= TOLERANCE[coarse], name


@pytest.mark.parametrize("operand", [0, 1, 2])
def test_mixed_types(ops: Ops, operand: int) -> None:
    """Activations in half types, parameters in float32, with and without rounding."""
    call = make(50, 9, 72, 40, FLOAT, operand=operand)
    call.input = call.input.bfloat16()
    grads = incoming(call)
    got = shared_calls.run(ops, call, grads)
    assert (got["grad_input"].dtype, got["grad_weight"].dtype) == (BF16, FLOAT)
    check(got, expect(call, grads), BF16)


def test_small_gradients_in_float16(ops: Ops) -> None:
    """Gradients of logits far below float16's smallest number still reach the weight."""
    call = make(40, None, 16, 200, HALF, row_weight=False)
    grads = [g * 1e-9 for g in incoming(call)]
    got, want = shared_calls.run(ops, call, grads), expect(call, [g * 2.0**30 for g in grads])
    assert (got["grad_weight"].float() == 0).all()  # too small to be stored
    call.weight = call.weight.float()
    call.operand = 2
    got = shared_calls.run(ops, call, grads)
    assert error(got["grad_weight"].double() * 2.0**30, want["grad_weight"]) <= TOLERANCE[HALF]


@pytest.mark.parametrize("dtype", [DOUBLE, FLOAT], ids=str)
def test_large_margin(ops: Ops, dtype: torch.dtype) -> None:
    call = make(90, 10, 16, 140, dtype, margin=100.0)
    grads = incoming(call)
    got, want = shared_calls.run(ops, call, grads), expect(call, grads)
    for name, wanted in want.items():  # the rounding of a logit of some hundreds shows in its exponential
        assert error(got[name], wanted) <= (1e-3 if dtype == FLOAT else 1e-12), name


@each_dtype
@pytest.mark.parametrize("channels", [12, 24])
def test_switched_off_features(ops: Ops, channels: int, dtype: torch.dtype) -> None:
    call = make(40, 3, channels, 2100, dtype)
    assert call.bias is not None
    call.bias[:1060] = -INF  # a whole segment of features and a few of the next
    call.bias[-1] = -INF
    grads = incoming(call)
    grads[2][0] = INF  # of a feature that is off
    got = shared_calls.run(ops, call, grads)
    grads[2][0] = 0
    check(got, expect(call, grads), dtype)
    off = call.bias == -INF
    for name in ("prob_sum", "grad_bias", "grad_weight"):
        assert (got[name][off] == 0).all(), name


@each_dtype
@pytest.mark.parametrize("channels", [20, 24])
@pytest.mark.parametrize("keep", [0, 110])
def test_rows_of_weight_zero_are_not_read(ops: Ops, keep: int, channels: int, dtype: torch.dtype) -> None:
    call = make(60, 50, channels, 140, dtype)
    assert call.row_weight is not None
    grads = incoming(call)
    want = shared_calls.run(ops, call, grads, keep)
    got = shared_calls.run(ops, shared_calls.with_unread_rows(call, NAN), grads, keep)
    for name, wanted in want.items():
        assert torch.equal(got[name], wanted), name
    unread = call.row_weight == 0
    rows = torch.cat([got["grad_context"], got["grad_input"]])
    for values in (rows, got["row_entropy"], got["lse"], got["row_excess"], got["grad_row_weight"]):
        assert (values[unread] == 0).all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("channels", [9, 16])
@each_dtype
def test_a_bad_used_row_spoils_itself_and_the_sums(ops: Ops, channels: int, value: float, dtype: torch.dtype) -> None:
    call = make(70, None, channels, 150, dtype, row_weight=False)
    grads = incoming(call)
    clean = shared_calls.run(ops, call, grads)
    call.input[37, 4] = value
    got = shared_calls.run(ops, call, grads)
    others = torch.arange(70) != 37
    for name in ("row_entropy", "lse", "grad_input"):
        assert got[name][37].isnan().all(), name
        assert torch.equal(got[name][others], clean[name][others]), name
    for name in ("prob_sum", "grad_weight", "grad_bias"):
        assert got[name].isnan().all(), name
    if value != value:
        assert got["row_excess"][37].isnan()
        assert torch.equal(got["fired"], expect(call, grads)["fired"])


@each_dtype
@pytest.mark.parametrize("channels", [3, 8])
def test_infinite_weights_reach_no_row_that_is_not_read(ops: Ops, channels: int, dtype: torch.dtype) -> None:
    call = make(9, None, channels, 20, dtype, bias=False)
    call.input.abs_()
    call.weight[7] = -INF  # z = -inf in every row that is read
    call.row_weight = torch.ones(9, dtype=call.acc)
    call.row_weight[[2, 5]] = 0
    grads = incoming(call)
    got = shared_calls.run(ops, call, [*grads[:3], None])
    assert got["prob_sum"][7] == 0 and got["prob_sum"].isfinite().all()
    assert (got["grad_weight"][7] == 0).all() and got["grad_weight"].isfinite().all()
    assert (got["grad_input"][[2, 5]] == 0).all()


@each_dtype
def test_ties_give_no_gradient(ops: Ops, dtype: torch.dtype) -> None:
    # z = 2 * (x + 0.5): -1, 2 (the margin itself) and 4.
    input = torch.tensor([[-1.0], [0.5], [1.5]], dtype=dtype)
    logits = (None, input, torch.ones(1, 1, dtype=dtype), torch.tensor([0.5], dtype=dtype), 2.0)
    excess, fired = ops.clamped_reg(*logits, None, 0)
    assert excess.tolist() == [0, 0, 2] and fired.tolist() == [1]
    grad = torch.tensor([3.0, 5.0, 7.0], dtype=shared_calls.acc_of(dtype))
    _, grad_input, grad_weight, grad_bias = ops.clamped_reg_backward(grad, *logits, None, 0, [True] * 4)
    assert grad_input.flatten().tolist() == [0, 0, 14]
    assert (grad_weight.item(), grad_bias.item()) == (21, 14)
    assert ops.clamped_activation(*logits, 0).flatten().tolist() == [2, 2, 4]


@each_dtype
@pytest.mark.parametrize("shape", [(65, 31, 64, 258), (300, 7, 5, 40), (9, None, 16, 1100)], ids=str)
def test_clamped_reg(ops: Ops, shape: tuple[int, int | None, int, int], dtype: torch.dtype) -> None:
    call = make(*shape, dtype)
    args = (*call.logit_args(), call.row_weight, call.operand)
    grad = torch.randn(call.rows, dtype=call.acc)
    got = dict(zip(("row_excess", "fired"), ops.clamped_reg(*args), strict=True))
    grads = ops.clamped_reg_backward(grad, *args, [True] * 4)
    got |= {f"grad_{name}": g for name, g in zip(NAMES, grads, strict=False)}
    wide = call.in_float64()
    wanted = clamp_reference.statistics(*wide.logit_args(), wide.row_weight, 0)
    want = {"row_excess": wanted[0].detach(), "fired": wanted[1]}
    want |= shared_calls.gradients_of(wide, wanted[:1], [grad])
    want.pop("grad_row_weight")
    check(got, want, dtype)


@each_dtype
@pytest.mark.parametrize("kind", ["shared_assignment", "clamped_activation"])
@pytest.mark.parametrize("shape", [(65, 31, 64, 258), (300, 7, 5, 40), (9, None, 16, 1100)], ids=str)
def test_matrices(ops: Ops, shape: tuple[int, int | None, int, int], kind: str, dtype: torch.dtype) -> None:
    call = make(*shape, dtype, row_weight=False)
    function = reference.assignment if kind == "shared_assignment" else clamp_reference.activation
    grad = torch.randn(call.weight.shape[0], call.rows).to(dtype).t()
    matrix = getattr(ops, kind)(*call.logit_args(), 0)
    assert matrix.dtype == dtype and matrix.is_contiguous()
    saved = (matrix,) if kind == "shared_assignment" else ()
    grads = getattr(ops, f"{kind}_backward")(grad, *call.logit_args(), 0, *saved, [True] * 4)
    wide = call.in_float64()
    wanted = function(*wide.logit_args(), 0)
    assert error(matrix, wanted) <= TOLERANCE[dtype]
    want = shared_calls.gradients_of(wide, [wanted], [grad])
    for name, got in zip(NAMES, grads, strict=False):
        if f"grad_{name}" in want:
            # Softmax gradients cancel: with the stored probabilities' rounding, as in eager.
            assert error(got, want[f"grad_{name}"]) <= 4 * TOLERANCE[dtype], name


@each_dtype
def test_strides(ops: Ops, dtype: torch.dtype) -> None:
    """Strided operands take another path than those in whole vectors do."""
    call = make(50, 30, 72, 140, dtype)
    grads = incoming(call)
    changes = {n: strided(t) for n, t in zip(NAMES, call.tensors(), strict=True) if t is not None}
    moved = replace(call, **changes)
    check(shared_calls.run(ops, moved, [strided(g) for g in grads]), expect(call, grads), dtype)
    plain = replace(call, input=call.input[:, :70], context=call.context[:, :70], weight=call.weight[:, :70])
    check(shared_calls.run(ops, plain, grads), expect(plain, grads), dtype)
    matrix = ops.shared_assignment(*plain.logit_args(), 0)
    grad = torch.randn(matrix.shape).to(dtype)
    wanted = ops.shared_assignment_backward(grad, *plain.logit_args(), 0, matrix, [True] * 4)
    found = ops.shared_assignment_backward(strided(grad), *plain.logit_args(), 0, strided(matrix), [True] * 4)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_expanded_gradients(ops: Ops) -> None:
    call = make(50, 30, 20, 40, FLOAT)
    expanded = [torch.tensor(0.3).expand(g.shape) for g in incoming(call)]
    got = shared_calls.run(ops, call, expanded)
    want = shared_calls.run(ops, call, [g.contiguous() for g in expanded])
    assert all(torch.equal(got[name], want[name]) for name in want)
    ones = torch.ones(()).expand(call.rows, 40)
    a = ops.clamped_activation_backward(ones, *call.logit_args(), 0, [True] * 4)
    b = ops.clamped_activation_backward(ones.contiguous(), *call.logit_args(), 0, [True] * 4)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("present", range(1, 16))
def test_absent_gradients_are_zero(ops: Ops, present: int) -> None:
    call = make(40, 9, 12, 33, DOUBLE)
    grads = [g if present >> i & 1 else None for i, g in enumerate(incoming(call))]
    got = shared_calls.run(ops, call, grads)
    for name, wanted in expect(call, grads).items():
        if name.startswith("grad_"):
            assert error(got[name], wanted) <= 1e-13, name


@pytest.mark.parametrize("wanted", [1, 2, 4, 8, 16, 6, 9, 0])
def test_only_the_gradients_asked_for(ops: Ops, wanted: int) -> None:
    call = make(50, 50, 16, 130, BF16)
    grads = incoming(call)
    needs = [bool(wanted >> i & 1) for i in range(5)]
    all_of_them = shared_calls.run(ops, call, grads)
    got = shared_calls.run(ops, call, grads, needs=needs)
    for name, need in zip(NAMES, needs, strict=True):
        if need:
            assert torch.equal(got[f"grad_{name}"], all_of_them[f"grad_{name}"]), name
        else:
            assert got[f"grad_{name}"].shape == (0,), name


@each_dtype
@pytest.mark.parametrize("why", ["no rows", "no weight"])
def test_nothing_to_do(ops: Ops, why: str, dtype: torch.dtype) -> None:
    call = make(0 if why == "no rows" else 20, 0 if why == "no rows" else 3, 7, 11, dtype)
    assert call.row_weight is not None
    call.row_weight.zero_()
    got = shared_calls.run(ops, call, incoming(call), keep=1000)
    assert all((t == 0).all() for t in got.values())
    assert got["grad_weight"].shape == (11, 7) and got["prob_sum"].shape == (11,)
    empty = torch.empty(0, 7, dtype=dtype)
    matrix = ops.shared_assignment(None, empty, call.weight, call.bias, 1.0, 0)
    assert matrix.shape == (0, 11)
    grads = ops.shared_assignment_backward(matrix, None, empty, call.weight, call.bias, 1.0, 0, matrix, [True] * 4)
    assert (grads[2] == 0).all() and (grads[3] == 0).all()


def test_no_channels(ops: Ops) -> None:
    call = make(40, 3, 0, 21, FLOAT)
    grads = incoming(call)
    check(shared_calls.run(ops, call, grads), expect(call, grads), FLOAT)


def test_wrong_arguments(ops: Ops) -> None:
    call: Call = make(10, 3, 6, 5, FLOAT)
    with pytest.raises(RuntimeError, match="weight must be"):
        ops.shared_penalty(call.context, call.input, torch.randn(5, 7), None, 1.0, None, 0, False, 0)
    with pytest.raises(RuntimeError, match="margin must be"):
        ops.clamped_reg(call.context, call.input, call.weight, None, NAN, None, 0)
    with pytest.raises(RuntimeError, match="keep_rows"):
        ops.shared_penalty(*call.logit_args(), None, 0, False, 14)
    with pytest.raises(RuntimeError, match="grad_lse"):
        shared_calls.run(ops, call, [None, torch.randn(4), None, None])


@each_dtype
@pytest.mark.parametrize("name", shared_cases.CASES)
@pytest.mark.usefixtures("cuda_backend")
def test_shared_cases(name: str, dtype: torch.dtype) -> None:
    inputs = shared_cases.CASES[name](dtype)
    shared_cases.compare_objective(fusefeat.shared_objective, inputs, "cuda")
    shared_cases.compare_reg(fusefeat.clamped_reg, inputs, "cuda")
    if "garbage" not in name:
        shared_cases.compare_matrix(fusefeat.shared_assignment, inputs, "cuda")
        shared_cases.compare_matrix(fusefeat.clamped_activation, inputs, "cuda")
