"""Drawn problems on the GPU kernels without a GPU: CUDA on the CPU, in both orders of threads and with memory that
starts as NaN, and smaller ones in Triton's interpreter. See test_fuzz.py.
"""

from __future__ import annotations

from typing import Any

import fuzz
import pytest
import torch
from cuda_on_cpu.kernels import cuda_backend  # noqa: F401 (a fixture)
from fusefeat import backends
from fuzz_problems import bags, check_matrices, check_objective, check_pool, rows
from hypothesis import given

cuda_runs = pytest.mark.usefixtures("cuda_backend")
triton_runs = pytest.mark.skipif(
    bool(backends.BACKENDS["triton"].why_not(torch.empty(0))), reason="Triton does not run on CPU tensors here"
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaNs and infinities that are meant


@cuda_runs
@fuzz.fuzzed(0.1)
@given(bags(), fuzz.seeds)
def test_pools_in_cuda(problem: dict[str, Any], seed: int) -> None:
    check_pool(problem, "cuda", seed)


@cuda_runs
@fuzz.fuzzed(0.1)
@given(rows(), fuzz.seeds)
def test_objective_in_cuda(problem: dict[str, Any], seed: int) -> None:
    check_objective(problem, "cuda", seed)


@cuda_runs
@fuzz.fuzzed(0.04)
@given(rows(), fuzz.seeds)
def test_matrices_in_cuda(problem: dict[str, Any], seed: int) -> None:
    check_matrices(problem, "cuda", seed)


@triton_runs
@fuzz.fuzzed(0.05)
@given(bags(tiny=True), fuzz.seeds)
def test_pools_in_triton(problem: dict[str, Any], seed: int) -> None:
    check_pool(problem, "triton", seed)


@triton_runs
@fuzz.fuzzed(0.04)
@given(rows(tiny=True), fuzz.seeds)
def test_objective_in_triton(problem: dict[str, Any], seed: int) -> None:
    check_objective(problem, "triton", seed)


@triton_runs
@fuzz.fuzzed(0.02)
@given(rows(tiny=True), fuzz.seeds)
def test_matrices_in_triton(problem: dict[str, Any], seed: int) -> None:
    check_matrices(problem, "triton", seed)
