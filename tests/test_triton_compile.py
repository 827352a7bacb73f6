"""Every Triton kernel compiles to machine code without a GPU, within registers and shared memory.

FUSEFEAT_FULL=1 compiles every dtype, size and option for every architecture (tens of minutes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
KERNELS = {
    "pool_forward",
    "pool_offsets",
    "pool_combine",
    "pool_weights",
    "pool_dots",
    "pool_backward",
    "pool_weight_dot",
    "pool_delta",
    "sum_partials",
    "shared_row_statistics",
    "shared_combine_rows",
    "shared_column_sums",
    "shared_matrix",
    "shared_sum",
    "shared_row_dots",
    "shared_grad_logits",
    "shared_assignment_dots",
    "shared_grad_assignment",
    "shared_grad_rows",
    "shared_grad_weight",
}


def test_kernels_compile_without_spills(tmp_path, pytestconfig):
    """In a process of its own: this one may have imported triton for the interpreter.

    The table is left in pytest's cache (reports), where continuous integration prints it from.
    """
    report = tmp_path / "rows.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), *filter(None, [env.get("PYTHONPATH")])])
    full = ["--full"] if os.environ.get("FUSEFEAT_FULL") == "1" else []
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "triton_resources.py", "--json", report, *full],
        env=env,
        capture_output=True,
        text=True,
    )
    (pytestconfig.cache.mkdir("reports") / "triton_resources.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(report.read_text())
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["arch"] for row in rows} == {80, 90, 100}
