"""Compiles CUDA sources with a host compiler against cuda_on_cpu.h."""

from __future__ import annotations

import hashlib
import os
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
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DFUSEFEAT_CHUNK_BYTES=131072",
    f"-Dfusefeat={NAMESPACE}",  # operators of a namespace of their own, for CPU tensors
    f"-isystem{TORCH / 'include'}",
    f"-I{HERE}",
    f"-I{ROOT / 'csrc' / 'cuda'}",
]

# Finds accesses outside of tensors and of what a thread has on its stack.
SANITIZE = ["-fsanitize=address"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _digest(command: list[str], sources: list[Path]) -> str:
    folders = {HERE, ROOT / "csrc", ROOT / "csrc" / "cuda", ROOT / "csrc" / "common"}
    files = {path for folder in folders for path in folder.glob("*.*") if path.suffix != ".py"} | set(sources)
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(folder: Path, name: str, sources: list[Path], extra: list[str] | None = None) -> Path:
    """The shared library of ``sources`` and the scheduler, from ``folder`` when nothing has changed."""
    extra = [*(extra or []), *os.environ.get("CUDA_ON_CPU_FLAGS", "").split()]
    flags = [*FLAGS, *extra]
    cxx = compiler()
    assert cxx is not None
    sources = [*sources, HERE / "scheduler.cpp"]
    library = folder / f"{name}-{_digest([cxx, *flags], sources)}.so"
    if library.exists():
        return library
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def compile_one(source: Path) -> Path:
        """Kept by what the preprocessor makes of it: a change that it does not see compiles nothing anew."""
        command = [cxx, *flags, "-x", "c++", "-E", str(source)]
        text = subprocess.run(command, check=True, env=environment, capture_output=True).stdout
        found = folder / f"{source.stem}-{hashlib.sha256(text + ' '.join([cxx, *flags]).encode()).hexdigest()[:16]}.o"
        if not found.exists():
            partial = found.with_suffix(f".{os.getpid()}")
            command = [cxx, *flags, "-x", "c++-cpp-output", "-c", "-", "-o", str(partial)]
            subprocess.run(command, check=True, env=environment, input=text)
            partial.rename(found)
        return found

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    torch_library = TORCH / "lib"
    link = [*map(str, objects), f"-L{torch_library}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_library}"]
    partial = library.with_suffix(f".{os.getpid()}")
    subprocess.run([cxx, "-shared", *extra, *link, "-o", str(partial)], check=True, env=environment)
    partial.rename(library)
    return library
