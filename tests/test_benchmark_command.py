"""`python -m benchmarks` on the command line, and the stages of `make gpu-check`."""

from __future__ import annotations

import csv
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks import against, environment, plot, report, tables  # noqa: E402
from benchmarks.results import OURS, Row, Run  # noqa: E402

QUICK = ["attention_pool", "--quick", "--threads", "1", "--compare", "none"]


def row(case: str, **values: object) -> Row:
    return Row("f", case, "[1]", "fp32", "cpu", 1, "off", "forward", OURS, "ours", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--quick", "--only", "quick-packed,nowhere"],
            "--only nowhere: no case of that name or shape; there are quick-",
        ),
        (["--quick", "--only", ""], "no case of that name"),
        (["--slice", "-1"], "expected a time above 0"),
        (["--slice", "nan"], "expected a time above 0"),
        (["--limit", "0"], "expected a time above 0"),
        (["--plot", "chart.bmp"], "expected the name of a .png"),
        (["--csv", "/proc/none/rows.csv"], "/proc/none cannot be made"),
        (["--csv", str(ROOT)], "cannot be written"),
        (["--update"], "--update is about the file of --csv"),
        (["--against", "HEAD", "--cold", "--json"], "--against does not go with --cold, --json"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_measured(
    argv: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run_case", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_no_gpu_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit):
        cli.main(["--device", "cuda"])
    assert "--device cuda: torch" in (text := capsys.readouterr().err) and "was built without CUDA" in text

    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nMore.")

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert environment.why_no_cuda() == "torch finds no CUDA device: Found no NVIDIA driver on your system."


def test_dtypes_by_torch_s_names_too() -> None:
    assert cli._parser().parse_args(["--dtype", "bfloat16,fp32,float16"]).dtype == ["bf16", "fp32", "fp16"]


def test_what_is_measured_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that breaks off, here in its third case, leaves the rows of the cases before."""
    names = ["one", "two"]
    monkeypatch.setattr(cli, "run_case", lambda case, *rest: [row(names.pop(0))])
    path = tmp_path / "new" / "rows.csv"
    with pytest.raises(IndexError):
        cli.main([*QUICK, "--csv", str(path)])
    with path.open() as file:
        assert [line["case"] for line in csv.DictReader(file)] == ["one", "two"]


def test_a_file_is_updated_case_by_case(tmp_path: Path) -> None:
    path, environment = tmp_path / "rows.csv", dict.fromkeys(("fusefeat", "torch", "processor"), "x")
    old = [row("one", median_ms=1.0), row("two", median_ms=2.0, floor_ms=0.5), row("two", median_ms=2.5)]
    report.write_csv(path, [Run(environment, old)], update=True)
    assert report.read_csv(path) == old
    new = [row("two", median_ms=3.0), row("three", measurements=7)]
    for _ in range(2):  # the second time after a further case
        report.write_csv(path, [Run(environment, new)], update=True)
        assert report.read_csv(path) == [old[0], *new]
    report.write_csv(path, [Run(environment, new)])
    assert report.read_csv(path) == new


def test_an_interrupted_run_shows_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def run_case(case: object, *rest: object) -> list[Row]:
        if case.name == "quick-queries":  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return [row("first", median_ms=1.25)]

    monkeypatch.setattr(cli, "run_case", run_case)
    assert cli.main([*QUICK, "--only", "quick-padded,quick-queries,quick-packed"]) == 130
    text = capsys.readouterr().out
    assert "f · first [1]" in text and "1.250" in text
    assert "Not run, interrupted: attention_pool quick-queries fp32; attention_pool quick-packed fp32" in text


def test_no_case_is_begun_after_the_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = iter((0.0, 1.0, 7.0, 8.0))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(cli, "run_case", lambda case, *rest: [row(case.name)])
    assert cli.main([*QUICK, "--only", "quick-padded,quick-queries", "--limit", "5"]) == 0
    text = capsys.readouterr().out
    assert "Not run, no time left: attention_pool quick-queries fp32" in text and "· quick-padded" in text
    run = Run({"torch": ""}, left_out=["a"], interrupted=True)
    assert report.from_json(report.to_json([run])) == [run]


@pytest.mark.parametrize("family", ["clamped_reg", "shared_objective"])
def test_every_family_scales(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(cli, "run_case", lambda case, *rest: seen.append(case.name) or [])
    assert cli.main([family, "--quick", "--scaling", "--threads", "1"]) == 0
    assert {name.split("=")[0] for name in seen} == {"N", "D", "F"}


def test_a_comparison_with_a_commit_leaves_slow_cases_out_and_draws_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    asked: list[str] = []

    class Worker:
        def __init__(self, *arguments: object) -> None:
            pass

        def close(self) -> None:
            pass

    class Built:
        def __enter__(self) -> Path:
            return ROOT

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(against, "built", lambda ref, device: Built())
    monkeypatch.setattr(against, "Process", Worker)

    def compare(other: object, this: object, family: str, dtype: str, case: str, *rest: object) -> list:
        asked.append(case)
        return [against.Comparison(family, case, "[1]", dtype, "both", 2.0, 1.0, 2.0, 2.0, 2.0)]

    drawn: list[Run] = []
    monkeypatch.setattr(against, "compare", compare)
    monkeypatch.setattr(plot, "write", lambda path, runs: drawn.extend(runs))
    argv = ["shared_penalty", "--against", "HEAD~1", "--compare", "eager", "--plot", str(tmp_path / "x.png")]
    assert cli.main(argv) == 0
    assert "sae" in asked and "ibq" not in asked
    assert [(found.contender, found.median_ms) for found in drawn[0].rows[:2]] == [("HEAD~1", 2.0), ("this tree", 1.0)]
    assert "--compare has no effect" in capsys.readouterr().err


def test_a_worker_that_dies_while_timing_is_one_row_s_reason() -> None:
    class Dying:
        def call(self, name: str, **arguments: object) -> object:
            if name == "time" and arguments["mode"] == "both":
                raise RuntimeError("the worker has gone (exit code -9)")
            return {} if name == "prepare" else [1.0]

    rows = against.compare(Dying(), Dying(), "f", "fp32", "c", "[1]", rounds=1, quick=True)  # type: ignore[arg-type]
    assert [bool(found.ratio) for found in rows] == [True, True, False]
    assert rows[2].reason == "the other commit: the worker has gone (exit code -9)"


def test_tables_name_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    found = row("one", median_ms=1.0)
    found.device = "cuda"
    environment = {"fusefeat": "1", "torch": "2", "processor": "some CPU", "device": "NVIDIA H200, sm 9.0, CUDA 13.0"}
    report.write_csv(path, [Run(environment, [found])])
    with path.open() as file:
        text = tables.render(list(csv.DictReader(file)))
    assert text.startswith("f, fp32: NVIDIA H200, sm 9.0, CUDA 13.0, torch 2, warm caches\n")
    page = "<!-- table NVIDIA-H200/rows.csv -->\nold\n<!-- end -->\n"
    asked: list[str] = []
    tables.updated(page, lambda name: asked.append(name) or [])
    assert asked == ["NVIDIA-H200/rows.csv"]


def test_families_and_caches_have_panels_of_their_own() -> None:
    """Or the bars of one family would be drawn over those of another with the same shape."""
    rows = [row("recipe", median_ms=1.0), row("recipe", median_ms=2.0), row("recipe", median_ms=3.0)]
    rows[1].family, rows[2].caches = "g", "cold"
    panels = plot._panels([Run({}, rows)])
    assert [(title.split(" ")[0], [found.median_ms for found in part]) for title, part in panels] == [
        ("f", [1.0]),
        ("g", [2.0]),
        ("f", [3.0]),
    ]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tests" / "gpu" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def test_the_gpu_s_tables_are_those_of_the_processor(check: ModuleType, tmp_path: Path) -> None:
    """Every family, bfloat16 too, into files, in time to be shown."""
    families: set[str] = set()
    for stage in check.stages(tmp_path):
        if "benchmarks" not in stage.command:
            continue
        arguments = cli._parser().parse_args(stage.within(100.0)[3:])
        assert arguments.device == "cuda" and 50 <= arguments.limit <= 80
        assert arguments.csv.parent == tmp_path and arguments.compare is None
        assert "fp32" in arguments.dtype and ("bf16" in arguments.dtype or not stage.needed)
        families |= set(arguments.families)
    assert families == set(cli.FAMILIES)


def test_a_stage_is_asked_to_end_before_it_is_killed(check: ModuleType, tmp_path: Path) -> None:
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: (print('so far'), sys.exit(130)));"
    script += "print('begun', flush=True); time.sleep(60)"
    log = tmp_path / "log"
    begin = time.monotonic()
    outcome = check.run(check.Stage("s", [sys.executable, "-c", script], 1), log, 1.0, {"PYTHONUNBUFFERED": "1"})
    assert outcome == "failed: stopped after 1 s" and time.monotonic() - begin < 30
    assert log.read_text().endswith("begun\nso far\n")


@pytest.mark.parametrize(("budget", "code"), [("60", 0), ("5", 1)])
def test_time_that_runs_out_is_said(
    check: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    budget: str,
    code: int,
) -> None:
    """What need not be run is no failure when there is no time for it; what is needed is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    passing = [sys.executable, "-c", "pass"]
    stages = [check.Stage("needed", passing, 10), check.Stage("more", passing, 10, reserve=100, needed=False)]
    monkeypatch.setattr(check, "stages", lambda results: stages)
    monkeypatch.setattr(sys, "argv", ["check.py", "--out", str(tmp_path), "--budget", budget])
    assert check.main() == code
    text = capsys.readouterr().out
    assert text.count("not run: no time left") == 1 + code
    assert (tmp_path / "summary.txt").read_text().splitlines()[0].startswith("Some GPU, torch")
