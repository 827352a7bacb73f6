"""The CUDA kernels, run on the CPU under the address sanitizer, stay inside their tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu.build import HERE, NAMESPACE, SANITIZE, build, compiler
from cuda_on_cpu.kernels import build_kernels
from test_cuda_on_cpu_layer import FAULTS


@pytest.fixture(scope="session")
def sanitizer():
    """The sanitizer's run-time library, which must be loaded before Python's own allocations."""
    cxx = compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    path = subprocess.run([cxx, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    return path


def run(sanitizer, *arguments):
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    command = [sys.executable, str(HERE / "memory_check.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("family", ["pools", "shared"])
def test_family(sanitizer, request, family):
    result = run(sanitizer, family, build_kernels(request.config, "kernels", SANITIZE), NAMESPACE)
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr[-4000:]


@pytest.mark.parametrize(
    ("fault", "report"),
    [("past a tensor", "heap-buffer-overflow"), ("past a local array", "stack-buffer-overflow")],
)
def test_planted_fault_is_found(sanitizer, request, fault, report):
    library = build(request.config.cache.mkdir("cuda_on_cpu"), "planted", [HERE / "planted_faults.cu"], SANITIZE)
    assert run(sanitizer, "planted", library, FAULTS.index("none")).stdout.strip() == "done"
    result = run(sanitizer, "planted", library, FAULTS.index(fault))
    assert result.returncode != 0 and report in result.stderr
