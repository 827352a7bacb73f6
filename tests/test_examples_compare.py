"""Every comparison runs to its end in its smoke form, and goes on where it was stopped."""

from __future__ import annotations

import csv
import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import EXAMPLES, is_png, numbers, passes

# Arguments that shorten a run, the folders that hold a comparison, and its variants.
COMPARISONS: dict[str, tuple[list[str], list[str], int]] = {
    "bags": (["--compare"], [""], 4),
    "classify_images": (["--epochs", "1"], ["all-labels", "5-labels-per-class"], 3),
    "sequence_rnn": (["--blank-rows", "4"], ["0-blank-rows", "4-blank-rows"], 3),
    "transfer_learning": (["--epochs", "1"], [""], 6),
    "autoencoder": (["--held-out", "3", "9"], [""], 2),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_compares(name: str, tmp_path: Path) -> None:
    arguments, folders, variants = COMPARISONS[name]
    text = passes(name, tmp_path, *arguments)
    assert "\x1b" not in text and "\r" not in text, "progress bars belong on terminals only"
    assert text.count("; test data, 1 seed(s)") == len(folders)
    for folder in folders:
        check_comparison(tmp_path / folder, variants)
    shutil.rmtree(tmp_path)  # checkpoints of large nets


def check_comparison(folder: Path, variants: int) -> None:
    assert is_png(folder / "curves.png")
    results = json.loads((folder / "results.json").read_text())
    assert len(results) == variants
    assert all(math.isfinite(number) for number in numbers(results))
    rows = rows_of(folder / "results.csv")
    assert [row["variant"] for row in rows] == list(results)
    checkpoints = sorted((folder / "seed-0").rglob("checkpoint.pt"))
    assert len(checkpoints) >= variants
    for checkpoint in checkpoints:
        curves = rows_of(checkpoint.parent / "curves.csv")
        assert len(curves) == len(torch.load(checkpoint, weights_only=True)["rows"])
        assert (checkpoint.parent / "best.pt").is_file()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def without_times(path: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows_of(path)]


def test_a_layer_that_learns_on_its_own_in_both_nets(tmp_path: Path) -> None:
    passes("auto_learning", tmp_path, "--epochs", "1", "--vgg16-images", "8", "--batch-size", "4")
    check_comparison(tmp_path / "mlp", 4)
    check_comparison(tmp_path / "vgg16", 3)
    shutil.rmtree(tmp_path)


def test_a_comparison_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    text = passes("extract_features", whole, "--seeds", "2")
    assert "test data, 2 seed(s)" in text and "epoch 1/2" not in text
    passes("extract_features", parts, "--epochs", "1")
    resumed = passes("extract_features", parts, "--seeds", "2", "--resume")
    assert resumed.count("resumed after epoch 1") == 3, "seed 0 had begun, seed 1 had not; one variant trains nothing"
    assert without_times(whole / "results.csv") == without_times(parts / "results.csv")
    assert len(rows_of(whole / "results.csv")) == 8


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("transfer_learning")


def test_transfer_takes_weights_of_torchvision_and_of_checkpoints(transfer: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        published, ours = transfer.alexnet().state_dict(), transfer.Classifier("attention", 1, 0.5)
    wanted = {name: value.shape for name, value in ours.features.state_dict().items()}
    small = {name: torch.full((1,), float(len(name))) for name in published}
    for number, state in enumerate((small, {"model": small, "rows": []})):
        path = tmp_path / f"{number}.pt"
        torch.save(state, path)
        found = transfer.features_of(path)
        assert found.keys() == wanted.keys()
        assert all(found[name].item() == len(f"features.{name}") for name in found)
    assert all(published[f"features.{name}"].shape == shape for name, shape in wanted.items())


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("harness")


def test_splits_of_the_digits_are_disjoint_and_complete(harness: Any) -> None:
    splits = harness.digit_splits(0)
    assert [len(split.digits) for split in splits] == [1077, 270, 450]
    assert all(split.digits.bincount().min() >= 25 for split in splits)
    again = harness.digit_splits(0)
    assert all(torch.equal(one.images, other.images) for one, other in zip(splits, again, strict=True))
    assert not torch.equal(splits[0].digits, harness.digit_splits(1)[0].digits)
    eights = splits[2].only(8, 3)
    assert eights.digits.unique().tolist() == [0, 1]
    assert torch.equal(eights.images[eights.digits == 0], splits[2].images[splits[2].digits == 8])
    few = harness.few_per_class(splits[0].digits, 2)
    assert splits[0].digits[few].tolist() == [digit for digit in range(10) for _ in range(2)]


def toy_fit(harness: Any, run: Any) -> None:
    model, optimizer = torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)])
    harness.fit(run, model, optimizer, lambda epoch: {}, lambda: {"a/b": 0.0}, score="a/b")


def test_the_table_shows_mean_deviation_and_paired_difference(harness: Any, tmp_path: Path) -> None:
    values = {"plain": [0.5, 0.7, 0.6], "ours": [0.6, 0.7, 0.8]}
    arguments = harness.parser("name", "", epochs=1, batch_size=1, lr=0.1)
    run = harness.Run(arguments.parse_args(["--out", str(tmp_path), "--seeds", "3"]))

    def variant(name: str) -> Any:
        def train(part: Any) -> dict[str, float]:
            assert part.out == tmp_path / f"seed-{part.args.seed}" / name
            toy_fit(harness, part)
            return {"accuracy": values[name][part.args.seed]}

        return train

    said: list[str] = []
    run.say = said.append
    results = harness.compare(run, {name: variant(name) for name in values}, score="accuracy", title="title")
    assert {name: [row["accuracy"] for row in rows] for name, rows in results.items()} == values
    assert "plain    0.6000 ± 0.1000" in said[-1]
    # The differences are 0.1, 0 and 0.2.
    assert "ours     0.7000 ± 0.1000      +0.1000 ± 0.1000     2/3" in said[-1]

    empty = harness.Run(arguments.parse_args(["--out", str(tmp_path / "empty"), "--resume"]))
    with pytest.raises(SystemExit, match="there is no checkpoint below"):
        harness.compare(empty, {}, score="accuracy", title="title")
