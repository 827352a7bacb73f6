"""The GPU kernels on the shared cases without a GPU: in Triton's interpreter, and CUDA on the CPU."""

from __future__ import annotations

import functools

import fusefeat
import pool_cases
import pytest
import torch
from cuda_on_cpu.kernels import cuda_backend  # noqa: F401 (a fixture)
from fusefeat import backends


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


each_attention_case = pytest.mark.parametrize("name", pool_cases.ATTENTION)
each_softmax_case = pytest.mark.parametrize("name", pool_cases.SOFTMAX)
cuda_runs = pytest.mark.usefixtures("cuda_backend")
DTYPES = [torch.float32, torch.bfloat16]


@cuda_runs
@each_attention_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_pool_in_cuda(name: str, dtype: torch.dtype) -> None:
    call = functools.partial(fusefeat.attention_pool, backend="cuda")
    pool_cases.compare(call, fusefeat.attention_pool, pool_cases.ATTENTION[name](dtype), with_scale=True)


@cuda_runs
@each_softmax_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_pool_in_cuda(name: str, dtype: torch.dtype) -> None:
    call = functools.partial(fusefeat.softmax_pool, backend="cuda")
    pool_cases.compare(call, fusefeat.softmax_pool, pool_cases.SOFTMAX[name](dtype), with_scale=False)


triton_runs = pytest.mark.skipif(
    bool(backends.BACKENDS["triton"].why_not(torch.empty(0))), reason="Triton does not run on CPU tensors here"
)


@triton_runs
@each_attention_case
def test_attention_pool_in_triton(name: str) -> None:
    call = functools.partial(fusefeat.attention_pool, backend="triton")
    pool_cases.compare(call, fusefeat.attention_pool, pool_cases.ATTENTION[name](torch.float32), with_scale=True)


@triton_runs
@each_softmax_case
def test_softmax_pool_in_triton(name: str) -> None:
    call = functools.partial(fusefeat.softmax_pool, backend="triton")
    pool_cases.compare(call, fusefeat.softmax_pool, pool_cases.SOFTMAX[name](torch.float32), with_scale=False)
