"""The epoch loop: train, evaluate, log, draw, save, resume, keep the best."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import nn

from .run import Run

Metrics = dict[str, float]


def fit(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_epoch: Callable[[int], Metrics],
    evaluate: Callable[[], Metrics],
    *,
    score: str,
    lower_is_better: bool = False,
) -> Metrics:
    """Train for ``run.args.epochs`` epochs and leave the best epoch's weights in the model.

    Every epoch starts from a seed of its own, so a resumed run repeats what an uninterrupted one does. Metrics are
    named "split/quantity"; quantities share a panel of ``curves.png``. Written to ``run.out``: ``checkpoint.pt``,
    its copy at the best epoch ``best.pt``, ``curves.csv``, ``curves.png``.

    Args:
        train_epoch: trains for the epoch of the given number.
        evaluate: measures the model on held-out data, for choosing the best epoch.
        score: the metric to choose by; the higher the better, unless ``lower_is_better``.

    Returns:
        The best epoch's metrics, and its number as "epoch".
    """
    rows: list[Metrics] = []
    best: Metrics | None = None
    if run.resume_from is not None:
        state = load(run, run.resume_from)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows, best = state["rows"], state["best"]
        run.say(f"resumed after epoch {len(rows)} from {run.resume_from}")
        bring_best(run, run.resume_from)
        write_csv(run.out / "curves.csv", rows)
    for epoch in range(len(rows) + 1, run.args.epochs + 1):
        run.seed(epoch)
        model.train()
        row = {"epoch": float(epoch), **train_epoch(epoch)}
        model.eval()
        with torch.no_grad():
            row.update(evaluate())
        rows.append(row)
        improved = best is None or (row[score] < best[score] if lower_is_better else row[score] > best[score])
        best = row if improved or best is None else best
        save(run, model, optimizer, rows, best, improved)
        write_csv(run.out / "curves.csv", rows)
        if not run.quiet:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "epoch")
            run.say(f"epoch {epoch}/{run.args.epochs}  {metrics}{'  *' if improved else ''}")
    if best is None:
        run.fail("no epoch to train: --epochs must be at least 1")
    if not run.is_part:
        draw_curves(run.out / "curves.png", rows)
    model.load_state_dict(torch.load(run.out / "best.pt", map_location=run.device, weights_only=True)["model"])
    model.eval()
    return best


def save(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: list[Metrics],
    best: Metrics,
    improved: bool,
) -> None:
    """Write the checkpoint, and its copy when it is the best so far."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rows": rows,
        "best": best,
        "settings": run.settings,
    }
    # A run that is interrupted while it writes keeps its previous checkpoint.
    partial = run.out / "checkpoint.pt.partial"
    torch.save(state, partial)
    os.replace(partial, run.out / "checkpoint.pt")
    if improved:
        shutil.copyfile(run.out / "checkpoint.pt", run.out / "best.pt")


def load(run: Run, path: Path) -> dict[str, Any]:
    """Read a checkpoint made with this run's settings."""
    if not path.is_file():
        run.fail(f"--resume: there is no checkpoint {path}")
    state: dict[str, Any] = torch.load(path, map_location=run.device, weights_only=True)
    for name, value in run.settings.items():
        if state["settings"].get(name) != value:
            run.fail(f"--resume: {path} was made with {name}={state['settings'].get(name)}, not {value}")
    return state


def bring_best(run: Run, checkpoint: Path) -> None:
    """When the checkpoint lies in another folder, its best copy has to come along."""
    best = checkpoint.parent / "best.pt"
    if not best.is_file():
        run.fail(f"--resume: there is no best.pt beside {checkpoint}")
    if best.resolve() != (run.out / "best.pt").resolve():
        shutil.copyfile(best, run.out / "best.pt")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(path: Path, rows: list[Metrics]) -> None:
    """One panel per quantity, one line per split."""
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for name in rows[0]:
        if name != "epoch":
            split, quantity = name.rsplit("/", 1)
            panels.setdefault(quantity, {})[split] = [[row[name] for row in rows]]
    draw_panels(path, [row["epoch"] for row in rows], panels)


def draw_panels(path: Path, epochs: list[float], panels: dict[str, dict[str, list[list[float]]]]) -> None:
    """One panel per title, one line per label: the mean of its repetitions, and their range as a band."""
    # The variants of a comparison are the same in all panels.
    shared = len(panels) > 1 and len({tuple(lines) for lines in panels.values()}) == 1
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, repetitions in lines.items():
            columns = list(zip(*repetitions, strict=True))
            axis.plot(epochs, [sum(column) / len(column) for column in columns], marker="o", markersize=3, label=label)
            if len(repetitions) > 1:
                axis.fill_between(
                    epochs, [min(column) for column in columns], [max(column) for column in columns], alpha=0.15
                )
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if not shared:
            axis.legend(frameon=False)
    if shared:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
