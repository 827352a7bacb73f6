"""Runs as an aligned text table, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from .results import Row, Run

_COLUMNS = ("", "contender", "ms", "spread", "x best peer", "GB/s", "GFLOP/s", "of floor", "peak MiB", "error")
_MODE_NAMES = {"forward": "forward", "backward": "backward", "both": "fwd+bwd"}
_FEW = 4  # so few measurements have no spread to speak of
LEGEND = """\
ms: median over interleaved rounds; spread: interquartile range over the median; x best peer: the fastest peer's time
over this one's; GB/s, GFLOP/s: what any implementation must move and compute, over the time; of floor: the time of
reading (forward), or copying into a new gradient (backward), or both, measured in the same rounds, over the time, and
for the shared-logits families that of the bare matrix products; of several ways of copying into new memory, or of
multiplying, the fastest; (other): not the same computation, for comparison;
peak MiB: memory in use at most during the call, its results included; error: largest RMS error of results and
gradients relative to float64. Every gradient is written into new memory, as after zero_grad(set_to_none=True)."""


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}"


def _cells(row: Row) -> tuple[str, ...]:
    percent = "" if row.floor_fraction is None else f"{row.floor_fraction:.0%}"
    return (
        "",
        ("* " if row.kind == "ours" else "  ")
        + row.contender
        + (f" ({row.kind})" if row.kind in ("floor", "other") else ""),
        _number(row.median_ms, 4),
        "" if row.spread is None or row.measurements < _FEW else f"{row.spread:.0%}",
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        _number(row.gb_per_s),
        _number(row.gflop_per_s or None),
        percent,
        _number(row.peak_mib),
        "" if row.error is None else f"{row.error:.1e}",
    )


def _table(rows: Sequence[Row]) -> list[str]:
    """Lines of one case: timed rows aligned under their columns, the others as sentences."""
    timed = [row for row in rows if row.status == "ok"]
    cells = [_cells(row) for row in timed]
    widths = [max([len(title), *(len(line[i]) for line in cells)]) for i, title in enumerate(_COLUMNS)]
    widths[0] = max(map(len, _MODE_NAMES.values()))

    def aligned(line: Sequence[str]) -> str:
        left = [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
        return "  ".join(left + [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]).rstrip()

    lines = [aligned(_COLUMNS)]
    for mode, group in groupby(zip(timed, cells, strict=True), key=lambda pair: pair[0].mode):
        for index, (_, line) in enumerate(group):
            lines.append(aligned((_MODE_NAMES[mode] if index == 0 else "", *line[1:])))
    refused: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != "ok":
            refused.setdefault((row.contender, row.status, row.reason), []).append(_MODE_NAMES[row.mode])
    for (contender, status, reason), modes in refused.items():
        which = "" if len(modes) == len(_MODE_NAMES) else f" ({', '.join(modes)})"
        lines.append(f"no time for {contender}{which}: {status}: {reason}")
    return lines


def text(run: Run) -> str:
    """The whole run for people."""
    width = max(map(len, run.environment))
    lines = [f"{name:<{width}}  {value}" for name, value in run.environment.items()]
    lines += ["", LEGEND]
    for (family, case, dtype), group in groupby(run.rows, key=lambda row: (row.family, row.case, row.dtype)):
        rows = list(group)
        about = run.about.get(case, "")
        lines += ["", f"{family} · {case} {rows[0].shape} · {dtype} · {rows[0].device} · {about}", *_table(rows)]
    if run.targets:
        lines += ["", f"Targets (torch's huge pages {run.rows[0].huge_pages if run.rows else 'unknown'})"]
        for target in run.targets:
            verdict = "not measured" if target.got is None else "MET" if target.met else "NOT MET"
            lines.append(f"  {verdict:<12}  {target.text}" + (f": {target.got}" if target.got else ""))
    if run.left_out:
        lines += ["", f"Not run, {'interrupted' if run.interrupted else 'no time left'}: {'; '.join(run.left_out)}"]
    return "\n".join(lines)


def write_csv(path: Path, runs: Iterable[Run], update: bool = False) -> None:
    """Every row of every run, with the versions it was measured with. ``update``: the file's rows of cases that are in
    none of these runs stay where they are."""
    extra = ("used_by", "fusefeat_version", "torch_version", "processor", "device_name")
    new: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        origin = [run.environment[name] for name in ("fusefeat", "torch", "processor")]
        origin.append(run.environment.get("device", origin[-1]))
        constant = dict(zip(extra[1:], origin, strict=True))
        for row in run.rows:
            values = asdict(row) | constant | {"used_by": run.about.get(row.case, "")}
            new.setdefault(_case_of(values), []).append(values)
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    if update and path.exists():
        with path.open(newline="") as file:
            for old in csv.DictReader(file):
                cases.setdefault(_case_of(old), []).append(old)
    cases |= new
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)] + list(extra), extrasaction="ignore")
        writer.writeheader()
        for rows in cases.values():
            writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """The rows that write_csv wrote."""
    parse = {"str": str, "int": int, "float | None": lambda text: float(text) if text else None}
    with path.open(newline="") as file:
        return [
            Row(**{field.name: parse[str(field.type)](line[field.name]) for field in fields(Row)})
            for line in csv.DictReader(file)
        ]


def _case_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("family", "case", "dtype", "device", "threads", "huge_pages", "caches"))


def write_plain_csv(path: Path, rows: Sequence[Any]) -> None:
    """Rows that are dataclasses of one kind."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])] if rows else [])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def to_json(runs: Iterable[Run]) -> str:
    return json.dumps({"runs": [run.to_dict() for run in runs]}, indent=1)


def from_json(document: str) -> list[Run]:
    return [Run.from_dict(run) for run in json.loads(document)["runs"]]
