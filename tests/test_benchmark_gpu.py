"""The benchmarks' way on a GPU, as far as it can be gone without one: cases, clocks, memory, promises."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch
from fusefeat import backends
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import FAMILIES, gpu_targets, memory, timing  # noqa: E402
from benchmarks.case import Bound  # noqa: E402
from benchmarks.results import OURS, Row  # noqa: E402


@pytest.mark.parametrize("family", FAMILIES)
def test_cases_for_a_gpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backend by name, and every shape: a GPU takes seconds for what a processor takes minutes."""
    monkeypatch.setattr(torch, "empty", lambda *shape, device: torch.zeros(*shape, device="meta"))
    for name in ("cuda", "triton"):
        there = dataclasses.replace(backends.BACKENDS[name], why_unavailable=lambda: None)
        monkeypatch.setitem(backends.BACKENDS, name, there)
    cases = importlib.import_module(f"benchmarks.{family}").cases(torch.device("cuda"), torch.bfloat16, quick=False)
    for case in cases:
        ours = {contender.name for contender in case.contenders if contender.kind == "ours"}
        assert {OURS, f"{OURS} cuda", f"{OURS} triton"} <= ours and not case.slow


class Event:
    """A GPU's clock that stands still but for the work between two events."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def test_backward_on_a_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, requires_grad=True)

    def advance(seconds: float) -> None:
        Event.now += seconds

    def forward() -> Tensor:
        advance(10.0)
        y = x * 2
        y.register_hook(lambda grad: advance(1.0))
        return y

    monkeypatch.setattr(timing, "_on_gpu", lambda bound: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    times = timing.backward_slice(Bound(forward, {"x": x}), torch.ones(4), 1, 1e-4)()
    assert times and set(times) == {1.0}


def test_blocks_on_a_gpu_do_not_outgrow_their_slice() -> None:
    """Waiting for the GPU would make the blocks of ``blocked_autorange`` as long as a second each."""
    calls: list[None] = []
    times = timing.repeated(lambda: calls.append(None), 1, 1e-3, grad=False, cuda=True)()
    assert len(times) == timing._GPU_BLOCKS and all(0 < t < 1e-3 for t in times)
    # A call takes a tenth of a microsecond or more, the clock's reading included.
    assert len(calls) <= 30_000


def test_memory_on_a_gpu_is_the_allocator_s_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"now": 100, "peak": 900}

    def step() -> None:
        state["peak"] = max(state["peak"], state["now"] + 50)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(peak=state["now"]))
    assert memory.peak_bytes(step, torch.device("cuda")) == 50


def gpu_row(case: str, mode: str, contender: str, median_ms: float, **more: object) -> Row:
    kind = "ours" if contender == OURS else "floor" if contender.startswith(("copy", "mm")) else "peer"
    peer = contender.split()[0] if kind == "peer" else ""
    values: dict[str, object] = {"dtype": "bf16", "peer": peer, "median_ms": median_ms} | more
    return Row(
        "f",
        case,
        "[1]",
        device="cuda",
        threads=1,
        huge_pages="off",
        mode=mode,
        contender=contender,
        kind=kind,
        **values,  # type: ignore[arg-type]
    )


def test_promises_for_pools_on_a_gpu() -> None:
    # 128 MiB copied in 0.1 ms, and half as much, or little, read.
    copied = 2**27 / 1e-4 / 1e9
    rows = [
        gpu_row("large", "forward", OURS, 0.06, gb_per_s=2**26 / 0.06e-3 / 1e9),
        gpu_row("large", "forward", "copy warm", 0.1, gb_per_s=copied),
        gpu_row("large", "forward", "compile", 0.05),
        gpu_row("large", "both", OURS, 0.2, gb_per_s=0.86 * copied),
        gpu_row("large", "both", "copy warm", 0.1, gb_per_s=copied),
        gpu_row("large", "both", "eager", 0.1),
        gpu_row("small", "forward", OURS, 0.05, gb_per_s=2**20 / 0.05e-3 / 1e9),
        gpu_row("small", "forward", "copy warm", 0.01, gb_per_s=2 * 2**20 / 0.01e-3 / 1e9),
        gpu_row("small", "forward", "compile", 0.01),
    ]
    found = [(target.text.split(": ")[1], target.got, target.met) for target in gpu_targets.pools(rows)]
    assert [(text, met) for text, _, met in found] == [
        ("at least 85% of the copy's bandwidth", False),
        ("at least 85% of the copy's bandwidth", True),
        ("not slower than torch.compile", False),
        ("not slower than torch.compile", False),
    ]
    assert found[0][1] is not None and found[0][1].startswith("83%")
    assert found[2][1] == "0.83x of compile" and found[3][1] is None
    assert gpu_targets.pools([dataclasses.replace(row, device="cpu") for row in rows]) == []


def test_promises_for_products_on_a_gpu() -> None:
    gradients = (1024 + 65536) * 256 * 4 / 2**20
    rows = [
        gpu_row("widest", "forward", OURS, 1.0, floor_fraction=0.59, gb_per_s=1.0),
        gpu_row("widest", "both", OURS, 3.0, floor_fraction=0.61, gb_per_s=1.0, peak_mib=gradients + 30),
        gpu_row("widest", "both", "compile", 3.0),
        gpu_row("other", "both", OURS, 3.0, floor_fraction=0.1, gb_per_s=0.1),
    ]
    sizes = {"widest": (1024, 256, 65536), "other": (10, 10, 10)}
    found = gpu_targets.products(rows, sizes)
    assert [(target.text.split(": ")[1], target.got, target.met) for target in found] == [
        ("at least 60% of the bare products' rate", "59%", False),
        ("at least 60% of the bare products' rate", "61%", True),
        ("at most 64 MiB beyond the gradients in float32", "30.0 MiB", True),
        ("not slower than torch.compile", "1.00x of compile", True),
    ]
    rows[1].peak_mib = gradients + 200
    assert not gpu_targets.products(rows, sizes)[2].met
