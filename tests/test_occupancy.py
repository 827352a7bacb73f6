"""benchmarks/occupancy.py: by hand, and against the toolkit's own calculator."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_resources  # noqa: E402
from occupancy import ARCHS, RESERVED, occupancy  # noqa: E402

KIB = 1024


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "text"),
    [
        # 32 * 255 registers of a warp are rounded up to 8192: 8 warps of 64.
        (80, 256, 255, 0, 1, "12.5 % (registers)"),
        # 32 * 33 are rounded up to 1280: 12 warps in each quarter of the registers, 48 of 64, 6 blocks of 8.
        (90, 256, 33, 0, 6, "75 % (registers)"),
        (90, 256, 32, 0, 8, "100 %"),
        # 40 + 1 KiB: 4 blocks in 164 KiB, 5 in 228 KiB.
        (80, 256, 32, 40 * KIB, 4, "50 % (shared memory)"),
        (100, 256, 32, 40 * KIB, 5, "62.5 % (shared memory)"),
        # A block of 3 warps: 21 of them are 63 warps.
        (90, 96, 16, 0, 21, "98.4 % (threads)"),
        # 32 blocks of one warp.
        (100, 32, 64, 0, 32, "50 % (registers + blocks)"),
        (80, 32, 16, 0, 32, "50 % (blocks)"),
        # What does not start at all.
        (80, 1024, 65, 0, 0, "0 % (registers)"),
        (80, 128, 32, 164 * KIB, 0, "0 % (shared memory)"),
        (90, 1056, 32, 0, 0, "0 % (threads)"),
    ],
)
def test_by_hand(arch: int, threads: int, registers: int, shared: int, blocks: int, text: str) -> None:
    found = occupancy(arch, threads, registers, shared)
    assert (found.blocks, str(found)) == (blocks, text)


def test_tensor_memory() -> None:
    assert str(occupancy(100, 256, 32, 0, tensor_columns=256)) == "25 % (tensor memory)"


PROGRAM = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int arch, threads, registers, shared, all, most;
  while (scanf("%d %d %d %d %d %d", &arch, &threads, &registers, &shared, &all, &most) == 6) {
    cudaOccDeviceProp chip;
    chip.computeMajor = arch / 10;
    chip.computeMinor = arch % 10;
    chip.maxThreadsPerBlock = 1024;
    chip.maxThreadsPerMultiprocessor = 2048;
    chip.regsPerBlock = chip.regsPerMultiprocessor = 65536;
    chip.warpSize = 32;
    chip.sharedMemPerBlock = 48 << 10;
    chip.sharedMemPerMultiprocessor = all;
    chip.sharedMemPerBlockOptin = most;
    chip.reservedSharedMemPerBlock = RESERVED;
    chip.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const auto status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &chip, &kernel, &state, threads, shared);
    printf("%d\\n", status == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def test_against_the_toolkit(tmp_path: Path) -> None:
    nvcc = cuda_resources.nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not in PATH")
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(PROGRAM)
    subprocess.run([nvcc, f"-DRESERVED={RESERVED}", "-cudart=none", str(source), "-o", str(program)], check=True)
    cases = list(
        product(
            ARCHS,
            (1, 32, 64, 96, 128, 224, 256, 384, 512, 1024),
            (1, 16, 31, 32, 33, 40, 41, 64, 72, 73, 96, 128, 129, 168, 255),
            (0, 1, 100, 4 * KIB, 33 * KIB, 47 * KIB + 1, 48 * KIB, 100 * KIB + 7, 163 * KIB, 200 * KIB, 227 * KIB),
        )
    )
    lines = [" ".join(map(str, (*case, ARCHS[case[0]].shared, ARCHS[case[0]].block_shared))) for case in cases]
    told = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True)
    expected = [int(line) for line in told.stdout.split()]
    assert len(expected) == len(cases) and min(expected) == 0
    wrong = [(case, count) for case, count in zip(cases, expected, strict=True) if occupancy(*case).blocks != count]
    assert not wrong
