"""Every CUDA kernel fits into its registers, without spills or local memory, and is launched within its limits."""

import sys
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.kernels import kernel_library  # noqa: F401 (fixture)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_launches  # noqa: E402
import cuda_resources  # noqa: E402
from cuda_launches import Launch  # noqa: E402

REPORT = """ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90'
ptxas info    : Function properties for _Z1fPf
    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 8 bytes cumulative stack size
"""


@pytest.mark.parametrize(("stack", "stores", "clean"), [(0, 0, True), (8, 0, False), (8, 4, False)])
def test_report_is_understood(stack, stores, clean):
    (kernel,) = cuda_resources.kernels(REPORT.format(stack=stack, stores=stores), {"_Z1fPf": 256}, {})
    assert (kernel.registers, kernel.shared, kernel.local, kernel.spill_stores) == (40, 2048, stack, stores)
    assert kernel.clean is clean


@pytest.mark.parametrize(
    ("launches", "clean", "columns"),
    [
        ([], True, "- | - | -"),
        ([Launch(256, 0)], True, "256 | 0 | 75 % (registers)"),
        # 2 + 29 + 1 KiB: 7 blocks of 4 warps.
        (
            [Launch(256, 0), Launch(128, 29 << 10)],
            True,
            f"128 | {29 << 10} | 43.8 % (shared memory) to 75 % (registers)",
        ),
        ([Launch(512, 0)], False, "512 | 0 | 75 % (registers)"),
        ([Launch(256, 47 << 10)], False, f"256 | {47 << 10} | 50 % (shared memory)"),
    ],
)
def test_launches_are_held_to_limits(launches, clean, columns):
    report = REPORT.format(stack=0, stores=0)
    (kernel,) = cuda_resources.kernels(report, {"_Z1fPf": 256}, {"_Z1fPf": dict.fromkeys(launches, 1)})
    assert kernel.clean is clean
    assert cuda_resources.table([kernel]).splitlines()[-1] == f"| f | 90 | 40 | 0 / 0 | 0 | 2048 | {columns} |"


def launches_of(library, name, call):
    found = cuda_launches.recorded(library, call)
    names = cuda_resources.readable(list(found))
    return {
        launch for symbol, readable in zip(found, names, strict=True) if name in readable for launch in found[symbol]
    }


@pytest.mark.parametrize(
    ("channels", "launch"),
    [
        # 8 warps: 16-byte slots of 2 bags each, of a maximum and a sum, their sums of 512 channels, and the query.
        (512, Launch(256, 8 * (16 + 16 + 2 * 512 * 4) + 512 * 4)),
        # One team of 512 threads with 16 channels each: what its 16 warps exchange of 4 tokens, twice; the query.
        (8192, Launch(512, 2 * 16 * 4 * 4 + 8192 * 4)),
    ],
)
def test_launches_are_written_down(library, channels, launch):
    def call(ops):
        ops.attention_pool(tokens, tokens[0, 0], None, None, 1.0, False)

    tokens = torch.ones(1, 20, channels, dtype=torch.bfloat16)
    assert launches_of(library, "pool_forward", call) == {launch}


# The others hold operators only.
LAUNCHERS = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if "LAUNCH(" in path.read_text()]
LAUNCHERS.append(ROOT / "csrc" / "cuda" / "attention_pool.cu")


@pytest.fixture(scope="module")
def launches(library):
    return cuda_launches.all_launches(library)


@pytest.mark.skipif(cuda_resources.nvcc() is None, reason="nvcc is not in PATH")
@pytest.mark.parametrize("source", LAUNCHERS, ids=lambda path: path.stem)
def test_no_spills(source, launches, pytestconfig):
    """One architecture, to be quick; benchmarks/cuda_resources.py takes them all. The table goes to pytest's cache."""
    report, bounds = cuda_resources.compiled(source, ["90"])
    found = list(cuda_resources.kernels(report, bounds, launches))
    (pytestconfig.cache.mkdir("reports") / f"cuda_{source.stem}.txt").write_text(cuda_resources.table(found) + "\n")
    assert len(found) == report.count("Compiling entry function") > 0
    dirty = [kernel for kernel in found if not kernel.clean]
    assert not dirty, cuda_resources.table(dirty)
    # Products whose depth is the channels are not split.
    idle = {kernel.name for kernel in found if not kernel.launches}
    assert all(name.startswith("add_parts<") and "LogitsOutput" in name for name in idle), idle
