"""The shared case lists with FUSEFEAT_POISON=1: outputs and scratch of the kernels start as NaN.

The tests of CUDA on the CPU and of Triton's interpreter always run so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "pools": ["tests/test_attention_pool.py", "-k", "cpu and not gradcheck and not float16"],
    "sweep": ["tests/test_cpu_sweep.py", "-k", "not generic and (partial or chunks) and (float32 or bfloat16)"],
    "shared": [
        "tests/test_shared_penalty.py",
        "-k",
        "cpu and not gradcheck and not float16 and not (regulariser and float64)",
    ],
}


@pytest.mark.parametrize("family", CASES)
def test_every_element_is_written(family: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *CASES[family]]
    environment = {**os.environ, "FUSEFEAT_POISON": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_mode_is_on_when_asked_for() -> None:
    code = "import ctypes, sys; from fusefeat import _library as l; "
    code += "print(ctypes.CDLL(str(l._PACKAGE / 'libfusefeat_cpu.so')).fusefeat_poison())"
    for wish, expected in (("1", "1"), ("0", "0"), ("", "0")):
        environment = {**os.environ, "FUSEFEAT_POISON": wish}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_triton_allocates_so_when_asked_and_in_all_of_its_tests() -> None:
    launch = pytest.importorskip("fusefeat.triton._launch")
    if launch.INTERPRETED:
        tokens = torch.zeros(2, dtype=torch.bfloat16)
        assert launch.new_empty(tokens, (3,)).isnan().all()
        assert (launch.new_empty(tokens, (3,), torch.int64) == -1).all()
    code = "from fusefeat.triton import _launch; print(_launch.POISON)"
    for wish, expected in (("1", "True"), ("0", "False")):
        environment = {**os.environ, "FUSEFEAT_POISON": wish}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
