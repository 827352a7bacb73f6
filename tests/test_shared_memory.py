"""Peak memory of the fused penalty, measured in a child process: bounded whatever N times F is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

N, D, F = 2048, 256, 65536
BOUND = 64 * 2**20 + 64 * (N + F)  # scratch, and a few vectors over rows and features
ALLOCATOR_SLACK = 8 * 2**20

CHILD = """
import gc, json, sys, torch, fusefeat

torch.set_num_threads(int(sys.argv[1]))
n, d, f = map(int, sys.argv[2:5])

def reset():
    gc.collect()
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
x, w = torch.randn(n, d, requires_grad=True), torch.randn(f, d, requires_grad=True)
reset()
before = resident()
penalty, reg = fusefeat.shared_objective(x, None, w, margin=0.1)
forward = high_water() - before
reset()
before = resident()
(penalty + reg).backward()
gradients = sum(t.grad.numel() * 4 for t in (x, w))
print(json.dumps({"forward": forward, "backward": high_water() - before - gradients}))
"""


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_peak_extra_memory(threads: int) -> None:
    command = [sys.executable, "-c", CHILD, *map(str, (threads, N, D, F))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    extra = json.loads(result.stdout.splitlines()[-1])
    assert N * F * 4 > 4 * BOUND  # the logits would be seen
    for phase, size in extra.items():
        assert size <= BOUND + ALLOCATOR_SLACK, f"{phase}: {size / 2**20:.1f} MiB"
