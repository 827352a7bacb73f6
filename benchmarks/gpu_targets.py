"""The project's promises for a GPU, from the rows of a run on one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .case import Target
from .floor import COPY_WARM
from .results import OURS, Row, best_peer

# A copy that moves less may stay in the second-level cache, and its bandwidth is not the memory's.
_LARGE = 128 << 20
_COMPILE_FROM = 2 << 20
_FEATURES = 65536
_SCRATCH_MIB = 64


def _one(rows: Iterable[Row], mode: str, contender: str) -> Row | None:
    found = (row for row in rows if (row.mode, row.contender) == (mode, contender) and row.median_ms is not None)
    return next(found, None)


def _by_case(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one case and dtype on a GPU, as often as there are."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.device == "cuda":
            groups.setdefault((row.case, row.dtype), []).append(row)
    return list(groups.values())


def _name(row: Row) -> str:
    return f"{row.case} {row.shape} {row.dtype} {row.mode}"


def _bytes(row: Row) -> float:
    """What the row's case must move at least: its rate times its time."""
    return (row.gb_per_s or 0.0) * (row.median_ms or 0.0) * 1e6


def _not_slower_than_compile(rows: Sequence[Row]) -> list[Target]:
    found = []
    for mode in ("forward", "both"):
        ours = _one(rows, mode, OURS)
        if ours is None or ours.median_ms is None or _bytes(ours) <= _COMPILE_FROM:
            continue
        text = f"{_name(ours)}: not slower than torch.compile"
        best = best_peer(rows, ours.case, mode, ("compile",))
        if best is None or best.median_ms is None:
            found.append(Target(text, None, False))
            continue
        factor = best.median_ms / ours.median_ms
        found.append(Target(text, f"{factor:.2f}x of {best.contender}", factor >= 1.0))
    return found


def pools(rows: Sequence[Row]) -> list[Target]:
    """At least 85 % of the copy's bandwidth where the tokens are large; never slower than torch.compile beyond 2 MB."""
    found = []
    for of_case in _by_case(rows):
        for mode in ("forward", "both"):
            ours, copy = _one(of_case, mode, OURS), _one(of_case, mode, COPY_WARM)
            if ours is None or copy is None or not ours.gb_per_s or not copy.gb_per_s or _bytes(copy) < _LARGE:
                continue
            share = ours.gb_per_s / copy.gb_per_s
            got = f"{share:.0%} ({ours.gb_per_s:.0f} of {copy.gb_per_s:.0f} GB/s)"
            found.append(Target(f"{_name(ours)}: at least 85% of the copy's bandwidth", got, share >= 0.85))
        found += _not_slower_than_compile(of_case)
    return found


def products(rows: Sequence[Row], sizes: Mapping[str, tuple[int, int, int]]) -> list[Target]:
    """At least 60 % of the bare products' rate in bfloat16 at 65536 features, in no memory for all logits; never slower
    than torch.compile beyond 2 MB. ``sizes``: rows, channels and features by case."""
    found = []
    for of_case in _by_case(rows):
        ours = {mode: _one(of_case, mode, OURS) for mode in ("forward", "both")}
        count, channels, features = sizes.get(of_case[0].case, (0, 0, 0))
        for row in ours.values():
            if row is not None and features == _FEATURES and row.dtype == "bf16":
                share = row.floor_fraction or 0.0
                found.append(
                    Target(f"{_name(row)}: at least 60% of the bare products' rate", f"{share:.0%}", share >= 0.6)
                )
        both = ours["both"]
        if both is not None and both.peak_mib is not None and features == _FEATURES:
            beyond = both.peak_mib - (count + features) * channels * 4 / 2**20
            text = f"{_name(both)}: at most {_SCRATCH_MIB} MiB beyond the gradients in float32"
            found.append(Target(text, f"{max(beyond, 0.0):.1f} MiB", beyond <= _SCRATCH_MIB + 1))
        found += _not_slower_than_compile(of_case)
    return found
