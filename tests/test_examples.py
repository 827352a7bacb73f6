"""Every example runs to its end in its smoke form, writes its files, and resumes exactly."""

from __future__ import annotations

import csv
import importlib
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import EXAMPLES, is_png, numbers, passes


def model_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["model"]
    return state


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def attention_bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bags")
    check_bags(out, passes("bags", out))
    return out


def check_bags(out: Path, text: str) -> None:
    assert "test AUC" in text
    assert "eager, packed" in text
    assert "\x1b" not in text and "\r" not in text, "progress bars belong on terminals only"
    assert is_png(out / "curves.png") and is_png(out / "attention.png")
    results = json.loads((out / "results.json").read_text())
    assert all(math.isfinite(number) for number in numbers(results))
    assert 0 <= results["test"]["auc"] <= 1
    assert min(numbers(results["milliseconds"])) > 0
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [1, 2]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    best = max(rows, key=lambda row: float(row["validation/auc"]))
    saved = torch.load(out / "best.pt", weights_only=True)
    assert saved["rows"][-1]["validation/auc"] == float(best["validation/auc"])


def test_bags_with_gated_attention(tmp_path: Path) -> None:
    check_bags(tmp_path, passes("bags", tmp_path, "--pooling", "gated"))


def test_bags_resume_as_if_never_stopped(attention_bags: Path, tmp_path: Path) -> None:
    half, rest = tmp_path / "half", tmp_path / "rest"
    passes("bags", half, "--epochs", "1")
    text = passes("bags", rest, "--resume", str(half / "checkpoint.pt"))
    assert "resumed after epoch 1" in text
    for name in ("checkpoint.pt", "best.pt"):
        assert_same(model_of(attention_bags / name), model_of(rest / name))
    assert (attention_bags / "curves.csv").read_text() == (rest / "curves.csv").read_text()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("harness")


def test_only_full_runs_must_reach_their_goal(harness: Any, tmp_path: Path) -> None:
    arguments = harness.parser("name", "", epochs=3, batch_size=1, lr=0.1)
    full = harness.Run(arguments.parse_args(["--out", str(tmp_path)]))
    full.require("AUC", 0.95, 0.95)
    with pytest.raises(SystemExit, match=r"AUC is 0\.9400, expected at least 0\.95"):
        full.require("AUC", 0.94, 0.95)
    smoke = harness.Run(arguments.parse_args(["--out", str(tmp_path), "--smoke"]))
    assert (full.args.epochs, smoke.args.epochs) == (3, 2)
    smoke.require("AUC", 0.5, 0.95)
    with pytest.raises(SystemExit, match="AUC is nan"):
        smoke.require("AUC", math.nan, 0.95)


def test_resume_refuses_other_settings(harness: Any, tmp_path: Path) -> None:
    arguments = harness.parser("name", "", epochs=1, batch_size=1, lr=0.1)
    arguments.add_argument("--data", type=Path, default=tmp_path)

    def train(*others: str) -> None:
        run = harness.Run(arguments.parse_args(["--out", str(tmp_path), *others]))
        model, optimizer = torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)])
        harness.fit(run, model, optimizer, lambda epoch: {}, lambda: {"a/b": 0.0}, score="a/b")

    train()
    train("--resume", "--epochs", "2")
    with pytest.raises(SystemExit, match=r"checkpoint\.pt was made with seed=0, not 1"):
        train("--resume", "--seed", "1")
    with pytest.raises(SystemExit, match=r"was made with data=.*, not elsewhere"):
        train("--resume", "--data", "elsewhere")


def test_compilation_gives_up_with_a_reason(harness: Any) -> None:
    def fails(compiled: object) -> None:
        raise RuntimeError("no compiler\nlong story")

    assert harness.bounded_compile(torch.sin, fails, seconds=60) == "RuntimeError: no compiler"
    finished = []

    def takes_long(compiled: object) -> None:
        time.sleep(60)
        finished.append(compiled)

    assert harness.bounded_compile(torch.sin, takes_long, seconds=0.1) == "not compiled within 0.1 s"
    assert not finished


def test_timing_takes_turns(harness: Any) -> None:
    calls: list[str] = []
    candidates = {name: partial(calls.append, name) for name in "abc"}
    timings = harness.interleaved(candidates, torch.device("cpu"), seconds=0.0)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"
    assert all(timing.rounds == 3 and timing.low <= timing.median <= timing.high for timing in timings.values())
