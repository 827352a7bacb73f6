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
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to switch stacks
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DFUSEFEAT_CHUNK_BYTES=131072",
    f"-Dfusefeat={NAMESPACE}",  # operators of a namespace of their own, for CPU tensors
    f"-isystem{TORCH / 'include'}",
    f"-I{HERE}",
    f"-I{ROOT / 'csrc' / 'cuda'}",
]

# Finds accesses outside of tensors; stacks are left out because it does not know fibers.
SANITIZE = ["-fsanitize=address", "--param=asan-stack=0"]


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
    objects = [folder / f"{library.stem}-{path.stem}.o" for path in sources]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def compile_one(source: Path, target: Path) -> None:
        subprocess.run([cxx, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True, env=environment)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    torch_library = TORCH / "lib"
    link = [*map(str, objects), f"-L{torch_library}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_library}"]
    partial = library.with_suffix(f".{os.getpid()}")
    subprocess.run([cxx, "-shared", *extra, *link, "-o", str(partial)], check=True, env=environment)
    partial.rename(library)
    for path in objects:
        path.unlink()
    return library
