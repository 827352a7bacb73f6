"""All CUDA operators as a library for CPU tensors, and what its tests have in common."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fusefeat import backends
from fusefeat.ops import attention_pool, clamped_reg, shared_penalty
from torch import Tensor

from .build import NAMESPACE, ROOT, build, compiler

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


class _Overloads:
    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(torch.ops, NAMESPACE), name).default


@functools.cache
def _operators(config: pytest.Config) -> list[tuple[Any, dict[str, Any]]]:
    """Each family's module, and its differentiable operators on these kernels, in both orders."""
    library, overloads = load_kernels(config), _Overloads()

    def checked(operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return in_both_orders(library, lambda: _results(operator(*args)))

        return call

    def wrapped(operators: dict[str, Any]) -> dict[str, Any]:
        return {
            name: dataclasses.replace(one, forward=checked(one.forward), backward=checked(one.backward))
            for name, one in operators.items()
        }

    return [
        (attention_pool, wrapped(attention_pool._pools(overloads))),
        (shared_penalty, wrapped(shared_penalty._operators(overloads))),
        (clamped_reg, wrapped(clamped_reg._operators(overloads))),
    ]


def _results(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results


@pytest.fixture
def cuda_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend="cuda"`` of the public functions is these kernels, on CPU tensors."""
    for module, operators in _operators(request.config):
        monkeypatch.setitem(module._LOADED, "cuda", operators)
    monkeypatch.setitem(backends.BACKENDS, "cuda", backends.Backend("cuda", ("cpu",), lambda: None))
