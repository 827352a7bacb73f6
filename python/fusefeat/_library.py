"""Loads the compiled libraries once and keeps what it learnt. Never raises: what cannot be loaded leaves a reason."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fusefeat._version import __version__

_PACKAGE = Path(__file__).parent
_FACTS = frozenset(("version", "torch", "torch_target", "python", "compiler", "cuda", "cuda_archs", "not_built"))
_NO_CPU = "the CPU library, which defines the operators, is not loaded"
_REBUILD = "rebuild it with `pip install .` (or `pip install -e . --no-build-isolation` in a source tree)"


@dataclass(frozen=True)
class Library:
    """What is loaded. `reasons` says for each of "cpu", "cuda" and "bindings" that is missing why it is,
    and under "isa" when FUSEFEAT_ISA asks for what this machine cannot do."""

    cpu_loaded: bool = False
    cuda_loaded: bool = False
    bindings: ModuleType | None = None
    build_info: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def cpu_reason(self) -> str | None:
        return self.reasons.get("cpu")

    @property
    def cuda_reason(self) -> str | None:
        return self.reasons.get("cuda")


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _read_build_info() -> tuple[dict[str, Any], str]:
    """The build facts, and why the binaries of that build must not be loaded ("" when they may)."""
    path = _PACKAGE / "build_info.json"
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        return {}, f"this copy of fusefeat has not been compiled (no {path.name} in {_PACKAGE}): {_REBUILD}"
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read ({error}): {_REBUILD}"
    if not isinstance(info, dict) or not info.keys() >= _FACTS:
        return {}, f"{path} does not hold the build facts of this version: {_REBUILD}"
    built, target = info["version"], info["torch_target"]
    if built != __version__:
        return info, f"the binaries were compiled for fusefeat {built}, the Python code is {__version__}: {_REBUILD}"
    if _release(torch.__version__) < _release(target):
        return info, f"the binaries need torch >= {target}, this is torch {torch.__version__}"
    return info, ""


def _load_library(name: str) -> str:
    path = _PACKAGE / f"libfusefeat_{name}.so"
    if not path.exists():
        return f"{path.name} is missing from {_PACKAGE}: {_REBUILD}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return f"{path.name} cannot be loaded: {error}{cause}"
    return ""


def _load_cuda(info: dict[str, Any]) -> str:
    if info["not_built"]["cuda"]:
        return f"not built: {info['not_built']['cuda']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is without CUDA"
    if torch.version.cuda.split(".")[0] != info["cuda"].split(".")[0]:
        return (
            f"the library was built with CUDA {info['cuda']}, torch {torch.__version__} uses CUDA {torch.version.cuda}"
        )
    return _load_library("cuda")


def _load_bindings(info: dict[str, Any]) -> tuple[ModuleType | None, str]:
    if info["not_built"]["bindings"]:
        return None, f"not built: {info['not_built']['bindings']}"
    try:
        module = importlib.import_module("fusefeat._C")
    except ImportError as error:
        return None, f"{error} (the binaries were built for Python {info['python']})"
    if json.loads(module.build_info()) != info:
        return None, f"the module fusefeat._C is from another build than build_info.json: {_REBUILD}"
    return module, ""


def load() -> Library:
    info, problem = _read_build_info()
    if problem:
        return Library(build_info=info, reasons={"cpu": problem, "cuda": _NO_CPU, "bindings": problem})
    reasons = {"cpu": _load_library("cpu")}
    reasons["cuda"] = _NO_CPU if reasons["cpu"] else _load_cuda(info)
    bindings, reasons["bindings"] = _load_bindings(info)
    wish = os.environ.get("FUSEFEAT_ISA")
    if wish and bindings is not None and not reasons["cpu"] and wish != bindings.isa_current():
        reasons["isa"] = f"FUSEFEAT_ISA={wish} cannot be had on this machine; {bindings.isa_current()} is used"
    return Library(
        cpu_loaded=not reasons["cpu"],
        cuda_loaded=not reasons["cuda"],
        bindings=bindings,
        build_info=info,
        reasons={part: reason for part, reason in reasons.items() if reason},
    )


def _bindings() -> ModuleType:
    if STATE.bindings is None or not STATE.cpu_loaded:
        raise RuntimeError(f"fusefeat: {STATE.cpu_reason or STATE.reasons['bindings']}")
    return STATE.bindings


def isa() -> dict[str, str]:
    """The instruction set that the CPU kernels use now, and the best that this machine has."""
    bindings = _bindings()
    return {"current": bindings.isa_current(), "best": bindings.isa_best()}


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """For tests: run the CPU kernels on another instruction set, in the whole process."""
    bindings = _bindings()
    before = bindings.isa_current()
    bindings.isa_set(name)
    try:
        yield
    finally:
        bindings.isa_set(before)


STATE = load()
