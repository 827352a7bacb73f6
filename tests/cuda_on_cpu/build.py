"""Compiles CUDA sources with a host compiler against cuda_on_cpu.h."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMESPACE = "fusefeat_cuda_on_cpu"

TORCH = Path(torch.__file__).resolve().parent
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to switch stacks
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DFUSEFEAT_CHUNK_BYTES=131072",
    f"-Dfusefeat={NAMESPACE}",  # operators of a namespace of their own, for CPU tensors
    f"-isystem{TORCH / 'include'}",
    f"-I{HERE}",
    f"-I{ROOT / 'csrc' / 'cuda'}",
]

KEPT = 4  # of each object and library: with and without a sanitizer, with and without a planted fault

# Finds accesses outside of tensors and of what a thread has on its stack.
SANITIZE = ["-fsanitize=address"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _with_headers(source: Path) -> list[Path]:
    """A source and those of our headers that it includes, directly or not."""
    found: set[Path] = set()
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'#include ["<](.+)[">]', path.read_text()):
            candidates = [(folder / name).resolve() for folder in (path.parent, HERE, ROOT / "csrc" / "cuda")]
            waiting += [candidate for candidate in candidates if candidate.exists()]
    return sorted(found)


def _digest(command: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _keep(folder: Path, pattern: str, used: Path) -> None:
    """The newest few of what was built of one thing, among them this one."""
    used.touch()
    for old in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        old.unlink(missing_ok=True)


def build(folder: Path, name: str, sources: list[Path], extra: list[str] | None = None) -> Path:
    """The shared library of ``sources`` and of what runs them; what has not changed comes from ``folder``."""
    extra = [*(extra or []), *os.environ.get("CUDA_ON_CPU_FLAGS", "").split()]
    cxx = compiler()
    assert cxx is not None
    command = [cxx, *FLAGS, *extra]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def call(arguments: list[str], target: Path) -> None:
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*arguments, "-o", str(partial)], check=True, env=environment)
        partial.rename(target)

    sources = [*sources, HERE / "scheduler.cpp", HERE / "launches.cpp"]
    objects = [folder / f"{name}-{path.stem}-{_digest(command, _with_headers(path))}.o" for path in sources]

    def compile_one(source: Path, target: Path) -> None:
        if not target.exists():
            call([*command, "-x", "c++", "-c", str(source)], target)
        _keep(folder, f"{name}-{source.stem}-????????????????.o", target)

    library = folder / f"{name}-{_digest([path.name for path in objects], [])}.so"
    if not library.exists():
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources, objects))
        torch_library = TORCH / "lib"
        link = [f"-L{torch_library}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_library}"]
        call([cxx, "-shared", *extra, *map(str, objects), *link], library)
    _keep(folder, f"{name}-????????????????.so", library)
    return library
