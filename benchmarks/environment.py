"""Where a run took place: whoever reads the table must be able to tell."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import fusefeat
import torch
from fusefeat import backends

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"

# Processes that wanted to run in the last minute, on average: with more, others were at work beside us. What runs on a
# GPU minds only when it no longer gets a processor.
_BUSY = 0.7


def _busy(device: torch.device) -> float:
    return _BUSY if device.type == "cpu" else max(_BUSY, (os.cpu_count() or 1) / 2)


def huge_pages() -> str:
    """Whether torch's own allocator asks for huge pages, "on" or "off". It reads the variable once."""
    return "on" if os.environ.get(HUGE_PAGES) == "1" else "off"


def why_no_cuda() -> str:
    """For people who asked for a GPU and get none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch finds no CUDA device: {str(error).strip().splitlines()[0]}"
    return "torch finds no CUDA device"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _isa() -> str:
    torch_isa = torch.backends.cpu.get_cpu_capability()
    try:
        from fusefeat import _library

        ours = _library.isa()["current"]
    except (ImportError, AttributeError, RuntimeError):
        ours = "unknown"
    return f"fusefeat {ours}, torch {torch_isa}"


def _kernel_huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        return text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return "unknown"


def explicit_backends(device: torch.device) -> list[str]:
    """On a GPU, where there are two: the backends to time by name beside the automatic choice."""
    if device.type == "cpu":
        return []
    probe = torch.empty(1, device=device)
    return [name for name, found in backends.BACKENDS.items() if name != "reference" and not found.why_not(probe)]


def facts(device: torch.device, threads: int) -> dict[str, str]:
    """Name and text of everything the header prints."""
    peers = f"peers {'get' if huge_pages() == 'on' else 'do not get'} huge pages ({HUGE_PAGES} is {huge_pages()})"
    probe = torch.empty(1, device=device)
    load = os.getloadavg()[0]
    found = {
        "fusefeat": fusefeat.__version__,
        "torch": torch.__version__,
        "processor": f"{_cpu_model()}, {os.cpu_count()} CPUs, {threads} threads",
        "load": f"{load:.1f} before the run" + (": TIMES ARE NOT TO BE TRUSTED" if load > _busy(device) else ""),
        "instructions": _isa(),
        "huge pages": f"{peers}; fusefeat asks for them itself; kernel: {_kernel_huge_pages()}",
        "backends": "; ".join(
            f"{name}: {', '.join(backend.why_not(probe)) or 'available'}" for name, backend in backends.BACKENDS.items()
        ),
        "automatic": ", ".join(f"{f}: {backends.choose(f, None, probe)}" for f in backends.FAMILIES),
    }
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["device"] = f"{torch.cuda.get_device_name(device)}, sm {capability}, CUDA {torch.version.cuda}"
    return found
