"""Peak memory of one call above what was in use before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {_STATUS}")


def _return_free_memory() -> None:
    """Memory that malloc keeps from earlier calls would hide what the next call takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _peak_cuda(step: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def few_to_collect() -> Iterator[None]:
    """Leaves what exists now out of the collections inside, of which there is one before every look at the memory: all
    of torch's objects take a fifth of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Highest memory during ``step`` minus that before it, its results included; None where it cannot be told.

    On CUDA by the allocator's count; on Linux CPUs by the kernel's high-water mark of resident memory, which is
    reset first (so counted in touched pages, blind to what fits into memory the process already holds).
    """
    gc.collect()
    if device.type == "cuda":
        return _peak_cuda(step, device)
    try:
        _return_free_memory()
        _CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
        step()
        return max(_resident("VmHWM") - before, 0)
    except OSError:
        return None
