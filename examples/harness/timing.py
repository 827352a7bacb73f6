"""Timing of several ways to do one thing, in one process, in turns."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median over rounds, and the quartiles around it."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    candidates: dict[str, Callable[[], object]], device: torch.device, *, seconds: float, min_rounds: int = 3
) -> dict[str, Timing]:
    """Time every candidate once per round, in an order that moves on by one each round, for about ``seconds``.

    Load from elsewhere on the machine then falls on all candidates alike. The first two calls are not counted.
    """
    names = list(candidates)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(2):
            candidates[name]()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        for position in range(len(names)):
            name = names[(position + rounds) % len(names)]
            _finish(device)
            start = time.perf_counter()
            candidates[name]()
            _finish(device)
            taken[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return {name: _summary(times) for name, times in taken.items()}


def bounded_compile(function: T, warm_up: Callable[[T], object], *, seconds: float) -> T | str:
    """``torch.compile(function)``, warmed up, or the reason why it could not be had within ``seconds``."""
    compiled = cast(T, torch.compile(function))
    start = time.perf_counter()
    try:
        with _time_limit(seconds):
            warm_up(compiled)
    except Exception as error:
        # Whatever goes wrong in a compiler (no g++, no time, a bug) must cost the caller one row of a table only.
        if time.perf_counter() - start >= seconds:
            return f"not compiled within {seconds:.1f} s"
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return compiled


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after ``seconds``; without a limit where the system has no alarm signal."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(signum: int, frame: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high, len(times))
