"""Backward of the shared penalty with weights of 16 MiB and more on the CPU: one sweep over the blocks of features, and
logits in memory that the gradient of the weight is yet to take. Held to the reference in float64.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import shared_calls
import torch
from cpu_isas import every_isa  # noqa: F401 (the fixture isa)
from shared_calls import (
    NAN,
    TOLERANCE,
    Call,
    check,
    check_rounded_gradients,
    error,
    errors_beside_eager,
    expect,
    incoming,
    loss_gradients,
    make,
    with_unread_rows,
)  # fmt: skip
from test_cpu_shared_kernels import TYPES
from torch import Tensor

OPS = torch.ops.fusefeat
run = functools.partial(shared_calls.run, OPS)
# rows, context rows, channels, features
ODD = (50, 23, 129, 33001)  # a strip, a block, a pair of channels that is not full
DEEP = (290, None, 1000, 4201)  # more rows than are summed in one go
CHUNKS = (1100, None, 1000, 4201)  # more than are in one sweep
CROWDED = (150, None, 40, 110001)  # little memory beside kept logits: a sweep of few rows, or none
RECOMPUTED = (200, None, 65, 65539)  # logits of some rows have no room, and are computed twice in one sweep


Results = dict[str, Tensor]


@functools.cache
def expected(shape: tuple[int, int | None, int, int], dtype: torch.dtype) -> tuple[Call, list[Tensor | None], Results]:
    torch.manual_seed(0)
    call = make(*shape, dtype, row_weight=shape not in (CHUNKS, CROWDED, RECOMPUTED))
    grads: list[Tensor | None] = [*incoming(call)]
    if dtype != torch.float64:  # of some million logits one is so near margin that its side is a matter of rounding
        grads[3] = None
    want = expect(call, grads)
    if grads[3] is None:
        del want["row_excess"], want["fired"]
    return call, grads, want


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_partial_tiles(isa: str, dtype: torch.dtype) -> None:
    call, grads, want = expected(ODD, dtype)
    check(run(call, grads), want, dtype)
    check(run(call, grads, keep=64), want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_channels(isa: str, dtype: torch.dtype) -> None:
    call, grads, want = expected(DEEP, dtype)
    check(run(call, grads, keep=64), want, dtype)


@pytest.mark.parametrize("keep", [0, 64, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_behind_the_sweep(dtype: torch.dtype, keep: int) -> None:
    call, grads, want = expected(CHUNKS, dtype)
    check(run(call, grads, keep=keep), want, dtype)


@pytest.mark.parametrize("keep", [64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_little_room_beside_kept_logits(dtype: torch.dtype, keep: int) -> None:
    call, grads, want = expected(CROWDED, dtype)
    check(run(call, grads, keep=keep), want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_computed_twice(isa: str, dtype: torch.dtype) -> None:
    call, grads, want = expected(RECOMPUTED, dtype)
    check(run(call, grads), want, dtype)


def test_rows_of_weight_0_are_not_read(isa: str) -> None:
    call, grads, _ = expected(ODD, torch.float32)
    got, want = run(with_unread_rows(call, NAN), grads), run(call, grads)
    assert all(torch.equal(got[name], wanted) for name, wanted in want.items())


@pytest.mark.parametrize("wanted", ["context", "input", "weight", "bias"])
def test_one_gradient_alone(wanted: str) -> None:
    call, grads, want = expected(ODD, torch.float32)
    got = run(call, grads, needs=[name == wanted for name in ("context", "input", "weight", "bias", "row_weight")])
    name = f"grad_{wanted}"
    assert error(got[name], want[name]) <= TOLERANCE[torch.float32]
    assert all(got[other].numel() == 0 for other in want if other.startswith("grad_") and other != name)


@pytest.mark.parametrize("keep", [0, 32])
def test_gradients_are_those_of_rounded_logits(isa: str, keep: int) -> None:
    check_rounded_gradients(OPS, 360, 65, 65539, keep)


# The last has logits that are computed twice, as for want of room others are.
@pytest.mark.parametrize(
    ("keep", "rows", "channels", "features"),
    [*((keep, 300, 130, 33000) for keep in (0, 64, 300)), (32, 360, 65, 65539)],
)
def test_logits_kept_in_float16(isa: str, keep: int, rows: int, channels: int, features: int) -> None:
    """Gradients lose less to them than plain PyTorch's lose to its own in bfloat16."""
    x, weight = torch.randn(rows, channels).bfloat16(), (torch.randn(features, channels) * 0.3).bfloat16()
    got, _ = loss_gradients(OPS, x, weight, keep)
    for mine, eager in errors_beside_eager(x, weight, got):
        assert mine <= 1.1 * eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    call, grads, _ = expected(CHUNKS, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(call, grads, keep=64))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_a_row_of_nan_stays_in_its_row() -> None:
    call, grads, want = expected(ODD, torch.float32)
    row = int(call.row_weight[23:].nonzero()[0])
    call = replace(call, input=call.input.clone())
    call.input[row] = NAN
    got = run(call, grads)
    others = torch.arange(50) != row
    assert got["grad_input"][row].isnan().all() and got["grad_weight"].isnan().all()
    assert error(got["grad_input"][others], want["grad_input"][others]) <= TOLERANCE[torch.float32]
    assert error(got["grad_context"], want["grad_context"]) <= TOLERANCE[torch.float32]
