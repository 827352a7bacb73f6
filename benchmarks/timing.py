"""Interleaved timing: in every round each contender gets one slice of time, so that drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import benchmark

from .case import Bound

Slice = Callable[[], list[float]]

_GPU_BLOCKS = 5


@dataclass(frozen=True)
class Stats:
    """Seconds: least, median and quartiles of so many measurements."""

    least: float
    median: float
    q1: float
    q3: float
    count: int

    @property
    def spread(self) -> float:
        """Interquartile range relative to the median."""
        return (self.q3 - self.q1) / self.median if self.median else 0.0


def summarise(times: list[float]) -> Stats:
    """Least, median and inclusive quartiles."""
    if not times:
        raise ValueError("no measurements to summarise")
    if len(times) == 1:
        return Stats(times[0], times[0], times[0], times[0], 1)
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Stats(min(times), median, q1, q3, len(times))


def interleaved(
    slices: Mapping[str, Slice], rounds: int, on_round: Callable[[int], None] | None = None
) -> dict[str, list[float]]:
    """Times of every entry over all rounds. The order rotates, so that nobody always follows the same neighbour."""
    names = list(slices)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        if on_round is not None:
            on_round(index)
        shift = index % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            times[name] += slices[name]()
    return times


def _blocks(timer: benchmark.Timer, seconds: float) -> list[float]:
    """A few blocks, each until the GPU's last kernel has ended. ``blocked_autorange`` would make each of them 10,000
    times as long as it takes to synchronise, whatever the slice."""
    # Launch and wait, once: an upper bound, so that the blocks do not outgrow the slice.
    number = max(1, round(seconds / _GPU_BLOCKS / timer.timeit(1).mean))
    return [timer.timeit(number).mean for _ in range(_GPU_BLOCKS)]


def repeated(step: Callable[[], object], threads: int, seconds: float, grad: bool, cuda: bool = False) -> Slice:
    """A slice of blocked measurements of ``step``: enough calls per block to drown the clock, a warm-up first."""
    timer = benchmark.Timer("step()", globals={"step": step}, num_threads=threads)

    def run() -> list[float]:
        with torch.set_grad_enabled(grad):
            if cuda:
                return _blocks(timer, seconds)
            measured = timer.blocked_autorange(min_run_time=seconds)
        return [t / measured.number_per_run for t in measured.raw_times]

    return run


def gradients(bound: Bound, grad_out: Tensor) -> tuple[Tensor, ...]:
    """One forward and backward, the gradients in new tensors as after ``zero_grad(set_to_none=True)``."""
    return torch.autograd.grad(bound.forward(), list(bound.leaves.values()), grad_out)


def _on_gpu(bound: Bound) -> bool:
    return any(leaf.is_cuda for leaf in bound.leaves.values())


def forward_slice(bound: Bound, threads: int, seconds: float) -> Slice:
    return repeated(bound.forward, threads, seconds, grad=False, cuda=_on_gpu(bound))


def both_slice(bound: Bound, grad_out: Tensor, threads: int, seconds: float) -> Slice:
    return repeated(lambda: gradients(bound, grad_out), threads, seconds, grad=True, cuda=_on_gpu(bound))


def backward_slice(bound: Bound, grad_out: Tensor, threads: int, seconds: float) -> Slice:
    """Backward alone, each time after a forward that is not timed: a kept graph would need retain_graph, which
    changes what is freed and, under torch.compile, what may be overwritten."""
    cuda = _on_gpu(bound)

    def once() -> float:
        out = bound.forward()
        leaves = list(bound.leaves.values())
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            torch.autograd.grad(out, leaves, grad_out)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3
        begin = time.perf_counter()
        torch.autograd.grad(out, leaves, grad_out)
        return time.perf_counter() - begin

    def run() -> list[float]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.enable_grad():
                once()
                times: list[float] = []
                # The slice bounds the wall time, forwards included, or a slow forward would stretch the run.
                stop = time.perf_counter() + seconds
                while not times or time.perf_counter() < stop:
                    times.append(once())
        finally:
            torch.set_num_threads(before)
        return times

    return run
