"""Registers, spills, local and shared memory of every CUDA kernel, as ptxas assigns them, and its occupancy.

python benchmarks/cuda_resources.py [--arch 80 90 100] [SOURCE.cu ...]

Prints a table and fails when a kernel spills registers, uses local memory or cannot be launched.
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

from cuda_launches import Launch, Launches, all_launches, load
from occupancy import DEFAULT_SHARED, Occupancy, occupancy

ROOT = Path(__file__).resolve().parent.parent
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for 'sm_(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
PTX_ENTRY = re.compile(r"\.entry\s+(\w+)\([^)]*\)\s*\.maxntid\s+(\d+)")
HEADER = """Registers, spills, local and static shared memory are what ptxas reports; threads per block and dynamic
shared memory are what the launchers ask for (benchmarks/cuda_launches.py). Occupancy is theoretical: the warps that fit
on a multiprocessor, in percent of its 64, and what keeps more from fitting. Blocks of pool_forward and pool_backward
depend on the number of channels: the row shows the launch of lowest occupancy for 16 to 8192 channels, and behind "to"
the highest. "-": compiled, but launched by no operator.
"""


@dataclass(frozen=True)
class Kernel:
    arch: str
    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    local: int
    shared: int  # static
    bound: int = 1024  # threads per block at most
    launches: tuple[Launch, ...] = ()

    @property
    def capability(self) -> int:
        return int(re.sub(r"\D", "", self.arch))

    def occupancy(self, launch: Launch) -> Occupancy:
        return occupancy(self.capability, launch.threads, self.registers, self.shared + launch.shared)

    @property
    def by_occupancy(self) -> list[Launch]:
        """The largest of the lowest first."""
        return sorted(
            self.launches, key=lambda launch: (self.occupancy(launch).percent, -launch.threads, -launch.shared)
        )

    @property
    def starts(self) -> bool:
        """Whether every launch is within the kernel's bound, the registers, and the shared memory that all may have."""
        return all(
            launch.threads <= self.bound
            and self.shared + launch.shared <= DEFAULT_SHARED
            and self.occupancy(launch).blocks > 0
            for launch in self.launches
        )

    @property
    def clean(self) -> bool:
        return self.spill_stores == self.spill_loads == self.local == 0 and self.starts


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX", "nvcc"))


def compiled(source: Path, archs: list[str]) -> tuple[str, dict[str, int]]:
    """What ptxas reports, and each kernel's bound on the threads of a block."""
    import torch

    compiler = nvcc()
    if compiler is None:
        raise SystemExit("nvcc is not in PATH; set CUDACXX")
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas", "-v"]
    flags += ["-isystem", str(Path(torch.__file__).resolve().parent / "include")]
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *flags, "--keep", "--keep-dir", folder, "-c", str(source), "-o", f"{folder}/kernels.o"]
        result = subprocess.run(command, capture_output=True, text=True)
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    if result.returncode != 0:
        raise SystemExit(f"{source.name} does not compile:\n{result.stderr}")
    return result.stderr, {symbol: int(threads) for symbol, threads in PTX_ENTRY.findall(ptx)}


def readable(symbols: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return symbols
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True).stdout
    names = [re.sub(r"fusefeat::cuda::|^void |\(anonymous namespace\)::|c10::", "", name) for name in text.splitlines()]
    names = [re.sub(r"\((?!Access\)).*$", "", name) for name in names]
    for index, access in enumerate(("one", "many", "any")):
        names = [name.replace(f"(Access){index}", access) for name in names]
    return names


def kernels(report: str, bounds: dict[str, int], launches: Launches) -> Iterator[Kernel]:
    matches = list(ENTRY.finditer(report))
    names = readable([match["symbol"] for match in matches])
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
            bounds[match["symbol"]],
            tuple(launches.get(match["symbol"], ())),
        )


def _launch_columns(kernel: Kernel) -> tuple[object, ...]:
    if not kernel.launches:
        return "-", "-", "-"
    order = kernel.by_occupancy
    lowest, highest = kernel.occupancy(order[0]), kernel.occupancy(order[-1])
    text = str(lowest) if lowest.percent == highest.percent else f"{lowest} to {highest}"
    return order[0].threads, order[0].shared, text


def table(found: list[Kernel]) -> str:
    titles = ("kernel", "sm", "registers", "spill stores / loads", "local", "static shared")
    lines = ["| " + " | ".join((*titles, "threads", "dynamic shared", "occupancy")) + " |", "|---" * 9 + "|"]
    for kernel in sorted(found, key=lambda kernel: (kernel.name, kernel.capability)):
        spills = f"{kernel.spill_stores} / {kernel.spill_loads}"
        columns = (kernel.name, kernel.arch, kernel.registers, spills, kernel.local, kernel.shared)
        lines.append("| " + " | ".join(map(str, (*columns, *_launch_columns(kernel)))) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"])
    parser.add_argument("sources", nargs="*", type=Path, default=sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    arguments = parser.parse_args()
    launches = all_launches(load())
    found = [k for source in arguments.sources for k in kernels(*compiled(source, arguments.arch), launches)]
    print(HEADER)
    print(table(found))
    dirty = [kernel for kernel in found if not kernel.clean]
    print(f"\n{len(found)} kernels, {len(dirty)} with spills, with local memory or beyond what can be launched")
    return 1 if dirty or not found else 0


if __name__ == "__main__":
    sys.exit(main())
