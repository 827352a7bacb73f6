"""All CUDA operators as a library for CPU tensors, and what its tests have in common."""

from __future__ import annotations

import ctypes
import fcntl
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .build import ROOT, build, compiler

SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "schema.cpp"]


def build_kernels(config: pytest.Config, name: str = "kernels", extra: list[str] | None = None) -> Path:
    """Built once for all test processes."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    folder = config.cache.mkdir("cuda_on_cpu")
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder, name, SOURCES, extra)


@functools.cache
def load_kernels(config: pytest.Config) -> ctypes.CDLL:
    """Loaded once: the operators cannot be registered a second time. Outputs and scratch start as NaN."""
    path = build_kernels(config)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FUSEFEAT_POISON", "1")  # read by the library when it is loaded
        torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="session", name="library")
def kernel_library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return load_kernels(request.config)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Outputs and scratch start as NaN, which shows what is left unwritten."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def bits(tensor: Tensor) -> Tensor:
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(views[tensor.element_size()])


def in_both_orders(library: ctypes.CDLL, call: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The operator's results; threads taken in the other order must not change a bit of them."""
    first = call()
    library.cuda_on_cpu_set_reverse(1)
    try:
        second = call()
    finally:
        library.cuda_on_cpu_set_reverse(0)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(bits(a), bits(b))
    return first
