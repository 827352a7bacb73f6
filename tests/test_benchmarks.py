"""The harness behind `python -m benchmarks`: what it refuses, what it computes from times, what it writes."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import FAMILIES, attention_pool, gate, memory, plot, report, shared_logits, shared_objective, timing  # noqa: E402
from benchmarks import __main__ as cli  # noqa: E402
from benchmarks.case import MODES, Bound, Case, Contender, Inputs, Skip, Target  # noqa: E402
from benchmarks.results import OURS, Row, Run  # noqa: E402
from benchmarks.runner import Settings, run_case  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quick_case(name: str = "quick-padded") -> Case:
    return next(case for case in attention_pool.cases(CPU, torch.float32, quick=True) if case.name == name)


def settings(**changes: object) -> Settings:
    return dataclasses.replace(Settings(CPU, 1, 2, 0.001, "off"), **changes)


def row(contender: str, kind: str, median_ms: float | None, **more: object) -> Row:
    values: dict[str, object] = {"case": "abmil-padded", "mode": "forward", "peer": contender if kind == "peer" else ""}
    values |= more
    return Row(
        "attention_pool",
        shape="[16,4096,512]",
        dtype="fp32",
        device="cpu",
        threads=2,
        huge_pages="off",
        contender=contender,
        kind=kind,
        median_ms=median_ms,
        q1_ms=median_ms,
        q3_ms=median_ms,
        **values,
    )


def test_summary_of_times() -> None:
    stats = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (stats.least, stats.median, stats.q1, stats.q3, stats.count) == (1.0, 3.0, 2.0, 4.0, 5)
    assert stats.spread == pytest.approx(2 / 3)
    assert timing.summarise([7.0]) == timing.Stats(7.0, 7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no measurements"):
        timing.summarise([])


def test_rounds_interleave_and_rotate() -> None:
    calls: list[str] = []

    def slice_of(name: str) -> timing.Slice:
        def run() -> list[float]:
            calls.append(name)
            return [float(len(calls))]

        return run

    times = timing.interleaved({name: slice_of(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert times["a"] == [1.0, 6.0, 8.0]


def test_backward_slice_times_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def advance(seconds: float) -> None:
        clock[0] += seconds

    x = torch.ones(4, requires_grad=True)

    def forward() -> torch.Tensor:
        advance(10.0)
        y = x * 2
        y.register_hook(lambda grad: advance(1.0))
        return y

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    # The slice ends with the first call past 25 s of wall time; the first call is the warm-up.
    assert timing.backward_slice(Bound(forward, {"x": x}), torch.ones(4), 1, 25.0)() == [1.0, 1.0, 1.0]


def test_relative_error() -> None:
    wanted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert gate.relative_error(torch.tensor([3.0, 4.0]), wanted) == 0
    assert gate.relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert gate.relative_error(torch.tensor([3.0, float("nan")]), wanted) == float("inf")
    assert gate.relative_error(torch.tensor([[3.0, 4.0]]), wanted) == float("inf")


def bind_with(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        x, query = inputs["x"], inputs["query"]

        def forward() -> torch.Tensor:
            return change((torch.softmax(x @ query, 1).unsqueeze(1) @ x).squeeze(1))

        return Bound(forward, {"x": x, "query": query})

    return bind


def bind_raising(error: Exception) -> Callable[[Inputs], Bound]:
    def bind(inputs: Inputs) -> Bound:
        raise error

    return bind


def scaled_gradient(out: torch.Tensor) -> torch.Tensor:
    return out + 0.1 * (out - out.detach())


@pytest.mark.parametrize("change", [lambda out: out * 1.001, scaled_gradient], ids=["result", "gradient"])
def test_wrong_contender_gets_no_time(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    case = dataclasses.replace(
        quick_case(),
        contenders=[
            Contender(OURS, None, bind_with(change)),
            Contender("eager", "eager", bind_with(lambda out: out)),
            Contender("wrong", "wrong", bind_with(change)),
            Contender("absent", "absent", bind_raising(Skip("not installed"))),
            Contender("broken", "broken", bind_raising(RuntimeError("no such kernel"))),
        ],
    )
    rows = run_case(case, "fp32", settings(), lambda text: None)
    by_name = {(row.contender, row.mode): row for row in rows}
    assert {by_name[OURS, mode].status for mode in MODES} == {"wrong"}
    assert all(by_name[OURS, mode].median_ms is None for mode in MODES)
    assert "relative to float64" in by_name[OURS, "both"].reason
    assert by_name["wrong", "both"].status == "wrong"
    assert by_name["wrong", "both"].median_ms is None
    # A peer whose result is right keeps the time of its forward.
    assert (by_name["wrong", "forward"].status == "ok") == (change is scaled_gradient)
    assert (by_name["absent", "both"].status, by_name["absent", "both"].reason) == ("skipped", "not installed")
    assert (by_name["broken", "both"].status, by_name["broken", "both"].median_ms) == ("failed", None)
    assert all((by_name["eager", mode].median_ms or 0) > 0 for mode in MODES)
    assert Run({"torch": ""}, rows).ours_failed
    text = report.text(Run({"torch": ""}, rows))
    assert f"no time for {OURS}: wrong:" in text
    assert "no time for broken: failed: RuntimeError: no such kernel" in text


def test_wrong_kernel_makes_the_command_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    wrong = Contender(OURS, None, bind_with(lambda out: out * 1.001))
    case = dataclasses.replace(quick_case(), contenders=[wrong, *quick_case().contenders[1:2]])
    monkeypatch.setattr(attention_pool, "cases", lambda device, dtype, quick: [case])
    assert cli.main(["attention_pool", "--quick", "--threads", "1"]) == 1
    assert "failed the correctness gate" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "share"), [("fp64", 0), ("bf16", 1), ("fp16", 2)])
def test_gate_takes_every_dtype(dtype: str, share: int) -> None:
    """Every case in one of the dtypes."""
    for case in attention_pool.cases(CPU, cli.DTYPES[dtype], quick=True)[share::3]:
        for row in run_case(case, dtype, settings(peers=("eager",), rounds=1), lambda text: None):
            assert (row.status, row.reason) == ("ok", "")


def test_speedup_is_over_the_best_peer() -> None:
    rows = run_case(quick_case(), "fp32", settings(peers=("eager", "sdpa")), lambda text: None)
    for mode in MODES:
        peers = [row for row in rows if row.kind == "peer" and row.mode == mode]
        assert {row.peer for row in peers} == {"eager", "sdpa"}
        best = min(row.median_ms for row in peers)
        assert [row.speedup for row in peers] == [best / row.median_ms for row in peers]
        floors = {row.contender: row.median_ms for row in rows if row.kind == "floor" and row.mode == mode}
        wanted = {"forward": ["read"], "backward": ["copy fresh"], "both": ["read", "copy fresh"]}[mode]
        assert peers[0].floor_ms == pytest.approx(sum(floors[name] for name in wanted))


def test_targets() -> None:
    rows = [row(OURS, "ours", 4.0), row("read", "floor", 2.0), row("eager", "peer", 12.0), row("sdpa", "peer", 6.0)]
    rows.append(row("fast outsider", "peer", 1.0))
    found = {target.text: target for target in attention_pool.targets(rows)}
    forward = next(target for text, target in found.items() if "1.5x" in text)
    assert forward.met
    assert forward.got is not None
    assert forward.got.startswith("1.50x (4 ms against 6 ms of sdpa)")
    assert not next(target for text, target in found.items() if "x.sum()" in text).met
    unmeasured = next(target for text, target in found.items() if "10x" in text)
    assert (unmeasured.got, unmeasured.met) == (None, False)
    assert "NOT MET" in report.text(Run({"torch": ""}, rows, targets=list(found.values())))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((FAMILIES[1], dtype) for dtype in ("fp32", "fp64", "bf16", "fp16")), *((name, "fp32") for name in FAMILIES[2:])],
)
def test_shared_logits_families(family: str, dtype: str) -> None:
    """Ours and eager pass the gate, and the floors are the bare products."""
    module = importlib.import_module(f"benchmarks.{family}")
    for case in module.cases(CPU, cli.DTYPES[dtype], quick=True):
        rows = run_case(case, dtype, settings(peers=("eager", "linear_cross_entropy"), rounds=1), lambda text: None)
        by_name = {(row.contender, row.mode): row for row in rows}
        for mode in MODES:
            for name in (OURS, "eager"):
                assert (by_name[name, mode].status, by_name[name, mode].reason) == ("ok", "")
            ours = by_name[OURS, mode]
            products = [
                (shared_logits.FORWARD_PRODUCT, shared_logits.FORWARD_KEPT),
                (shared_logits.BACKWARD_PRODUCTS, shared_logits.BACKWARD_KEPT),
            ]
            wanted = {"forward": products[:1], "backward": products[1:], "both": products}[mode]
            fastest = [min(by_name[name, mode].median_ms for name in names) for names in wanted]
            assert ours.floor_ms == pytest.approx(sum(fastest))
            assert {row.contender for row in rows if row.kind == "floor" and row.mode == mode} == set(sum(wanted, ()))
            assert all(row.speedup is None for row in rows if row.kind == "other")


def test_slow_cases_run_only_when_asked_for() -> None:
    cases = shared_objective.cases(CPU, torch.float32, quick=False)
    assert [case.name for case in cases if case.slow] == ["ibq"]
    assert "ibq" not in [case.name for case in cli._wanted(cases, None, slow=False)]
    assert "ibq" in [case.name for case in cli._wanted(cases, None, slow=True)]
    assert [case.name for case in cli._wanted(cases, ["ibq"], slow=False)] == ["ibq"]


def test_targets_of_shared_logits() -> None:
    def of(name: str, contender: str, kind: str, ms: float) -> Row:
        changes = {
            "family": "shared_objective",
            "case": name,
            "mode": "both",
            "contender": contender,
            "peer": contender,
        }
        return dataclasses.replace(row(contender, kind, ms), **changes)

    rows = [
        of("medium", OURS, "ours", 9.0),
        of("medium", "mm", "floor", 4.0),
        of("medium", "mm backward", "floor", 8.0),
    ]
    rows += [of("medium", shared_objective.ALONE, "other", 8.0)]
    rows += [of("narrow", OURS, "ours", 5.0), of("narrow", "compile", "peer", 5.5)]
    found = {target.text: target for target in shared_objective.targets(rows)}
    products = next(target for text, target in found.items() if "8192x128->1024" in text and "bare" in text)
    assert products.met and products.got is not None and products.got.startswith("0.75x")
    compiled = next(target for text, target in found.items() if "1.2x compile" in text)
    assert not compiled.met and compiled.got is not None and compiled.got.startswith("1.10x")
    alone = next(target for text, target in found.items() if "8192x128->1024" in text and "alone" in text)
    assert (alone.got, alone.met) == ("1.12x", False)
    assert not any(target.text.startswith(("bf16", "fp16")) for target in found.values())


def test_runs_survive_json_and_csv(tmp_path: Path) -> None:
    environment = {"fusefeat": "1", "torch": "2", "processor": "p"}
    run = Run(environment, [row(OURS, "ours", 1.5)], {"abmil-padded": "a user"}, [Target("t", None, False)])
    assert report.from_json(report.to_json([run])) == [run]
    report.write_csv(tmp_path / "rows.csv", [run, run])
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["median_ms"] for line in lines] == ["1.5", "1.5"]
    assert lines[0]["torch_version"] == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
def test_peak_memory_counts_temporaries() -> None:
    def step() -> torch.Tensor:
        temporary = torch.ones(16 << 20)
        return temporary[:1].clone()

    step()
    peak = memory.peak_bytes(step, CPU)
    if peak is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 60 << 20 < peak < 100 << 20


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run({}, [row(OURS, "ours", 1.5, floor_ms=1.0), row("eager", "peer", 3.0, floor_ms=1.0)])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(Skip, match="matplotlib cannot be imported"):
            plot.write(tmp_path / "none.png", [run])
    pytest.importorskip("matplotlib")
    plot.write(tmp_path / "bars.png", [run])
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "no family nothing"),
        (["--quick", "--compare", "nobody"], "no peer nobody"),
        (["--quick", "--only", "nowhere"], "no case of that name"),
        (["--dtype", "int8"], "expected some of"),
        (["--rounds", "0"], "expected a positive number"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line(tmp_path: Path) -> None:
    """Both ways of allocating, each in its own process, merged into one table and one CSV."""
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks", "attention_pool", "--quick", "--only", "quick-packed"]
    command += ["--compare", "eager,pyg", "--thp", "both", "--threads", "1", "--csv", str(path)]
    variables = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for text in (
        "peers do not get huge pages",
        "peers get huge pages",
        "1 threads",
        "quick-packed [44,8]",
        "* fusefeat",
    ):
        assert text in done.stdout
    with path.open() as file:
        lines = list(csv.DictReader(file))
    wanted = {"family", "case", "shape", "dtype", "mode", "contender", "median_ms", "spread", "speedup", "gb_per_s"}
    assert wanted | {"floor_fraction", "peak_mib", "error", "status", "reason", "torch_version"} <= set(lines[0])
    assert {line["huge_pages"] for line in lines} == {"off", "on"}
    timed = [line for line in lines if line["contender"] in (OURS, "eager")]
    assert len(timed) == 2 * 2 * len(MODES)
    assert all(float(line["median_ms"]) > 0 for line in timed)
