"""This tree beside another commit: a worker process for each, since one process can register the operators once.

The other commit is checked out into a temporary folder and built there. Both run the cases of this tree.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import timing
from .case import MODES
from .results import Row

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Comparison:
    """Medians in ms of the other commit and of this tree; ``ratio`` > 1: this tree is faster."""

    family: str
    case: str
    shape: str
    dtype: str
    mode: str
    other_ms: float | None = None
    this_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    reason: str = ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def built(ref: str, device: str) -> Iterator[Path]:
    """The folder to put on PYTHONPATH for that commit."""
    commit = _git("rev-parse", "--verify", f"{ref}^{{commit}}")
    folder = Path(tempfile.mkdtemp(prefix="fusefeat-against-"))
    tree = folder / "tree"
    try:
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        variables = os.environ | ({"FUSEFEAT_CUDA": "0"} if device == "cpu" else {})
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{ref} ({commit[:12]}) cannot be built:\n{(done.stdout + done.stderr)[-2000:]}")
        yield tree / "python"
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


class Process:
    """A worker on the library in ``path``."""

    def __init__(self, path: Path, device: str, threads: int, seconds: float) -> None:
        variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
        command = [sys.executable, "-m", "benchmarks.worker", "--device", device]
        command += ["--threads", str(threads), "--slice", str(seconds)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def call(self, name: str, **arguments: Any) -> Any:
        """Raises RuntimeError with the worker's own words when it cannot."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker has gone (exit code {self._process.wait()})")
        found = json.loads(answer)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found["result"]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def compare(
    other: Process, this: Process, family: str, dtype: str, case: str, shape: str, rounds: int, quick: bool
) -> list[Comparison]:
    """Both workers in turn, the first of a round changing; the ratio is the median of the rounds' own."""
    found = [Comparison(family, case, shape, dtype, mode) for mode in MODES]
    refused: dict[str, str] = {}
    for name, worker in (("the other commit", other), ("this tree", this)):
        try:
            reasons = worker.call("prepare", family=family, dtype=dtype, quick=quick, case=case)
        except RuntimeError as error:
            reasons = dict.fromkeys(MODES, str(error))
        refused |= {mode: f"{name}: {reason}" for mode, reason in reasons.items()}
    for row in found:
        if row.mode in refused:
            row.reason = refused[row.mode]
            continue
        times: dict[Process, list[float]] = {other: [], this: []}
        try:
            for index in range(rounds):
                for worker in (other, this) if index % 2 == 0 else (this, other):
                    times[worker].append(timing.summarise(worker.call("time", mode=row.mode)).median)
        except RuntimeError as error:
            row.reason = f"{'this tree' if worker is this else 'the other commit'}: {error}"
            continue
        ratios = timing.summarise([a / b for a, b in zip(times[other], times[this], strict=True)])
        row.other_ms = timing.summarise(times[other]).median * 1e3
        row.this_ms = timing.summarise(times[this]).median * 1e3
        row.ratio, row.ratio_low, row.ratio_high = ratios.median, ratios.q1, ratios.q3
    return found


def as_rows(ref: str, device: str, threads: int, rows: Sequence[Comparison]) -> list[Row]:
    """What was timed, as a chart wants it."""

    def row(found: Comparison, contender: str, kind: str, ms: float | None) -> Row:
        of = (found.family, found.case, found.shape, found.dtype, device, threads, "off", found.mode)
        return Row(*of, contender, kind, median_ms=ms, q1_ms=ms, q3_ms=ms)

    return [
        row(found, *which)
        for found in rows
        for which in ((ref, "peer", found.other_ms), ("this tree", "ours", found.this_ms))
    ]


def text(ref: str, rows: Sequence[Comparison]) -> str:
    """A table; x > 1: this tree is faster."""
    lines = [f"{'case':<14} {'shape':<34} {'dtype':<5} {'mode':<9} {ref[:12]:>12} {'this tree':>12}      x  quartiles"]
    for row in rows:
        head = f"{row.case:<14} {row.shape:<34} {row.dtype:<5} {row.mode:<9}"
        if row.ratio is None:
            lines.append(f"{head} no time: {row.reason}")
        else:
            lines.append(
                f"{head} {row.other_ms:>9.4g} ms {row.this_ms:>9.4g} ms {row.ratio:>6.2f}"
                f"  {row.ratio_low:.2f} .. {row.ratio_high:.2f}"
            )
    return "\n".join(lines)
