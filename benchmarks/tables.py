"""Writes the tables of docs/performance.md from the CSV files of real runs: `python -m benchmarks.tables [--check]`.

A block between `<!-- table NAME.csv -->` and `<!-- end -->` holds what benchmarks/results/NAME.csv says; NAME may
name a folder, as those of `make gpu-check`.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

from .results import OURS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

_BLOCK = re.compile(r"(<!-- table (?P<name>[\w./-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHOWN = (("forward", "forward"), ("both", "forward + backward"))
_LOST = 0.95  # below that, ours is slower than the best peer by more than noise

Record = dict[str, str]


def _number(text: str, digits: int = 3) -> str:
    if not text:
        return "-"
    value = float(text)
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def _ours_and_best(rows: list[Record], mode: str) -> tuple[Record | None, Record | None]:
    timed = [row for row in rows if row["mode"] == mode and row["median_ms"]]
    ours = next((row for row in timed if row["contender"] == OURS), None)
    peers = [row for row in timed if row["kind"] == "peer"]
    return ours, min(peers, key=lambda row: float(row["median_ms"]), default=None)


def _cells(rows: list[Record], mode: str) -> list[str]:
    ours, best = _ours_and_best(rows, mode)
    if ours is None:
        return ["no time", "-", "-", "-"]
    time = _number(ours["median_ms"])
    floor = f"{float(ours['floor_fraction']):.0%}" if ours["floor_fraction"] else "-"
    if best is None:
        return [time, "-", "-", floor]
    factor = float(best["median_ms"]) / float(ours["median_ms"])
    shown = f"{factor:.2f}" if factor < 10 else f"{factor:.0f}"
    return [
        time,
        f"**{shown}**" if factor < _LOST else shown,
        f"{best['contender']} {_number(best['median_ms'])}",
        floor,
    ]


def _memory(rows: list[Record]) -> str:
    ours, best = _ours_and_best(rows, "both")
    return " / ".join("-" if row is None else _number(row["peak_mib"], 2) for row in (ours, best))


def _table(rows: list[Record]) -> list[str]:
    head = ["shape", "who"]
    for _, title in _SHOWN:
        head += [f"{title}, ms", "x best peer", "best peer, ms", "of floor"]
    head.append("peak MiB, ours / best peer")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|---:|---|---:|" * len(_SHOWN) + "---:|"]
    for case, group in groupby(rows, key=lambda row: row["case"]):
        of_case = list(group)
        cells = [f"{case} `{of_case[0]['shape']}`", of_case[0].get("used_by") or ""]
        for mode, _ in _SHOWN:
            cells += _cells(of_case, mode)
        lines.append("| " + " | ".join([*cells, _memory(of_case)]) + " |")
    return lines


def _refused(rows: list[Record]) -> list[str]:
    """Sentences on peers without a time, each reason once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            cases = found.setdefault((row["contender"], row["status"], row["reason"]), [])
            cases += [row["case"]] if row["case"] not in cases else []
    return [
        f"- no time for {contender} ({', '.join(cases)}): {status}, {reason}"
        for (contender, status, reason), cases in found.items()
    ]


def _setting(row: Record) -> tuple[str, ...]:
    return (row["family"], row["dtype"], row["device"], row["threads"], row["huge_pages"], row.get("caches") or "warm")


def render(rows: Iterable[Record]) -> str:
    """One table for every family, dtype, device and way of running in a CSV."""
    parts = []
    for (family, dtype, device, threads, pages, caches), group in groupby(rows, key=_setting):
        of_table = list(group)
        first = of_table[0]
        title = f"{family}, {dtype}: "
        if device == "cpu":
            title += f"{first['processor']} ({threads} threads), torch {first['torch_version']}, {caches} caches, "
            title += f"huge pages for torch's own allocations {pages}"
        else:
            title += f"{first.get('device_name') or device}, torch {first['torch_version']}, {caches} caches"
        parts.append("\n".join([title, "", *_table(of_table), "", *_refused(of_table)]).rstrip())
    return "\n\n".join(parts) + "\n"


def updated(page: str, read: Callable[[str], list[Record]]) -> str:
    """The page with every block written anew."""

    def block(found: re.Match[str]) -> str:
        rows = read(found["name"])
        return f"{found[1]}\n{render(rows) if rows else 'Not measured yet.' + chr(10)}\n{found[3]}"

    return _BLOCK.sub(block, page)


def _read(name: str) -> list[Record]:
    if not (RESULTS / name).exists():
        return []
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when the page is not up to date")
    arguments = parser.parse_args()
    before = PAGE.read_text()
    after = updated(before, _read)
    if arguments.check:
        if before != after:
            print(f"{PAGE} is not up to date: run python -m benchmarks.tables", file=sys.stderr)
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
