"""Registers, spills, local and shared memory of every CUDA kernel, as ptxas assigns them.

python benchmarks/cuda_resources.py [--arch 80 90 100] [SOURCE.cu ...]

Prints a table and fails when a kernel spills registers or uses local memory.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for 'sm_(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    arch: str
    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    local: int
    shared: int  # static: dynamic shared memory is chosen at launch

    @property
    def clean(self) -> bool:
        return self.spill_stores == self.spill_loads == self.local == 0


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def ptxas_report(source: Path, archs: list[str]) -> str:
    import torch

    compiler = nvcc()
    if compiler is None:
        raise SystemExit("nvcc is not in PATH; set CUDACXX")
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas", "-v"]
    flags += ["-isystem", str(Path(torch.__file__).resolve().parent / "include")]
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *flags, "-c", str(source), "-o", str(Path(folder) / "kernels.o")]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{source.name} does not compile:\n{result.stderr}")
    return result.stderr


def kernels(report: str) -> Iterator[Kernel]:
    matches = list(ENTRY.finditer(report))
    names = [match["symbol"] for match in matches]
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout
        names = [re.sub(r"fusefeat::cuda::|^void |\(anonymous namespace\)::|c10::", "", n) for n in text.splitlines()]
        names = [re.sub(r"\((?!Access\)).*$", "", name) for name in names]
        for index, access in enumerate(("one", "many", "any")):
            names = [name.replace(f"(Access){index}", access) for name in names]
    for match, name in zip(matches, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        yield Kernel(
            match["arch"],
            name,
            int(match["registers"]),
            int(match["stores"]),
            int(match["loads"]),
            int(match["stack"]),
            int(shared[1]) if shared else 0,
        )


def table(found: list[Kernel]) -> str:
    lines = ["| kernel | sm | registers | spill stores / loads | local | static shared |", "|---|---|---|---|---|---|"]
    for kernel in sorted(found, key=lambda kernel: (kernel.name, int(re.sub(r"\D", "", kernel.arch)))):
        spills = f"{kernel.spill_stores} / {kernel.spill_loads}"
        columns = (kernel.name, kernel.arch, kernel.registers, spills, kernel.local, kernel.shared)
        lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"])
    parser.add_argument("sources", nargs="*", type=Path, default=sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    arguments = parser.parse_args()
    found = [kernel for source in arguments.sources for kernel in kernels(ptxas_report(source, arguments.arch))]
    print(table(found))
    dirty = [kernel for kernel in found if not kernel.clean]
    print(f"{len(found)} kernels, {len(dirty)} with spills or local memory")
    return 1 if dirty or not found else 0


if __name__ == "__main__":
    sys.exit(main())
