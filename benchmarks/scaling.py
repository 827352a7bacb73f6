"""Time against size: one line per contender, one panel per axis. Rows are those of cases named "axis=size"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .case import Skip
from .peers import optional
from .results import OURS, Row, Run

_MODES = {"forward": "forward", "both": "forward + backward"}
_PEER_COLOURS = ("#8c8c8c", "#c98f2d", "#5b8c5a", "#a05a8c", "#b8b8b8", "#6e6259")

Line = list[tuple[int, float]]


def axis_and_size(case: str) -> tuple[str, int] | None:
    """("T", 64) of "T=64", None of any other name."""
    axis, equals, size = case.partition("=")
    return (axis, int(size)) if equals and size.isdecimal() else None


def lines(rows: Sequence[Row]) -> dict[str, dict[str, Line]]:
    """By panel title, then by contender: sizes and medians. A floor is the sum that bounds the mode."""
    found: dict[str, dict[str, Line]] = {}
    for row in rows:
        place = axis_and_size(row.case)
        if place is None or row.mode not in _MODES or row.kind == "floor" or row.median_ms is None:
            continue
        title = f"{row.family} {row.dtype} {row.device}, {_MODES[row.mode]} against {place[0]}"
        panel = found.setdefault(title, {})
        panel.setdefault(row.contender, []).append((place[1], row.median_ms))
        if row.contender == OURS and row.floor_ms:
            panel.setdefault("floor", []).append((place[1], row.floor_ms))
    return found


def write(path: Path, runs: Sequence[Run]) -> None:
    """Raises Skip without matplotlib, or when no row scales."""
    panels = lines([row for run in runs for row in run.rows])
    if not panels:
        raise Skip("no case of a scaling run was timed")
    optional("matplotlib", "matplotlib").use("Agg")
    pyplot = optional("matplotlib.pyplot", "matplotlib")
    height = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(height, 2, figsize=(13, 4.2 * height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, by_contender) in zip(axes.flat, panels.items(), strict=False):
        colours = iter(_PEER_COLOURS * 4)
        for contender, points in by_contender.items():
            if contender == "floor":
                style = {"color": "#c0392b", "linestyle": "--", "linewidth": 1.0}
            elif contender.startswith(OURS):
                style = {"color": "#1b6ca8", "marker": "o", "linewidth": 2.2}
            else:
                style = {"color": next(colours), "marker": ".", "linewidth": 1.2}
            axis.plot(*zip(*sorted(points), strict=True), label=contender, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("ms", fontsize=9)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
