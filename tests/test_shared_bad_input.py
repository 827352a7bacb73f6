"""Wrong calls of the shared-penalty family: each raises before a kernel runs and names the argument."""

from __future__ import annotations

from typing import Any

import fusefeat
import numpy as np
import pytest
import torch

X, C, W, B = torch.randn(4, 3), torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)
R, PRIOR = torch.rand(6), torch.rand(5)
NAN, INF = float("nan"), float("inf")
FUNCTIONS = {
    name: getattr(fusefeat, name)
    for name in ("shared_assignment", "clamped_activation", "shared_penalty", "clamped_reg", "shared_objective")
}


def call(name: str, input: Any = X, context: Any = C, weight: Any = W, bias: Any = B, **keywords: Any) -> Any:
    return FUNCTIONS[name](input, context, weight, bias, **keywords)


# What every function of the family refuses.
COMMON: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": None}, TypeError, "input must be a torch.Tensor, got NoneType"),
    ({"input": np.zeros((4, 3))}, TypeError, "input must be a torch.Tensor"),
    ({"input": X.tolist()}, TypeError, "input must be a torch.Tensor"),
    ({"input": X.long()}, TypeError, "input must be float16.*int64"),
    ({"input": X.bool()}, TypeError, "input must be float16"),
    ({"input": X.to(torch.complex64)}, TypeError, "input must be float16"),
    ({"input": X.to_sparse()}, TypeError, "input must be a dense"),
    ({"input": X[0]}, ValueError, r"input must be 2-D \[N,D\]"),
    ({"input": X[None]}, ValueError, r"input must be 2-D \[N,D\]"),
    ({"input": X[0, 0]}, ValueError, r"input must be 2-D"),
    ({"context": 1.0}, TypeError, "context must be a torch.Tensor"),
    ({"context": C.long()}, TypeError, "context must be float16"),
    ({"context": C.double()}, TypeError, "context must be torch.float32 as input is"),
    ({"context": C.half()}, TypeError, "context must be torch.float32 as input is"),
    ({"context": C[0]}, ValueError, r"context must be 2-D"),
    ({"context": C[:, :2]}, ValueError, "context must have D = 3 columns"),
    ({"context": C.to("meta")}, ValueError, "context must be on input's device cpu"),
    ({"weight": None}, TypeError, "weight must be a torch.Tensor"),
    ({"weight": 5}, TypeError, "weight must be a torch.Tensor"),
    ({"weight": W.int()}, TypeError, "weight must be float16"),
    ({"weight": W.double()}, TypeError, "weight must be torch.float32 as input is"),
    ({"weight": W.t()}, ValueError, "weight must have D = 3 columns.*shape \\[3, 5\\]"),
    ({"weight": W[0]}, ValueError, r"weight must be 2-D \[F,D\]"),
    ({"weight": W[:0], "bias": None}, ValueError, "weight must have at least one"),
    ({"weight": W.to("meta")}, ValueError, "weight must be on input's device"),
    ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor"),
    ({"bias": B.long()}, TypeError, "bias must be float16"),
    ({"bias": B.double()}, TypeError, "bias must be torch.float32"),
    ({"bias": B[:4]}, ValueError, r"bias must be 1-D of length F \(rows of weight\) = 5"),
    ({"bias": B[:, None]}, ValueError, "bias must be 1-D"),
    ({"bias": B.sum()}, ValueError, "bias must be 1-D"),
    ({"bias": B.to("meta")}, ValueError, "bias must be on input's device"),
    ({"margin": 0}, ValueError, "margin must be greater than 0, got 0"),
    ({"margin": -1.0}, ValueError, "margin must be greater than 0"),
    ({"margin": NAN}, ValueError, "margin must be finite"),
    ({"margin": INF}, ValueError, "margin must be finite"),
    ({"margin": 10**400}, ValueError, "margin must be finite"),
    ({"margin": 1e31}, ValueError, "margin must be at most 1e\\+30, got 1e\\+31"),
    ({"margin": "1"}, TypeError, "margin must be a real number"),
    ({"margin": None}, TypeError, "margin must be a real number"),
    ({"margin": True}, TypeError, "margin must be a real number"),
    ({"margin": torch.tensor(1.0)}, TypeError, "margin must be a real number"),
    ({"backend": "numpy"}, ValueError, "backend must be None or one of"),
    ({"backend": 1}, TypeError, "backend must be a string"),
    ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot take this input.*takes tensors on cuda, got cpu"),
]

WEIGHTED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"row_weight": [1.0] * 6}, TypeError, "row_weight must be a torch.Tensor"),
    ({"row_weight": R.long()}, TypeError, "row_weight must be float16"),
    ({"row_weight": R[:4]}, ValueError, r"row_weight must be 1-D of length N \(context rows, then input rows\) = 6"),
    ({"row_weight": R[:, None]}, ValueError, "row_weight must be 1-D"),
    ({"row_weight": -R}, ValueError, "row_weight must not be negative, got -.* at index 0"),
    ({"row_weight": R.to("meta")}, ValueError, "row_weight must be on input's device"),
]

PENALTY: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prior": 0.2}, TypeError, "prior must be a torch.Tensor"),
    ({"prior": PRIOR.long()}, TypeError, "prior must be float16"),
    ({"prior": PRIOR[:4]}, ValueError, r"prior must be 1-D of length F \(rows of weight\) = 5"),
    ({"prior": PRIOR - 2}, ValueError, "prior must not be negative"),
    ({"prior": PRIOR.to("meta")}, ValueError, "prior must be on input's device"),
    ({"entropy_weight": "1"}, TypeError, "entropy_weight must be a real number"),
    ({"entropy_weight": NAN}, ValueError, "entropy_weight must be finite"),
    ({"balance_weight": None}, TypeError, "balance_weight must be a real number"),
    ({"balance_weight": -INF}, ValueError, "balance_weight must be finite"),
    ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got str"),
]

REG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ({"reduction": None}, TypeError, "reduction must be a string"),
    ({"reduction": 1}, TypeError, "reduction must be a string"),
]

WRONG = [(name, *wrong) for name in FUNCTIONS for wrong in COMMON]
WRONG += [(name, *wrong) for name in ("shared_penalty", "clamped_reg", "shared_objective") for wrong in WEIGHTED]
WRONG += [(name, *wrong) for name in ("shared_penalty", "shared_objective") for wrong in PENALTY]
WRONG += [(name, *wrong) for name in ("clamped_reg", "shared_objective") for wrong in REG]


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_wrong_call(index: int) -> None:
    name, change, error, message = WRONG[index]
    with pytest.raises(error, match=f"{name}: {message}"):
        call(name, **change)


def test_a_good_call_after_all_of_them_is_right() -> None:
    refused = 0
    for name, change, error, _ in WRONG:
        with pytest.raises(error):
            call(name, **change)
        refused += 1
    assert refused == len(WRONG) >= 200
    for name in FUNCTIONS:
        torch.testing.assert_close(call(name), call(name, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_autocast_mixes_half_types_but_not_float64(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if dtype == torch.float64:
            with pytest.raises(TypeError, match=r"weight must be torch\.float32"):
                call("shared_penalty", weight=W.double())
        else:
            mixed = call("shared_penalty", weight=W.half())
            torch.testing.assert_close(mixed, call("shared_penalty", weight=W.half().float()), rtol=2e-3, atol=0)
