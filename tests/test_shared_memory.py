"""Peak memory of the fused penalty, measured in a child process: bounded whatever N times F is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from fusefeat.ops.shared_penalty import rows_to_keep

# The widest, one whose logits are kept in part, two where kept logits and the tile in scratch are largest together, and
# two with chunks behind a sweep that has a tile of its own, or with logits that are computed twice.
SHAPES = [
    (2048, 256, 65536), (4096, 128, 8192), (2048, 64, 16384), (1024, 768, 32768), (512, 256, 65536), (1024, 256, 65536),
]  # fmt: skip
ALLOCATOR_SLACK = 8 * 2**20

CHILD = """
import ctypes, gc, json, sys, torch, fusefeat

torch.set_num_threads(int(sys.argv[1]))
n, d, f = map(int, sys.argv[2:5])
dtype = getattr(torch, sys.argv[5])

def reset():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def high_water():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024

def resident():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) * 1024

# The first calls bring in code and thread pools.
small = torch.randn(40, d, requires_grad=True), torch.randn(90, d, requires_grad=True)
fusefeat.shared_objective(small[0], None, small[1])[0].backward()
x, w = (torch.randn(size, d, dtype=dtype, requires_grad=True) for size in (n, f))
# From now on the C library keeps blocks of up to 32 MiB that it is given back, as in any program that ran for a while.
torch.empty(31 << 20, dtype=torch.uint8)
reset()
before = resident()
if len(sys.argv) > 6:
    if sys.argv[6] == "clamped_reg":  # whose backward is as the others'
        x, w = x.detach(), w.detach()
    loss = getattr(fusefeat, sys.argv[6])(x, None, w, margin=float(sys.argv[7]))
elif dtype == torch.float32:
    loss = sum(fusefeat.shared_objective(x, None, w, margin=0.1))
else:  # whose logits are kept in bfloat16
    loss = fusefeat.shared_penalty(x, None, w, margin=0.1)
forward = high_water() - before
reset()  # what the forward kept still counts
if loss.requires_grad:
    loss.backward()
# In bfloat16 the sums of a weight are in scratch while its gradient is written.
gradients = sum(t.grad.numel() * 4 for t in (x, w) if t.grad is not None)
print(json.dumps({"forward": forward, "backward": high_water() - before - gradients}))
"""


@pytest.mark.parametrize(
    ("threads", "shape", "dtype"),
    [
        (1, SHAPES[0], "float32"),
        (2, SHAPES[0], "float32"),
        (5, SHAPES[0], "float32"),
        *((2, shape, "float32") for shape in SHAPES[1:]),
        *((2, shape, "bfloat16") for shape in SHAPES),
        (2, SHAPES[3], "bfloat16 shared_penalty 1e5"),  # logits beyond float16, for which there is a second forward
        (2, (1024, 64, 49152), "bfloat16 shared_penalty 1e5"),
        (2, (131072, 4, 32768), "float32 clamped_reg 1.0"),
    ],
    ids=str,
)
def test_peak_extra_memory(threads: int, shape: tuple[int, int, int], dtype: str) -> None:
    rows, _, features = shape
    bound = 64 * 2**20 + 64 * (rows + features)  # scratch, and a few vectors over rows and features
    command = [sys.executable, "-c", CHILD, *map(str, (threads, *shape)), *dtype.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    extra = json.loads(result.stdout.splitlines()[-1])
    assert rows * features * 4 > 1.5 * (bound + ALLOCATOR_SLACK)  # the logits would be seen
    for phase, size in extra.items():
        assert size <= bound + ALLOCATOR_SLACK, f"{phase}: {size / 2**20:.1f} MiB"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 128, 8192, 30000, 65536, 10**6])
@pytest.mark.parametrize("rows", [0, 1, 100, 256, 5000, 10**7])
def test_kept_logits_leave_room_for_the_tile(rows: int, features: int, dtype: torch.dtype) -> None:
    row_bytes = features * (8 if dtype == torch.float64 else 4)
    for channels in (10, 256):
        keep = rows_to_keep(rows, features, channels, dtype)
        assert 0 <= keep <= rows
        assert keep == rows or keep % 32 == 0  # whole strips on every instruction set
        assert keep == 0 or keep * row_bytes + min(rows, 256) * row_bytes <= 48 * 2**20
    for channels in (256, 1500):
        keep = rows_to_keep(rows, features, channels, dtype, kept=torch.float16)
        in_scratch = min(rows, 64) * features * 2 if channels == 256 else min(rows, 256) * row_bytes
        assert keep == 0 or keep * features * 2 + in_scratch <= 48 * 2**20
    assert rows_to_keep(8192, 1024, 128, torch.float32) == 7936
    assert rows_to_keep(4096, 8192, 256, torch.float32) == 992
    assert rows_to_keep(8192, 1024, 16, torch.float32) == 0
    assert rows_to_keep(1024, 32768, 768, torch.bfloat16, kept=torch.float16) == 480
