"""How much of the tokens a multiprocessor has asked for at a time when the pools run, from the reports of resources.

A warp asks for the tokens of one step together and then works on them, so that is the resident warps times a step's
bytes. It is held against what the memory needs: bandwidth times LATENCY.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

from .tables import RESULTS

LATENCY = 0.6e-6  # seconds that a load takes while many others are under way: an assumption
WARP, WARPS = 32, 64
SIZES = {"BFloat16": 2, "Half": 2, "float": 4}
_CUDA = re.compile(
    r"^\| pool_(?P<way>\w+)<PoolTraits<(?P<type>\w+), (?P<access>\w+)>, \w+> \| (?P<arch>\d+) \|"
    r".*\| (?P<percent>[\d.]+) %[^|]*\|$",
    re.MULTILINE,
)
_TRITON = re.compile(
    r"^pool_(?:forward|backward) +sm_(?P<arch>\d+) .* tmem +(?P<percent>[\d.]+) %.*  (?P<types>[a-z]+\d+(?: fp32)?) "
    r".*BLOCK_T=(?P<tokens>\d+) BLOCK_K=(?P<queries>\d+) BLOCK_D=(?P<channels>\d+) warps=(?P<warps>\d+)",
    re.MULTILINE,
)
Group = tuple[str, int]  # what kind of kernel, and the bytes of an element


def thread_bytes(size: int, access: str, backward: bool) -> int:
    """Tokens times channels of a thread's step, as PoolTraits (csrc/cuda/attention_pool_plan.cuh) has them."""
    rows = 4 if access == "one" and size == 2 else 2
    if backward:
        rows = 2 if access == "many" or rows == 4 else 1
    return rows * (16 if access == "one" else 8) * size


def _warps(found: re.Match[str]) -> int:
    return round(float(found["percent"]) / 100 * WARPS)


def found_loads() -> Iterator[tuple[Group, int, float]]:
    """Group, architecture, bytes."""
    kinds = {"one": "CUDA, one query", "many": "CUDA, several queries", "any": "CUDA, rows not of 16-byte vectors"}
    for found in _CUDA.finditer((RESULTS / "cuda_resources.md").read_text()):
        if found["type"] in SIZES:
            size = SIZES[found["type"]]
            step = WARP * thread_bytes(size, found["access"], found["way"] == "backward")
            yield (kinds[found["access"]], size), int(found["arch"]), _warps(found) * step
    for found in _TRITON.finditer((RESULTS / "triton_resources.txt").read_text()):
        if not found["types"].startswith("fp64"):
            size = 2 if found["types"].startswith(("bf16", "fp16")) else 4
            kind = f"Triton, {'one query' if found['queries'] == '1' else 'several queries'}"
            step = int(found["tokens"]) * int(found["channels"]) * size
            yield (kind, size), int(found["arch"]), _warps(found) // int(found["warps"]) * step


def rows() -> list[list[str]]:
    """Median and least per group and architecture, in KiB."""
    groups: dict[Group, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for group, arch, count in found_loads():
        groups[group][arch].append(count / 1024)
    return [
        [f"{kind}, {8 * size} bits", *(f"{median(of[arch]):.0f} ({min(of[arch]):.0f})" for arch in sorted(of))]
        for (kind, size), of in sorted(groups.items())
    ]
