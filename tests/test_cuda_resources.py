"""Every CUDA kernel fits into its registers: no spills, no local memory."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_resources  # noqa: E402

REPORT = """ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90'
ptxas info    : Function properties for _Z1fPf
    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 8 bytes cumulative stack size
"""


@pytest.mark.parametrize(("stack", "stores", "clean"), [(0, 0, True), (8, 0, False), (8, 4, False)])
def test_report_is_understood(stack, stores, clean):
    (kernel,) = cuda_resources.kernels(REPORT.format(stack=stack, stores=stores))
    assert (kernel.registers, kernel.shared, kernel.local, kernel.spill_stores) == (40, 2048, stack, stores)
    assert kernel.clean is clean


# The others hold operators only.
LAUNCHERS = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if "LAUNCH(" in path.read_text()]
LAUNCHERS.append(ROOT / "csrc" / "cuda" / "attention_pool.cu")


@pytest.mark.skipif(cuda_resources.nvcc() is None, reason="nvcc is not in PATH")
@pytest.mark.parametrize("source", LAUNCHERS, ids=lambda path: path.stem)
def test_no_spills(source, pytestconfig):
    """One architecture, to be quick; benchmarks/cuda_resources.py takes them all. The table goes to pytest's cache."""
    report = cuda_resources.ptxas_report(source, ["90"])
    found = list(cuda_resources.kernels(report))
    (pytestconfig.cache.mkdir("reports") / f"cuda_{source.stem}.txt").write_text(cuda_resources.table(found) + "\n")
    assert len(found) == report.count("Compiling entry function") > 0
    dirty = [kernel for kernel in found if not kernel.clean]
    assert not dirty, cuda_resources.table(dirty)
