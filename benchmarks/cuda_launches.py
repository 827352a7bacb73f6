"""Threads per block and dynamic shared memory of every CUDA launch, from the launchers themselves.

They are compiled with the host compiler (tests/cuda_on_cpu), which writes launches down instead of running them.
"""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from cuda_on_cpu.build import NAMESPACE, build  # noqa: E402
from cuda_on_cpu.memory_check import run as run_pools  # noqa: E402
from cuda_on_cpu.memory_check import run_shared  # noqa: E402

SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "schema.cpp"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHANNELS = tuple(2**i for i in range(4, 14))


class Launch(NamedTuple):
    threads: int  # per block
    shared: int  # dynamic, in bytes


Launches = dict[str, dict[Launch, int]]  # by mangled name, with how often


def load() -> ctypes.CDLL:
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    path = build(folder, "kernels", SOURCES)
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def recorded(library: ctypes.CDLL, call: Callable[[Any], object]) -> Launches:
    """What a call launches, which is given the operators; their results are whatever was in memory."""
    library.cuda_on_cpu_launches.restype = ctypes.c_char_p
    library.cuda_on_cpu_set_recording(1)
    try:
        call(getattr(torch.ops, NAMESPACE))
        text = library.cuda_on_cpu_launches().decode()
    finally:
        library.cuda_on_cpu_set_recording(0)
    found: Launches = defaultdict(dict)
    for line in text.splitlines():
        symbol, *numbers = line.split()
        threads, shared, count = map(int, numbers)
        # The same name as in the library for GPUs.
        found[symbol.replace(f"{len(NAMESPACE)}{NAMESPACE}", "8fusefeat")][Launch(threads, shared)] = count
    return dict(found)


def _tokens() -> Iterator[torch.Tensor]:
    """Teams of all sizes, whose rows are whole packs or not."""
    for dtype in DTYPES:
        for channels in CHANNELS:
            tokens = torch.zeros(1, 2, 2 * channels, dtype=dtype)
            yield tokens[..., :channels]
            yield tokens[..., ::2]
        yield torch.zeros(1, 9000, 16, dtype=dtype)  # several blocks


def run_all(ops: Any) -> None:
    """Every operator in every dtype; the launches of the pools depend on the channels as well."""
    for tokens in _tokens():
        for queries in (None, 3):
            run_pools(ops, tokens, queries)
            run_pools(ops, tokens[0], queries, torch.tensor([0, tokens.shape[1]]))
    shared = [(dtype, 0) for dtype in DTYPES] + [(torch.float32, 1), (torch.float32, 2)]
    for (dtype, operand), channels in product(shared, (16, 7)):
        # As many rows and features as it takes to split the products that sum over them.
        rows, weight = torch.zeros(600, channels, dtype=dtype), torch.zeros(600, channels, dtype=dtype)
        run_shared(ops, rows, weight, 10, operand)
        run_shared(ops, rows, weight[:40], 10, operand)
        ops.clamped_activation(None, rows, weight, torch.zeros(1200, dtype=dtype)[::2], 1.0, operand)


def all_launches(library: ctypes.CDLL) -> Launches:
    return recorded(library, run_all)
