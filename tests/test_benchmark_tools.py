"""What surrounds the timing of `python -m benchmarks`: cold caches, scaling, other commits, progress, tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import against, attention_pool, cold, report, scaling, shared_penalty, tables, timing  # noqa: E402
from benchmarks.case import MODES, Bound, Skip  # noqa: E402
from benchmarks.progress import Progress  # noqa: E402
from benchmarks.results import OURS, Row, Run  # noqa: E402

CPU = torch.device("cpu")


def row(case: str, mode: str, contender: str, kind: str, median_ms: float | None, **more: Any) -> Row:
    return Row(
        "attention_pool", case, "[1,2,3]", "fp32", "cpu", 2, "off", mode, contender, kind, median_ms=median_ms, **more
    )


def test_rotation_serves_copies_in_turn_and_their_own_leaves() -> None:
    copies = cold.copies({"x": torch.ones(4, 1024, requires_grad=True), "n": torch.ones(1)}, cache=30_000)
    assert len(copies) == 4
    assert all(copy["x"].requires_grad and copy["x"].is_leaf and not copy["n"].requires_grad for copy in copies)
    assert len({copy["x"].data_ptr() for copy in copies}) == 4
    bound = cold.rotation([Bound(lambda c=c, i=i: c["x"].sum() * (i + 1), {"x": c["x"]}) for i, c in enumerate(copies)])
    seen = []
    for i in range(8):
        (grad,) = timing.gradients(bound, torch.tensor(1.0))
        seen.append(grad[0, 0].item())
        assert bound.leaves["x"] is copies[i % 4]["x"]
    assert seen == [1, 2, 3, 4] * 2
    assert len(cold.copies({"x": torch.ones(1)}, cache=1 << 30)) == 64


def test_cache_size_is_positive() -> None:
    assert 1 << 18 <= cold.cache_bytes(CPU) <= 1 << 32


def test_cold_and_scaling_runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "cache_bytes", lambda device: 10_000)
    path, picture = tmp_path / "rows.csv", tmp_path / "lines.png"
    threads = torch.get_num_threads()
    argv = ["attention_pool", "--quick", "--cold", "--scaling", "--compare", "eager", "--threads", "1"]
    try:
        assert cli.main([*argv, "--csv", str(path), "--plot", str(picture)]) == 0
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr()
    assert "T=4 [16,4,8]" in text.out and "D=16 [16,8,16]" in text.out
    rows = list(tables.csv.DictReader(path.open()))
    assert {r["caches"] for r in rows} == {"cold"} and {r["used_by"] for r in rows} == {"scaling"}
    assert all(float(r["median_ms"]) > 0 for r in rows if r["status"] == "ok")
    assert picture.exists() != ("no plot" in text.err)


def test_lines_of_a_scaling_run() -> None:
    assert scaling.axis_and_size("T=64") == ("T", 64)
    assert scaling.axis_and_size("small") is None
    rows = [row(f"T={t}", "forward", OURS, "ours", t * 2.0, floor_ms=t * 1.0) for t in (4, 8)]
    rows += [row("T=4", "forward", "eager", "peer", 9.0), row("small", "forward", OURS, "ours", 1.0)]
    rows += [row("T=4", "backward", OURS, "ours", 1.0), row("T=8", "forward", "wrong", "peer", None)]
    (panel,) = scaling.lines(rows).values()
    assert panel == {OURS: [(4, 8.0), (8, 16.0)], "floor": [(4, 4.0), (8, 8.0)], "eager": [(4, 9.0)]}
    with pytest.raises(Skip, match="no case of a scaling run"):
        scaling.write(Path("never.png"), [Run({}, [row("small", "forward", OURS, "ours", 1.0)])])


class FakeWorker:
    """Answers as a worker process does, with times of its own."""

    def __init__(self, seconds: float, refused: dict[str, str] | None = None) -> None:
        self.seconds, self.refused, self.asked = seconds, refused or {}, 0

    def call(self, name: str, **arguments: Any) -> Any:
        if name == "prepare":
            return self.refused
        self.asked += 1
        return [self.seconds] * 3


def test_comparison_with_another_commit() -> None:
    other, this = FakeWorker(3e-3), FakeWorker(2e-3, {"backward": "wrong: grad x"})
    rows = against.compare(other, this, "f", "fp32", "c", "[1]", rounds=4, quick=True)  # type: ignore[arg-type]
    assert [r.mode for r in rows] == list(MODES)
    assert rows[0].ratio == pytest.approx(1.5) and rows[0].other_ms == pytest.approx(3.0)
    assert rows[1].ratio is None and rows[1].reason == "this tree: wrong: grad x"
    assert other.asked == this.asked == 8
    text = against.text("main~3", rows)
    assert "1.50" in text and "no time: this tree: wrong: grad x" in text


def test_worker_process_times_and_reports_errors() -> None:
    worker = against.Process(ROOT / "python", "cpu", 1, 0.001)
    try:
        arguments = {"family": "attention_pool", "dtype": "fp32", "quick": True, "case": "quick-padded"}
        assert worker.call("prepare", **arguments) == {}
        assert min(worker.call("time", mode="both")) > 0
        with pytest.raises(RuntimeError, match="KeyError"):
            worker.call("time", mode="sideways")
    finally:
        worker.close()


def test_a_dead_worker_is_reported(tmp_path: Path) -> None:
    """The folder holds a library that cannot be imported, and comes first."""
    (tmp_path / "fusefeat.py").write_text("raise SystemExit(3)")
    worker = against.Process(tmp_path, "cpu", 1, 0.001)
    try:
        with pytest.raises(RuntimeError, match=r"gone \(exit code 3\)"):
            worker.call("prepare", family="attention_pool", dtype="fp32", quick=True, case="quick-padded")
    finally:
        worker.close()


def test_unknown_commit_is_refused() -> None:
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    with pytest.raises(SystemExit, match="no-such-commit"), against.built("no-such-commit", "cpu"):
        pass


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    progress = Progress(2)
    progress.say("a")
    progress.step()
    progress.say("b")
    progress.step()
    progress.close()
    assert capsys.readouterr().err == "[1/2] a\n[2/2] b\n"


def record(**values: Any) -> tables.Record:
    base = row("small", "forward", OURS, "ours", 1.0)
    fields = {name: "" if value is None else str(value) for name, value in vars(base).items()}
    fields |= {"processor": "p", "torch_version": "9", "used_by": "someone"}
    return fields | {name: str(value) for name, value in values.items()}


def test_tables_show_wins_and_losses() -> None:
    rows = [
        record(floor_fraction=0.5, peak_mib=2.0),
        record(contender="eager", kind="peer", median_ms=0.5),
        record(contender="slow", kind="peer", median_ms=9.0),
        record(mode="both", median_ms=2.0, peak_mib=3.25),
        record(mode="both", contender="eager", kind="peer", median_ms=5.0, peak_mib=7.0),
        record(contender="pyg", kind="peer", median_ms="", status="skipped", reason="not installed"),
    ]
    text = tables.render(rows)
    assert (
        "| small `[1,2,3]` | someone | 1.00 | **0.50** | eager 0.500 | 50% | 2.00 | 2.50 | eager 5.00 | - | 3.2 / 7.0 |"
        in text
    )
    assert "- no time for pyg (small): skipped, not installed" in text
    page = "before\n<!-- table a.csv -->\nold\n<!-- end -->\nafter\n"
    new = tables.updated(page, lambda name: rows)
    assert text in new and "old" not in new and new.startswith("before\n") and new.endswith("<!-- end -->\nafter\n")
    assert tables.updated(new, lambda name: rows) == new
    assert "Not measured yet." in tables.updated(page, lambda name: [])


def test_performance_page_is_up_to_date() -> None:
    """`python -m benchmarks.tables` writes it from benchmarks/results."""
    page = tables.PAGE.read_text()
    assert tables.updated(page, tables._read) == page


def test_every_family_of_a_csv_survives(tmp_path: Path) -> None:
    environment = {"fusefeat": "1", "torch": "2", "processor": "p"}
    run = Run(environment, [row("small", "forward", OURS, "ours", 1.5)], {"small": "a user"})
    report.write_csv(tmp_path / "rows.csv", [run])
    with (tmp_path / "rows.csv").open() as file:
        (line,) = tables.csv.DictReader(file)
    assert line["used_by"] == "a user"
    assert "| small `[1,2,3]` | a user | 1.50 |" in tables.render([line])


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("module", [attention_pool, shared_penalty], ids=lambda module: module.FAMILY)
def test_scaling_cases_are_named_after_their_axis(module: ModuleType, quick: bool) -> None:
    for axis, sizes in module.scaling(CPU, torch.float32, quick=quick).items():
        assert len(sizes) > 1
        assert [scaling.axis_and_size(case.name) for _, case in sizes] == [(axis, size) for size, _ in sizes]
