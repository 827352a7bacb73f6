"""The CPU operators of the shared-penalty family as kernels: every instruction set this machine has, the borders of
strips, blocks and chunks, strides, special values, kept logits, threads. Held to the reference in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import shared_calls
import torch
from cpu_isas import every_isa  # noqa: F401 (the fixture isa)
from fusefeat.ops.shared_loss import kept_dtype
from fusefeat.reference import clamped_reg as clamp_reference
from fusefeat.reference import shared_penalty as reference
from shared_calls import (
    INF,
    NAMES,
    NAN,
    STATISTICS,
    TOLERANCE,
    acc_of,
    check,
    check_rounded_gradients,
    error,
    errors_beside_eager,
    expect,
    gradients_of,
    incoming,
    loss_gradients,
    make,
    penalty_gradients,
    strided,
    with_unread_rows,
)  # fmt: skip

OPS = torch.ops.fusefeat
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
run = functools.partial(shared_calls.run, OPS)
# rows, context rows, channels, features: strips and blocks of features, one or many, odd and even, N < F and N > F.
SHAPES = [
    (5, None, 3, 7),
    (1, 0, 1, 1),
    (70, 30, 33, 1),
    (3, 2, 40, 129),
    (65, 31, 64, 258),
    (300, 77, 20, 50),
    (530, None, 130, 128),
    (33, 7, 1100, 37),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_and_gradients(isa: str, shape: tuple[int, int | None, int, int], dtype: torch.dtype) -> None:
    call = make(*shape, dtype)
    grads = incoming(call)
    check(run(call, grads), expect(call, grads), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_without_bias_and_row_weight(isa: str, dtype: torch.dtype) -> None:
    call = make(40, None, 24, 200, dtype, bias=False, row_weight=False)
    grads = incoming(call)
    got = run(call, grads)
    check(got, expect(call, grads), dtype)
    for name in ("grad_context", "grad_bias", "grad_row_weight"):
        assert got[name].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_chunks(isa: str, dtype: torch.dtype) -> None:
    # 2 MiB of logits at a time: the rows are cut into three chunks, the features into thirty-two blocks.
    call = make(600, 100, 8, 4096, dtype)
    grads = incoming(call)
    want = expect(call, grads)
    check(run(call, grads), want, dtype)
    check(run(call, grads, keep=320), want, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("keep", [1, 64, 100, 201, 1000])
def test_kept_logits_give_the_same(isa: str, keep: int, dtype: torch.dtype) -> None:
    call = make(180, 51, 30, 150, dtype, row_weight=keep < 201)
    grads = incoming(call)
    recomputed, kept = run(call, grads), run(call, grads, keep=keep)
    for name, want in recomputed.items():
        if name in STATISTICS:
            assert torch.equal(kept[name], want), name
        else:
            assert error(kept[name], want) <= TOLERANCE[dtype] / 4, name


# Features in one block and in two, more channels than are multiplied at a time, and so many features that rows are cut
# into chunks.
ROUNDED = [(30, 100), (30, 150), (1100, 150), (4, 20000)]


@pytest.mark.parametrize(("channels", "features"), ROUNDED)
@pytest.mark.parametrize("keep", [0, 64, 300])
def test_statistics_are_those_of_rounded_logits(isa: str, keep: int, channels: int, features: int) -> None:
    x, weight = (torch.randint(-16, 17, (n, channels)).bfloat16() / 32 for n in (300, features))
    found = OPS.shared_loss(None, x, weight, None, 1.0, 0, 1.0, 1.0, False, 0.0, 0.0, keep)
    penalty, _, entropy, lse, prob_sum = found[:5]
    exact = x.double() @ weight.double().T  # and so are the kernel's sums
    z = exact.half().double()
    assert channels < 30 or not torch.equal(z, exact)
    log_probs = z.log_softmax(1)
    probs = log_probs.exp()
    assert error(lse, z.logsumexp(1)) <= 3e-7
    assert error(entropy, -(probs * log_probs).sum(1)) <= 2e-6
    assert error(prob_sum, probs.sum(0)) <= 5e-7
    assert error(penalty, shared_calls.plain_penalty(z) + math.log(features)) <= 2e-6


@pytest.mark.parametrize(("channels", "features"), ROUNDED)
@pytest.mark.parametrize("keep", [0, 64, 300])
def test_gradients_are_those_of_rounded_logits(isa: str, keep: int, channels: int, features: int) -> None:
    check_rounded_gradients(OPS, 300, channels, features, keep)


@pytest.mark.parametrize(("channels", "features"), ROUNDED)
@pytest.mark.parametrize("keep", [0, 64, 300])
def test_logits_kept_in_float16(isa: str, keep: int, channels: int, features: int) -> None:
    """Gradients lose less to them than plain PyTorch's lose to its own in bfloat16; the others' are rounded, too."""
    x, weight = torch.randn(300, channels).bfloat16(), torch.randn(features, channels).bfloat16()
    got, kept = loss_gradients(OPS, x, weight, keep)
    assert kept.dtype == torch.float16 and kept.shape == ((keep, features) if keep else (0,))
    for mine, eager in errors_beside_eager(x, weight, got):
        assert mine <= 1.1 * eager


@pytest.mark.parametrize(
    ("rows", "features", "rounded"), [(127, 200, False), (128, 200, True), (50, 51, False), (50, 50, True)]
)
def test_logits_of_few_rows_are_kept_unrounded(rows: int, features: int, rounded: bool) -> None:
    x, weight = torch.randn(rows, 6).bfloat16(), torch.randn(features, 6).bfloat16()
    for with_reg in (False, True):
        *_, kept = OPS.shared_loss(None, x, weight, None, 1.0, 0, 1.0, 1.0, with_reg, 1.0, 0.0, rows)
        assert kept.dtype == (torch.float16 if rounded and not with_reg else torch.float32)
        assert kept.dtype == kept_dtype(x.dtype, with_reg, rows, features)


def test_long_sums_are_rounded_no_more_than_short_ones(isa: str) -> None:
    """Logits of a thousand channels are sums of sums."""
    errors = []
    for channels in (256, 1024):
        x, weight = torch.randn(96, channels), torch.randn(500, channels) * channels**-0.5
        got, want = loss_gradients(OPS, x, weight)[0], penalty_gradients(x.double(), weight.double())
        errors.append([error(mine, true) for mine, true in zip(got, want, strict=True)])
    assert all(long <= 1.3 * short for short, long in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("operand", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_operands(isa: str, dtype: torch.dtype, operand: int) -> None:
    call = make(50, 20, 70, 40, dtype, operand=operand)
    grads = incoming(call)
    got, want = run(call, grads), expect(call, grads)
    for name in STATISTICS[:4]:
        assert error(got[name], want[name]) <= 2e-6, name
    coarse = torch.bfloat16 if torch.bfloat16 in (dtype, reference.OPERAND_DTYPES[operand]) else torch.float16
    for name in ("grad_context", "grad_input", "grad_weight", "grad_bias"):
        assert error(got[name], want[name]) <= TOLERANCE[coarse], name


def test_mixed_types(isa: str) -> None:
    """As under autocast: activations in bfloat16, parameters in float32."""
    call = make(50, None, 70, 40, torch.float32, operand=1)
    call.input = call.input.bfloat16()
    grads = incoming(call)
    got = run(call, grads)
    assert (got["grad_input"].dtype, got["grad_weight"].dtype) == (torch.bfloat16, torch.float32)
    check(got, expect(call, grads), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_within_twice_eager(isa: str, dtype: torch.dtype) -> None:
    call = make(400, None, 96, 160, dtype, bias=False, row_weight=False)
    grads = incoming(call)
    grads[2] /= 20  # of the size that a mean over rows has
    want, got = expect(call, grads), run(call, grads)
    leaves = [call.input.clone().requires_grad_(), call.weight.clone().requires_grad_()]
    z = call.margin * torch.nn.functional.linear(*leaves)
    log_p = z.float().log_softmax(1)
    p = log_p.exp()
    outs = [-(p * log_p).sum(1), z.float().logsumexp(1), p.sum(0), (z.float() - call.margin).clamp(min=0).sum(1)]
    eager = dict(zip(STATISTICS[:4], (out.detach() for out in outs), strict=True))
    eager |= dict(zip(("grad_input", "grad_weight"), torch.autograd.grad(outs, leaves, grads), strict=True))
    for name, values in eager.items():
        assert error(got[name], want[name]) <= 2 * error(values, want[name]), name


@pytest.mark.parametrize("margin", [100.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_margins(isa: str, margin: float, dtype: torch.dtype) -> None:
    call = make(90, 10, 16, 140, dtype, margin=margin)
    grads = incoming(call)
    got, want = run(call, grads), expect(call, grads)
    if dtype == torch.float32 and margin > 1:  # the rounding of a logit of some hundreds shows in its exponential
        for name, wanted in want.items():
            assert error(got[name], wanted) <= 1e-3, name
    else:
        want.pop("fired")
        for name in ("row_entropy", "lse", "prob_sum", "grad_row_weight"):
            assert error(got[name], want[name]) <= 20 * TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TYPES)
def test_switched_off_features(isa: str, dtype: torch.dtype) -> None:
    call = make(40, 3, 12, 300, dtype)
    assert call.bias is not None
    call.bias[:131] = -INF  # a whole block of features and a few of the next
    call.bias[-1] = -INF
    grads = incoming(call)
    grads[2][0] = INF  # of a feature that is off
    got = run(call, grads)
    grads[2][0] = 0
    check(got, expect(call, grads), dtype)
    off = call.bias == -INF
    assert (got["prob_sum"][off] == 0).all() and (got["grad_bias"][off] == 0).all()
    assert (got["grad_weight"][off] == 0).all()


@pytest.mark.parametrize("keep", [0, 1000])
def test_one_feature(isa: str, keep: int) -> None:
    call = make(70, None, 5, 1, torch.float32, row_weight=False)
    got = run(call, incoming(call), keep)
    assert torch.equal(got["row_entropy"], torch.zeros(70))
    assert torch.equal(got["prob_sum"], torch.tensor([70.0]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("keep", [0, 1000])
def test_rows_of_weight_zero_are_not_read(isa: str, keep: int, dtype: torch.dtype) -> None:
    call = make(60, 50, 20, 140, dtype)
    assert call.row_weight is not None
    grads = incoming(call)
    got, want = run(with_unread_rows(call, NAN), grads, keep), run(call, grads, keep)
    for name, wanted in want.items():
        assert torch.equal(got[name], wanted), name
    unread = call.row_weight == 0
    rows = torch.cat([got["grad_context"], got["grad_input"]])
    for values in (rows, got["row_entropy"], got["lse"], got["row_excess"], got["grad_row_weight"]):
        assert (values[unread] == 0).all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bad_used_row_spoils_itself_and_the_sums(isa: str, value: float, dtype: torch.dtype) -> None:
    call = make(70, None, 9, 150, dtype, row_weight=False)
    grads = incoming(call)
    clean = run(call, grads)
    call.input[37, 4] = value
    got = run(call, grads)
    others = torch.arange(70) != 37
    for name in ("row_entropy", "lse", "grad_input"):
        assert got[name][37].isnan().all(), name
        assert torch.equal(got[name][others], clean[name][others]), name
    for name in ("prob_sum", "grad_weight", "grad_bias"):
        assert got[name].isnan().all(), name
    if value != value:
        assert got["row_excess"][37].isnan()


def test_infinite_weights_reach_no_row_that_is_not_there(isa: str) -> None:
    call = make(5, None, 3, 20, torch.float64, bias=False, row_weight=False)
    call.input.abs_()
    call.weight[7] = -INF  # z = -inf in every row
    call.weight[9].zero_()
    grads = incoming(call)
    got = run(call, [grads[0], grads[1], grads[2], None], needs=[True, False, True, True, True])
    assert got["prob_sum"][7] == 0 and got["prob_sum"].isfinite().all()
    assert (got["grad_weight"][7] == 0).all() and got["grad_weight"].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_give_no_gradient(isa: str, dtype: torch.dtype) -> None:
    # z = 2 * (x + 0.5): -1, 2 (the margin itself) and 4.
    input = torch.tensor([[-1.0], [0.5], [1.5]], dtype=dtype)
    weight, bias = torch.ones(1, 1, dtype=dtype), torch.tensor([0.5], dtype=dtype)
    excess, fired = OPS.clamped_reg(None, input, weight, bias, 2.0, None, 0)
    assert excess.tolist() == [0, 0, 2] and fired.tolist() == [1]
    grad = torch.tensor([3.0, 5.0, 7.0], dtype=acc_of(dtype))
    _, grad_input, grad_weight, grad_bias = OPS.clamped_reg_backward(
        grad, None, input, weight, bias, 2.0, None, 0, [True] * 4
    )
    assert grad_input.flatten().tolist() == [0, 0, 14]
    assert (grad_weight.item(), grad_bias.item()) == (21, 14)
    matrix = OPS.clamped_activation(None, input, weight, bias, 2.0, 0)
    assert matrix.flatten().tolist() == [2, 2, 4]
    _, grad_input, _, _ = OPS.clamped_activation_backward(
        grad.to(dtype)[:, None], None, input, weight, bias, 2.0, 0, [True] * 4
    )
    assert grad_input.flatten().tolist() == [0, 0, 14]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_clamped_reg(isa: str, shape: tuple[int, int | None, int, int], dtype: torch.dtype) -> None:
    call = make(*shape, dtype)
    args = (*call.logit_args(), call.row_weight, call.operand)
    grad = torch.randn(call.rows, dtype=call.acc)
    excess, fired = OPS.clamped_reg(*args)
    got = {"row_excess": excess, "fired": fired}
    grads = OPS.clamped_reg_backward(grad, *args, [True] * 4)
    got |= {f"grad_{name}": g for name, g in zip(NAMES, grads, strict=False)}
    wide = call.in_float64()
    wanted = clamp_reference.statistics(*wide.logit_args(), wide.row_weight, 0)
    want = {"row_excess": wanted[0].detach(), "fired": wanted[1]} | gradients_of(wide, wanted[:1], [grad])
    want.pop("grad_row_weight")
    check(got, want, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["shared_assignment", "clamped_activation"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices(isa: str, shape: tuple[int, int | None, int, int], kind: str, dtype: torch.dtype) -> None:
    call = make(*shape, dtype, row_weight=False)
    function = reference.assignment if kind == "shared_assignment" else clamp_reference.activation
    grad = torch.randn(call.weight.shape[0], call.rows).to(dtype).t()
    matrix = getattr(OPS, kind)(*call.logit_args(), 0)
    assert matrix.dtype == dtype and matrix.is_contiguous()
    saved = (matrix,) if kind == "shared_assignment" else ()
    grads = getattr(OPS, f"{kind}_backward")(grad, *call.logit_args(), 0, *saved, [True] * 4)
    wide = call.in_float64()
    wanted = function(*wide.logit_args(), 0)
    assert error(matrix, wanted) <= TOLERANCE[dtype]
    want = gradients_of(wide, [wanted], [grad])
    for name, got in zip(NAMES, grads, strict=False):
        if f"grad_{name}" in want:
            # Softmax gradients cancel: with the stored probabilities' rounding, as in eager.
            assert error(got, want[f"grad_{name}"]) <= 4 * TOLERANCE[dtype], name


def test_nan_in_matrices(isa: str) -> None:
    input, weight = torch.randn(40, 6), torch.randn(35, 6)
    input[3, 2] = NAN
    for kind in ("shared_assignment", "clamped_activation"):
        matrix = getattr(OPS, kind)(None, input, weight, None, 1.0, 0)
        assert matrix[3].isnan().all() and matrix[:3].isfinite().all() and matrix[4:].isfinite().all()


@pytest.mark.parametrize(("channels", "width"), [(65, 66), (64, 65), (64, 66)])
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_beside_other_columns(isa: str, dtype: torch.dtype, channels: int, width: int) -> None:
    """Rows of neighbouring numbers, apart by an odd or an even number of them, the next one of which is no weight."""
    call = make(40, None, channels, 150, dtype)
    wide = torch.full((150, width), NAN, dtype=dtype)
    wide[:, :channels] = call.weight
    grads = incoming(call)
    check(run(replace(call, weight=wide[:, :channels]), grads), expect(call, grads), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_strides(isa: str, dtype: torch.dtype) -> None:
    call = make(50, 30, 70, 140, dtype)
    grads = incoming(call)
    want = run(call, grads)
    moved = replace(call, **{n: strided(t) for n, t in zip(NAMES, call.tensors(), strict=True) if t is not None})
    got = run(moved, [strided(g) for g in grads])
    for name, wanted in want.items():
        assert torch.equal(got[name], wanted), name
    matrix = OPS.shared_assignment(*call.logit_args(), 0)
    grad = torch.randn(matrix.shape).to(dtype)
    plain = OPS.shared_assignment_backward(grad, *call.logit_args(), 0, matrix, [True] * 4)
    other = OPS.shared_assignment_backward(strided(grad), *moved.logit_args(), 0, strided(matrix), [True] * 4)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_expanded_gradients(isa: str) -> None:
    call = make(50, 30, 20, 40, torch.float32)
    grads = incoming(call)
    expanded = [torch.tensor(0.3).expand(g.shape) for g in grads]
    got, want = run(call, expanded), run(call, [g.contiguous() for g in expanded])
    assert all(torch.equal(got[name], want[name]) for name in want)
    ones = torch.ones(()).expand(call.rows, 40)
    a = OPS.clamped_activation_backward(ones, *call.logit_args(), 0, [True] * 4)
    b = OPS.clamped_activation_backward(ones.contiguous(), *call.logit_args(), 0, [True] * 4)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("present", range(1, 16))
def test_absent_gradients_are_zero(isa: str, present: int) -> None:
    call = make(40, 9, 12, 33, torch.float64)
    grads = [g if present >> i & 1 else None for i, g in enumerate(incoming(call))]
    got = run(call, grads)
    want = expect(call, grads)
    for name, wanted in want.items():
        if name.startswith("grad_"):
            assert error(got[name], wanted) <= 1e-13, name


@pytest.mark.parametrize("wanted", [1, 2, 4, 8, 16, 6, 9, 0])
def test_only_the_gradients_asked_for(isa: str, wanted: int) -> None:
    call = make(50, 50, 12, 130, torch.float32)
    grads = incoming(call)
    needs = [bool(wanted >> i & 1) for i in range(5)]
    all_of_them, got = run(call, grads), run(call, grads, needs=needs)
    for name, need in zip(NAMES, needs, strict=True):
        if need:
            assert error(got[f"grad_{name}"], all_of_them[f"grad_{name}"]) <= 1e-6, name
        else:
            assert got[f"grad_{name}"].shape == (0,), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("why", ["no rows", "no weight"])
def test_nothing_to_do(isa: str, why: str, dtype: torch.dtype) -> None:
    call = make(0 if why == "no rows" else 20, 0 if why == "no rows" else 3, 7, 11, dtype)
    assert call.row_weight is not None
    call.row_weight.zero_()
    got = run(call, incoming(call), keep=1000)
    assert all((t == 0).all() for t in got.values())
    assert got["grad_weight"].shape == (11, 7) and got["prob_sum"].shape == (11,)
    empty = torch.empty(0, 7, dtype=dtype)
    matrix = OPS.shared_assignment(None, empty, call.weight, call.bias, 1.0, 0)
    assert matrix.shape == (0, 11)
    grads = OPS.shared_assignment_backward(matrix, None, empty, call.weight, call.bias, 1.0, 0, matrix, [True] * 4)
    assert (grads[2] == 0).all() and (grads[3] == 0).all()


def test_no_channels(isa: str) -> None:
    call = make(40, 3, 0, 21, torch.float32)
    grads = incoming(call)
    check(run(call, grads), expect(call, grads), torch.float32)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1500, 100, 30, 200), (100, 20, 600, 1500), (70, 20, 1100, 300)])
@pytest.mark.parametrize("keep", [0, 128])
@pytest.mark.usefixtures("threads")
def test_bitwise_equal_for_any_number_of_threads(
    isa: str, keep: int, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    if isa == "generic":
        shape = (shape[0] // 2, shape[1], shape[2] // 2, shape[3] // 2)
    call = make(*shape, dtype)
    grads = incoming(call)
    results = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(run(call, grads, keep))
    for other in results[1:]:
        assert all(torch.equal(other[name], want) for name, want in results[0].items())


def test_wrong_arguments(isa: str) -> None:
    call = make(10, 3, 6, 5, torch.float32)
    bad: list[dict[str, Any]] = [
        {"weight": torch.randn(5, 7)},
        {"weight": torch.randn(5, 6).double()},
        {"bias": torch.randn(6)},
        {"context": torch.randn(3, 5)},
        {"input": torch.randn(10)},
        {"row_weight": torch.rand(10)},
        {"margin": 0.0},
        {"margin": NAN},
        {"margin": INF},
        {"operand": 3},
    ]
    for change in bad:
        wrong = replace(call, **change)
        with pytest.raises(RuntimeError, match="fusefeat: "):
            OPS.shared_penalty(*wrong.logit_args(), wrong.row_weight, wrong.operand, False, 0)
    with pytest.raises(RuntimeError, match="keep_rows"):
        OPS.shared_penalty(*call.logit_args(), None, 0, False, 14)
    with pytest.raises(RuntimeError, match="grad_lse"):
        run(call, [None, torch.randn(4), None, None])
