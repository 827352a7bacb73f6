"""Runs one case: gate, interleaved rounds per mode, memory, rows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import cold, gate, memory, timing
from .case import MODES, Bound, Case, Contender, Inputs, Skip
from .floor import bound_ms, floors
from .results import Row, best_peer

Say = Callable[[str], None]
Reference = Callable[[Inputs, Tensor | None], Inputs]


@dataclass(frozen=True)
class Settings:
    """``peers`` None: all of them. ``cold``: no call finds its inputs in the caches."""

    device: torch.device
    threads: int
    rounds: int
    seconds: float
    huge_pages: str
    peers: Collection[str] | None = None
    cold: bool = False


@dataclass
class _Entrant:
    """A contender at the gate: for each mode, why it gets no time."""

    contender: Contender
    bound: Bound | None
    refused: dict[str, tuple[str, str]]
    errors: dict[str, float]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _refuse(modes: Collection[str], status: str, reason: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(modes, (status, reason))


def _enter(
    case: Case,
    contender: Contender,
    inputs: Inputs,
    wanted: Callable[[Reference], Inputs],
    grad_out: Tensor,
    baseline: dict[str, float],
) -> _Entrant:
    """Bind a contender and hold it against the reference. Peers may fail in any way they like: that is a result."""
    dtype = inputs["x"].dtype
    errors: dict[str, float] = {}
    if contender.reference is not None:
        baseline = {}
    try:
        bound = contender.bind(inputs)
        if set(bound.leaves) != set(case.leaves):
            reason = f"gives gradients of {', '.join(bound.leaves)}, not of {', '.join(case.leaves)}"
            return _Entrant(contender, None, _refuse(MODES, "wrong", reason), errors)
        reference = wanted(contender.reference or case.reference)
        errors |= gate.forward_errors(bound, reference)
    except Skip as skip:
        return _Entrant(contender, None, _refuse(MODES, "skipped", str(skip)), errors)
    except Exception as error:
        return _Entrant(contender, None, _refuse(MODES, "failed", _first_line(error)), errors)
    wrong = gate.verdict(case, dtype, errors, contender.ours, baseline)
    if wrong:
        return _Entrant(contender, None, _refuse(MODES, "wrong", wrong), errors)
    try:
        of_gradients = gate.gradient_errors(bound, reference, grad_out)
    except Exception as error:
        return _Entrant(contender, bound, _refuse(MODES[1:], "failed", _first_line(error)), errors)
    errors |= of_gradients
    wrong = gate.verdict(case, dtype, of_gradients, contender.ours, baseline)
    if wrong:
        # A gradient that is wrong takes ours out altogether; a peer may still be of use for its forward.
        modes = MODES if contender.ours else MODES[1:]
        return _Entrant(contender, bound, _refuse(modes, "wrong", wrong), errors)
    return _Entrant(contender, bound, {}, errors)


def _at_the_gate(case: Case, inputs: Inputs, settings: Settings) -> tuple[list[_Entrant], Tensor]:
    out = case.reference(inputs, None)["out"]
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator).to(inputs["x"])
    # Each reference once, and only when somebody gets as far as to be held against it.
    wanted = cache(lambda reference: reference(inputs, grad_out))
    # Ours are judged against the baseline's own error, so that one enters first, timed or not.
    first = [_enter(case, c, inputs, wanted, grad_out, {}) for c in case.contenders if c.name == case.baseline]
    baseline = first[0].errors if first else {}
    entrants = []
    for contender in case.contenders:
        if not (contender.ours or settings.peers is None or contender.peer in settings.peers):
            continue
        if contender.name == case.baseline:
            entrants += first
        else:
            entrants.append(_enter(case, contender, inputs, wanted, grad_out, baseline))
    return entrants, grad_out


def _step(mode: str, bound: Bound, grad_out: Tensor) -> Callable[[], object]:
    """The call whose memory is looked at; what comes before it is done here."""
    if mode == "forward":
        return bound.forward
    if mode == "both":
        return lambda: timing.gradients(bound, grad_out)
    out = bound.forward()
    return lambda: torch.autograd.grad(out, list(bound.leaves.values()), grad_out)


def _slice(mode: str, bound: Bound, grad_out: Tensor, settings: Settings) -> timing.Slice:
    if mode == "forward":
        return timing.forward_slice(bound, settings.threads, settings.seconds)
    make = timing.backward_slice if mode == "backward" else timing.both_slice
    return make(bound, grad_out, settings.threads, settings.seconds)


def _fill(row: Row, times: list[float], work_bytes: int, work_flops: int) -> None:
    stats = timing.summarise(times)
    row.median_ms, row.q1_ms, row.q3_ms = stats.median * 1e3, stats.q1 * 1e3, stats.q3 * 1e3
    row.min_ms = stats.least * 1e3
    row.spread, row.measurements = stats.spread, stats.count
    row.gb_per_s = work_bytes / stats.median / 1e9
    row.gflop_per_s = work_flops / stats.median / 1e9


def _mode_rows(
    case: Case,
    dtype_name: str,
    mode: str,
    entrants: list[_Entrant],
    all_inputs: list[Inputs],
    grad_out: Tensor,
    s: Settings,
) -> list[Row]:
    def new_row(contender: str, kind: str) -> Row:
        return Row(
            case.family,
            case.name,
            case.shape,
            dtype_name,
            s.device.type,
            s.threads,
            s.huge_pages,
            mode,
            contender,
            kind,
            caches="cold" if s.cold and cold.are_evicted(all_inputs, s.device) else "warm",
        )

    work = case.work[mode]
    slices: dict[str, timing.Slice] = {}
    rows: dict[str, Row] = {}
    found = cold.rotating_floors(
        [floors(inputs["x"], case.matmul) if case.floors is None else case.floors(inputs) for inputs in all_inputs]
    )
    if case.floors is not None:
        bounding = {name for group in work.floors for name in group}
        found = {name: floor for name, floor in found.items() if name in bounding}
    for name, floor in found.items():
        rows[name] = new_row(name, "floor")
        slices[name] = timing.repeated(floor.call, s.threads, s.seconds, grad=False, cuda=s.device.type == "cuda")
    for entrant in entrants:
        contender = entrant.contender
        row = rows[contender.name] = new_row(contender.name, contender.kind)
        row.peer = contender.peer or ""
        row.error = max(entrant.errors.values(), default=None)
        if mode in entrant.refused:
            row.status, row.reason = entrant.refused[mode]
        elif entrant.bound is not None:
            slices[contender.name] = _slice(mode, entrant.bound, grad_out, s)
    for name, times in timing.interleaved(slices, s.rounds).items():
        done = found.get(name, work)
        _fill(rows[name], times, done.bytes, done.flops)
    floor_ms = bound_ms(work.floors, {name: rows[name].median_ms for name in found})
    best = best_peer(rows.values(), case.name, mode)
    for entrant in entrants:
        row = rows[entrant.contender.name]
        if row.median_ms is None or entrant.bound is None:
            continue
        row.floor_ms, row.floor_fraction = floor_ms, floor_ms / row.median_ms
        if best is not None and best.median_ms is not None and row.kind != "other":
            row.speedup = best.median_ms / row.median_ms
        with torch.set_grad_enabled(mode != "forward"):
            peak = memory.peak_bytes(_step(mode, entrant.bound, grad_out), s.device)
        row.peak_mib = None if peak is None else peak / 2**20
    return list(rows.values())


@dataclass(frozen=True)
class Ready:
    """One contender through the gate: by mode, what times it, or the reason against."""

    slices: dict[str, timing.Slice]
    refused: dict[str, str]


def make_ready(case: Case, contender: str, settings: Settings) -> Ready:
    """For whoever does the rounds himself."""
    torch._dynamo.reset()
    inputs = _leaf_inputs(case)
    entrants, grad_out = _at_the_gate(case, inputs, settings)
    entrant = next(e for e in entrants if e.contender.name == contender)
    slices = {
        mode: _slice(mode, entrant.bound, grad_out, settings)
        for mode in MODES
        if mode not in entrant.refused and entrant.bound is not None
    }
    return Ready(slices, {mode: ": ".join(reason) for mode, reason in entrant.refused.items()})


def _leaf_inputs(case: Case) -> Inputs:
    inputs = case.inputs()
    for name in case.leaves:
        inputs[name].requires_grad_()
    return inputs


def run_case(case: Case, dtype_name: str, settings: Settings, say: Say) -> list[Row]:
    """All rows of a case in one dtype."""
    # Each case compiles for its own shapes; without this the second shape would be compiled as a dynamic one.
    torch._dynamo.reset()
    torch.set_num_threads(settings.threads)
    label = f"{case.family} {case.name} {case.shape} {dtype_name}"
    say(f"{label}: gate")
    inputs = _leaf_inputs(case)
    all_inputs = [inputs]
    if settings.cold:
        all_inputs = cold.copies(inputs, cold.cache_bytes(settings.device))
        case = cold.rotating(case, all_inputs)
    entrants, grad_out = _at_the_gate(case, inputs, settings)
    rows: list[Row] = []
    with memory.few_to_collect():
        for mode in MODES:
            say(f"{label}: {mode}")
            rows += _mode_rows(case, dtype_name, mode, entrants, all_inputs, grad_out, settings)
    return rows
