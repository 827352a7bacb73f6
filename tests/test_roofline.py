"""benchmarks/roofline.py: its kernels are those that are launched, and docs/performance.md has its tables."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu.build import FLAGS, compiler
from cuda_on_cpu.kernels import kernel_library  # noqa: F401 (fixture)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import cuda_launches  # noqa: E402
import cuda_resources  # noqa: E402

from benchmarks import loads, roofline  # noqa: E402
from benchmarks.shared_logits import SHAPES  # noqa: E402

# Of these, the kernels that only combine partial results are no part of the estimate.
COMBINING = {"combine_statistics", "combine_terms", "add_parts", "shared_combine_rows", "shared_sum"}


def test_page_is_up_to_date() -> None:
    page = roofline.PAGE.read_text()
    assert roofline.updated(page) == page
    assert all(f"<!-- roofline {name} -->" in page for name in roofline.TABLES)


def test_by_hand() -> None:
    a100, _, b200 = roofline.CHIPS
    widest = SHAPES["widest"][1:]
    # 3 products of 2 * 1024 * 256 * 65536 operations at 60 % of 312 TFLOP/s: memory and exponentials take less.
    assert roofline.seconds(roofline.BARE, widest, a100, False) == pytest.approx(3 * 34.36e9 / 187.2e12, rel=1e-3)
    # dz of 67.1 million logits in float32, read; the rows; 8 chunks' running sum of 16.8 million weights.
    weight = roofline.CUDA.backward[-1]
    assert roofline.traffic(weight, widest, 8, False) == 4 * 2**26 + 2 * 2**18 + 8 * 8 * 2**24
    # 16 exponentials a clock on 148 multiprocessors, where a clock has 148 * 8192 operations of 2250 TFLOP/s.
    assert b200.exponentials == pytest.approx(4.3945e12, rel=1e-4)


def test_bytes_under_way_follow_the_traits() -> None:
    cxx = compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    lines = ["#include <torch/headeronly/util/BFloat16.h>", "#include <attention_pool_plan.cuh>"]
    lines += ["using namespace fusefeat::cuda;"]
    for token, size in (("torch::headeronly::BFloat16", 2), ("float", 4)):
        for access in ("one", "many", "any"):
            traits = f"PoolTraits<{token}, Access::k{access.capitalize()}>"
            for rows, backward in (("kRows", False), ("kBackwardRows", True)):
                count = loads.thread_bytes(size, access, backward)
                lines.append(f"static_assert({traits}::{rows} * {traits}::kChannels * {size} == {count});")
    command = [cxx, *FLAGS, "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_reports_are_read_whole() -> None:
    """All pools but those of float64; the numbers by hand."""
    found = list(loads.found_loads())
    cuda, triton = ((loads.RESULTS / name).read_text() for name in ("cuda_resources.md", "triton_resources.txt"))
    rows = re.findall(r"(?m)^\| pool_(?:for|back)ward<PoolTraits<(?!double).*", cuda)
    rows += re.findall(r"(?m)^pool_(?:for|back)ward(?!.* fp64 ).*", triton)
    assert len(found) == len(rows) > 400
    # 8 resident warps of 32 threads with 2 tokens of 8 channels each.
    assert (("CUDA, several queries", 2), 90, 8 * 32 * 2 * 8 * 2) in found


def operators(call: Any, backward: Any, rows: int, channels: int, features: int) -> None:
    """As the penalty calls them on rows without weights."""
    x = torch.zeros(rows, channels, dtype=torch.bfloat16)
    args = (None, x, torch.zeros(features, channels, dtype=torch.bfloat16), None, 1.0, None, 0)
    entropy, lse, prob_sum, *_, kept = call(*args, False, 0)
    backward(entropy, None, prob_sum, None, *args, entropy, lse, kept, [False, True, True, False, False])


def expected(path: roofline.Path, chunks: tuple[int, int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for kernels, count in ((path.forward, chunks[0]), (path.backward, chunks[1])):
        for kernel in kernels:
            found[kernel.name] += count
    return found


def test_kernels_of_the_cuda_path(library: ctypes.CDLL) -> None:
    sizes = (300, 32, 600)
    found = cuda_launches.recorded(
        library, lambda ops: operators(ops.shared_penalty, ops.shared_penalty_backward, *sizes)
    )
    names = [name.split("<")[0] for name in cuda_resources.readable(list(found))]
    counts: Counter[str] = Counter()
    for name, launches in zip(names, found.values(), strict=True):
        if name not in COMBINING:
            counts[name] += sum(launches.values())
    # The library is built with smaller chunks, see cuda_on_cpu/build.py.
    chunks = roofline.cuda_chunks(sizes[0], sizes[2], 131072)
    assert chunks == (6, 6)
    assert counts == expected(roofline.CUDA, chunks)


@pytest.mark.parametrize("shape", roofline.PENALTIES)
def test_kernels_of_the_triton_path(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fusefeat.triton import _launch, _shared_penalty_chunks, _shared_penalty_statistics, _shared_penalty_sums
    from fusefeat.triton import _shared_penalty_tuning as tuning
    from fusefeat.triton import shared_penalty as triton_operators

    counts: Counter[str] = Counter()

    def count(kernel: Any, *args: Any, **config: Any) -> None:
        counts[kernel.fn.__name__] += 1

    for module in (_shared_penalty_chunks, _shared_penalty_statistics, _shared_penalty_sums):
        monkeypatch.setattr(module, "launch", count)
    # As on a GPU, whatever runs the kernels here.
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "POISON", False)
    sizes = SHAPES[shape][1:]
    operators(triton_operators.shared_penalty, triton_operators.shared_penalty_backward, *sizes)
    for name in COMBINING:
        counts.pop(name, None)
    assert counts == expected(roofline.TRITON, roofline.triton_chunks(sizes[0], sizes[2]))
