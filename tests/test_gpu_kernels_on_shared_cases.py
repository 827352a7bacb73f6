"""The GPU kernels on the shared cases without a GPU: in Triton's interpreter, and CUDA on the CPU."""

from __future__ import annotations

import functools
from typing import Any

import fusefeat
import pool_cases
import pytest
import torch
from cuda_on_cpu.build import NAMESPACE
from cuda_on_cpu.kernels import load_kernels
from fusefeat import backends
from fusefeat.ops import attention_pool as pools


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cuda_pools(request: pytest.FixtureRequest) -> dict[str, Any]:
    load_kernels(request.config)

    class Operators:
        def __getattr__(self, name: str) -> Any:
            return getattr(getattr(torch.ops, NAMESPACE), name).default

    return pools._pools(Operators())


def on_cuda_kernels(operators: dict[str, Any], name: str) -> Any:
    """The public function's signature on the CUDA operators."""

    def call(x: Any, other: Any, *, mask: Any, cu_seqlens: Any, return_weights: bool = False, **scale: float) -> Any:
        out, _, weights = operators[name](x, other, mask, cu_seqlens, *scale.values(), return_weights)
        weights_dtype = other.dtype if name == "softmax_pool" else x.dtype
        return (out.to(x.dtype), weights.to(weights_dtype)) if return_weights else out.to(x.dtype)

    return call


each_attention_case = pytest.mark.parametrize("name", pool_cases.ATTENTION)
each_softmax_case = pytest.mark.parametrize("name", pool_cases.SOFTMAX)
DTYPES = [torch.float32, torch.bfloat16]


@each_attention_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_pool_in_cuda(cuda_pools: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    call = on_cuda_kernels(cuda_pools, "attention_pool")
    pool_cases.compare(call, fusefeat.attention_pool, pool_cases.ATTENTION[name](dtype), with_scale=True)


@each_softmax_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_pool_in_cuda(cuda_pools: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    call = on_cuda_kernels(cuda_pools, "softmax_pool")
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
