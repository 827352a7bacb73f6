"""One row per contender, mode and shape; a run is its rows and the machine they come from. Plain data, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .case import Target

OURS = "fusefeat"  # the contender with automatic choice of backend


@dataclass
class Row:
    """``kind`` is ours, peer, other (not the same computation) or floor; ``status`` is ok, wrong, skipped or failed,
    ``reason`` why there is no time.

    ``speedup`` is the fastest peer's median over this one's: how many times faster than the best peer.
    ``floor_ms`` is the time of the floors that bound this mode from below, ``floor_fraction`` that over the median.
    """

    family: str
    case: str
    shape: str
    dtype: str
    device: str
    threads: int
    huge_pages: str
    mode: str
    contender: str
    kind: str
    peer: str = ""
    caches: str = "warm"
    status: str = "ok"
    reason: str = ""
    median_ms: float | None = None
    min_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    spread: float | None = None
    measurements: int = 0
    speedup: float | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    floor_ms: float | None = None
    floor_fraction: float | None = None
    peak_mib: float | None = None
    error: float | None = None


@dataclass
class Run:
    environment: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Run:
        return Run(
            environment=data["environment"],
            rows=[Row(**row) for row in data["rows"]],
            about=data["about"],
            targets=[Target(**target) for target in data["targets"]],
            left_out=data["left_out"],
            interrupted=data["interrupted"],
        )

    @property
    def ours_failed(self) -> bool:
        return any(row.kind == "ours" and row.status in ("wrong", "failed") for row in self.rows)


def time_of(rows: Iterable[Row], case: str, mode: str, contender: str) -> float | None:
    """Median in ms of one contender, or None."""
    for row in rows:
        if (row.case, row.mode, row.contender) == (case, mode, contender):
            return row.median_ms
    return None


def best_peer(rows: Iterable[Row], case: str, mode: str, peers: Sequence[str] | None = None) -> Row | None:
    """The fastest timed peer, of those named or of all."""
    timed = [
        row
        for row in rows
        if row.kind == "peer"
        and (row.case, row.mode) == (case, mode)
        and row.median_ms is not None
        and (peers is None or row.peer in peers)
    ]
    return min(timed, key=lambda row: row.median_ms or 0.0, default=None)
