"""The same training with and without something, over several seeds."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .run import Run
from .timing import table
from .training import Metrics, draw_panels, write_csv

# Trains one variant in the run it is given, and measures it on test data.
Variant = Callable[[Run], Metrics]


def compare(run: Run, variants: Mapping[str, Variant], *, score: str, title: str) -> dict[str, list[Metrics]]:
    """Train every variant with every seed, print a table of test results, and write them.

    All variants of a seed begin with the same random state, and the runs of a seed are compared in pairs. Written to
    ``run.out``: ``results.json``, ``results.csv`` (one row per training), ``curves.png`` (all variants), and one
    folder per seed and variant with its checkpoints and ``curves.csv``.

    Args:
        variants: name to training; the first is what the others are compared with.
        score: the test metric to compare by; higher is better.
        title: printed above the table.

    Returns:
        The test metrics of every variant, one entry per seed, with the training's wall-clock "seconds" added.
    """
    check_resume(run)
    seeds = range(run.args.seed, run.args.seed + run.args.seeds)
    results: dict[str, list[Metrics]] = {name: [] for name in variants}
    folders: dict[str, list[Path]] = {name: [] for name in variants}
    for seed in seeds:
        for name, train in variants.items():
            part = run.child(f"seed-{seed}", seed=seed).child(folder_name(name), variant=name)
            if not part.quiet:
                run.say(f"\n{title}: {name}, seed {seed}")
            start = time.perf_counter()
            metrics = train(part)
            results[name].append({**metrics, "seconds": time.perf_counter() - start})
            folders[name].append(part.out)
            if part.quiet:
                run.say(f"{title}: {name}, seed {seed}: {score} {metrics[score]:.4f}")
    run.say("\n" + report(results, seeds, score=score, title=title))
    run.save_results({name: columns(rows) for name, rows in results.items()})
    write_csv(
        run.out / "results.csv",
        [
            {"variant": name, "seed": seed, **row}
            for name, rows in results.items()
            for seed, row in zip(seeds, rows, strict=True)
        ],
    )
    draw_comparison(run.out / "curves.png", folders)
    return results


def check_resume(run: Run) -> None:
    if run.args.resume is not None and not run.is_part:
        folder = Path(run.args.resume or run.out)
        if not any(folder.rglob("checkpoint.pt")):
            run.fail(f"--resume: there is no checkpoint below {folder}")


def folder_name(variant: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in variant).split())


def columns(rows: list[Metrics]) -> dict[str, list[float]]:
    return {metric: [row[metric] for row in rows] for metric in rows[0]}


def spread(values: Sequence[float]) -> str:
    """The mean, and the sample standard deviation when there is more than one value."""
    mean = statistics.fmean(values)
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else f"{mean:.4f}"


def report(results: dict[str, list[Metrics]], seeds: Sequence[int], *, score: str, title: str) -> str:
    """A table: test metrics of every variant, and how it differs from the first one, seed by seed."""
    baseline = next(iter(results))
    reference = [row[score] for row in results[baseline]]
    metrics = [metric for metric in results[baseline][0] if metric != "seconds"]
    rows = []
    for name, runs in results.items():
        difference = [row[score] - other for row, other in zip(runs, reference, strict=True)]
        better = sum(change > 0 for change in difference)
        row = [name, *(spread([run[metric] for run in runs]) for metric in metrics)]
        row += ["", ""] if name == baseline else [f"{signed(difference)}", f"{better}/{len(seeds)}"]
        rows.append([*row, f"{statistics.fmean(run['seconds'] for run in runs):.1f}"])
    header = ["variant", *metrics, f"{score}: difference", "better", "s"]
    return f"{title}; test data, {len(seeds)} seed(s), mean ± std\n{table(header, rows)}"


def signed(values: Sequence[float]) -> str:
    text = spread(values)
    return text if text.startswith("-") else f"+{text}"


def draw_comparison(path: Path, folders: dict[str, list[Path]]) -> None:
    """One panel per metric of ``curves.csv``, one line per variant."""
    curves = {
        name: [read_curves(file) for part in parts for file in part.rglob("curves.csv")]
        for name, parts in folders.items()
    }
    curves = {name: repetitions for name, repetitions in curves.items() if repetitions}
    first = next(iter(curves.values()))[0]
    panels = {
        metric: {name: [curve[metric] for curve in repetitions] for name, repetitions in curves.items()}
        for metric in first
        if metric != "epoch"
    }
    draw_panels(path, first["epoch"], panels)


def read_curves(path: Path) -> dict[str, list[float]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {metric: [float(row[metric]) for row in rows] for metric in rows[0]}
