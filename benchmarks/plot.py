"""Bars per shape: time of every contender, with the floor as a line. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .case import Skip
from .peers import optional
from .results import Row, Run

_COLOURS = {"ours": "#1b6ca8", "peer": "#b8b8b8", "other": "#e3d5b8"}
_TITLES = {"forward": "forward", "both": "forward + backward"}


def _panels(runs: Sequence[Run]) -> list[tuple[str, list[Row]]]:
    panels: dict[tuple[str, ...], list[Row]] = {}
    for run in runs:
        for row in run.rows:
            if row.mode in _TITLES and row.kind != "floor" and row.median_ms is not None:
                pages = f", torch's huge pages {row.huge_pages}" if row.device == "cpu" else ""
                how = f"{_TITLES[row.mode]}, {row.caches} caches{pages}"
                key = (row.family, row.case, row.shape, row.dtype, row.device, how)
                panels.setdefault(key, []).append(row)
    return [("{} {} {} {} {}\n{}".format(*key), rows) for key, rows in panels.items()]


def write(path: Path, runs: Sequence[Run]) -> None:
    """One panel per shape and mode. Raises Skip without matplotlib, or when nothing was timed."""
    matplotlib = optional("matplotlib", "matplotlib")
    matplotlib.use("Agg")
    pyplot = optional("matplotlib.pyplot", "matplotlib")
    panels = _panels(runs)
    if not panels:
        raise Skip("nothing was timed")
    height = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(height, 2, figsize=(13, 2.6 * height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        names = [row.contender for row in rows]
        times = [row.median_ms or 0.0 for row in rows]
        low = [time - (row.q1_ms or 0.0) for row, time in zip(rows, times, strict=True)]
        high = [(row.q3_ms or 0.0) - time for row, time in zip(rows, times, strict=True)]
        bars = axis.barh(names, times, xerr=[low, high], color=[_COLOURS[row.kind] for row in rows])
        axis.bar_label(bars, labels=[f"{time:.3g}" for time in times], padding=3, fontsize=8)
        if rows[0].floor_ms is not None:
            axis.axvline(rows[0].floor_ms, color="#c0392b", linestyle="--", linewidth=1)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("ms; dashed: the floor, measured in the same rounds", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
