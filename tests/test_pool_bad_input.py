"""Wrong calls: each raises before a kernel runs, names the argument, and leaves the process able to do a right one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fusefeat
import numpy as np
import pytest
import torch

X, Q, S = torch.randn(2, 5, 4), torch.randn(4), torch.randn(2, 5)
P, CU = torch.randn(10, 4), torch.tensor([0, 3, 10])
MASK = torch.ones(2, 5, dtype=torch.bool)


def attend(x: Any = X, query: Any = Q, **keywords: Any) -> Callable[[], Any]:
    return lambda: fusefeat.attention_pool(x, query, **keywords)


def pool(values: Any = X, scores: Any = S, **keywords: Any) -> Callable[[], Any]:
    return lambda: fusefeat.softmax_pool(values, scores, **keywords)


def layer(x: Any = X, size: Any = 4, hidden: Any = 3, dtype: Any = None, **keywords: Any) -> Callable[[], Any]:
    return lambda: fusefeat.AttentionPool(size, hidden, dtype=dtype)(x, **keywords)


def replaced(linear_out: torch.nn.Linear) -> Callable[[], Any]:
    module = fusefeat.AttentionPool(4, 3)
    module.linear_out = linear_out
    return lambda: module(X)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (attend(x=None), TypeError, "x must be a torch.Tensor, got NoneType"),
    (attend(return_weights="yes"), TypeError, "return_weights must be True or False, got str"),
    (pool(return_weights=None), TypeError, "return_weights must be True or False"),
    (layer(return_weights=1), TypeError, "return_weights must be True or False"),
    (replaced(torch.nn.Linear(3, 2)), ValueError, r"linear_out.weight must have shape \[1, 3\].*\[2, 3\]"),
    (replaced(torch.nn.Linear(7, 1)), ValueError, r"linear_out.weight must have shape \[1, 3\]"),
    (attend(x=np.zeros((2, 5, 4))), TypeError, "x must be a torch.Tensor"),
    (attend(x=X.tolist()), TypeError, "x must be a torch.Tensor"),
    (attend(x=X.long()), TypeError, "x must be float16.*got a int64"),
    (attend(x=X.bool()), TypeError, "x must be float16"),
    (attend(x=X.to(torch.complex64)), TypeError, "x must be float16"),
    (attend(x=X.to(torch.float8_e5m2)), TypeError, "x must be float16"),
    (attend(x=X.to_sparse()), TypeError, "x must be a dense"),
    (attend(x=torch.nested.nested_tensor([P, P])), TypeError, "x must be a dense.*cu_seqlens"),
    (attend(x=torch.nested.nested_tensor([P, P], layout=torch.jagged)), TypeError, "x must be a dense.*cu_seqlens"),
    (attend(x=X[0]), ValueError, r"x must be \[B,T,D\].*cu_seqlens"),
    (attend(x=X[None]), ValueError, r"x must be \[B,T,D\]"),
    (attend(x=X[0, 0]), ValueError, r"x must be \[B,T,D\]"),
    (attend(x=torch.tensor(1.0)), ValueError, r"x must be \[B,T,D\]"),
    (attend(query=None), TypeError, "query must be a torch.Tensor"),
    (attend(query=1.0), TypeError, "query must be a torch.Tensor"),
    (attend(query=Q.long()), TypeError, "query must be float16"),
    (attend(query=Q.double()), TypeError, "query must be torch.float32 to go with x"),
    (attend(query=Q.half()), TypeError, "query must be torch.float32"),
    (attend(x=X.half(), query=Q.bfloat16()), TypeError, "query must be torch.float16 or torch.float32"),
    (attend(x=X.double()), TypeError, "query must be torch.float64"),
    (attend(query=Q[:3]), ValueError, "query must be .*D = 4.*shape \\[3\\]"),
    (attend(query=Q[:1]), ValueError, "query must be"),
    (attend(query=Q[None, None]), ValueError, "query must be"),
    (attend(query=Q.sum()), ValueError, "query must be"),
    (attend(query=torch.randn(0, 4)), ValueError, "query must be .*K >= 1"),
    (attend(query=torch.randn(4, 1)), ValueError, "query must be"),
    (attend(query=Q.to("meta")), ValueError, "query must be on x's device cpu"),
    (attend(mask=MASK.int()), TypeError, "mask must be bool with True = keep"),
    (attend(mask=MASK.float()), TypeError, "mask must be bool"),
    (attend(mask=[[True] * 5] * 2), TypeError, "mask must be a torch.Tensor"),
    (attend(mask=MASK[:1]), ValueError, r"mask must be \[B,T\] = \[2, 5\]"),
    (attend(mask=MASK[:, :4]), ValueError, "mask must be"),
    (attend(mask=MASK[..., None]), ValueError, "mask must be"),
    (attend(mask=MASK.t()), ValueError, "mask must be"),
    (attend(mask=MASK.to("meta")), ValueError, "mask must be on x's device"),
    (attend(x=P, mask=MASK, cu_seqlens=CU), ValueError, "mask cannot be combined with cu_seqlens"),
    (attend(cu_seqlens=CU), ValueError, r"x must be packed \[S,D\]"),
    (attend(x=P, cu_seqlens=[0, 3, 10]), TypeError, "cu_seqlens must be a torch.Tensor"),
    (attend(x=P, cu_seqlens=CU.float()), TypeError, "cu_seqlens must be int32 or int64"),
    (attend(x=P, cu_seqlens=CU.short()), TypeError, "cu_seqlens must be int32 or int64"),
    (attend(x=P, cu_seqlens=CU[None]), ValueError, "cu_seqlens must be 1-D"),
    (attend(x=P, cu_seqlens=CU[:0]), ValueError, "cu_seqlens must be 1-D with at least one entry"),
    (attend(x=P, cu_seqlens=CU[0]), ValueError, "cu_seqlens must be 1-D"),
    (attend(x=P, cu_seqlens=CU + 1), ValueError, "cu_seqlens must start at 0 and end at 10.*first 1 and last 11"),
    (attend(x=P, cu_seqlens=CU[:2]), ValueError, "cu_seqlens must start at 0 and end at 10"),
    (attend(x=P, cu_seqlens=torch.tensor([0, 12, 10])), ValueError, "cu_seqlens must not decrease, got 12 followed"),
    (attend(x=P, cu_seqlens=torch.tensor([0, -1, 10])), ValueError, "cu_seqlens must not decrease"),
    (attend(x=P, cu_seqlens=torch.tensor([0, 5, 4, 10], dtype=torch.int32)), ValueError, "at index 1"),
    (attend(x=P, cu_seqlens=CU.to("meta")), ValueError, "cu_seqlens must be on x's device"),
    (attend(scale=float("nan")), ValueError, "scale must be finite"),
    (attend(scale=float("inf")), ValueError, "scale must be finite"),
    (attend(scale=10**400), ValueError, "scale must be finite"),
    (attend(scale="1"), TypeError, "scale must be a real number"),
    (attend(scale=None), TypeError, "scale must be a real number"),
    (attend(scale=True), TypeError, "scale must be a real number"),
    (attend(scale=1j), TypeError, "scale must be a real number"),
    (attend(scale=torch.tensor(1.0)), TypeError, "scale must be a real number"),
    (attend(backend="numpy"), ValueError, "backend must be None or one of reference, cpu, cuda, triton"),
    (attend(backend="CPU"), ValueError, "backend must be"),
    (attend(backend=""), ValueError, "backend must be"),
    (attend(backend=3), TypeError, "backend must be a string"),
    (attend(backend="cuda"), ValueError, "backend 'cuda' cannot take this input.*takes tensors on cuda, got cpu"),
    (pool(values=None), TypeError, "values must be a torch.Tensor"),
    (pool(values=X.int()), TypeError, "values must be float16"),
    (pool(values=X[0]), ValueError, r"values must be \[B,T,D\]"),
    (pool(scores=None), TypeError, "scores must be a torch.Tensor"),
    (pool(scores=S.long()), TypeError, "scores must be float16"),
    (pool(scores=S.double()), TypeError, "scores must be torch.float32 to go with values"),
    (pool(values=X.bfloat16(), scores=S.half()), TypeError, "scores must be torch.bfloat16 or torch.float32"),
    (pool(scores=S[:1]), ValueError, r"scores must be \[B,T\] or \[B,T,K\]"),
    (pool(scores=S.t()), ValueError, "scores must be"),
    (pool(scores=S[0]), ValueError, "scores must be"),
    (pool(scores=S[..., None, None]), ValueError, "scores must be"),
    (pool(scores=S[..., None][..., :0]), ValueError, "scores must have at least one query"),
    (pool(values=P, scores=torch.randn(9), cu_seqlens=CU), ValueError, r"scores must be \[S\] or \[S,K\]"),
    (pool(scores=S.to("meta")), ValueError, "scores must be on values's device"),
    (pool(mask=MASK.byte()), TypeError, "mask must be bool"),
    (pool(values=P, scores=S.flatten(), cu_seqlens=CU.double()), TypeError, "cu_seqlens must be int32"),
    (pool(backend="cudnn"), ValueError, "backend must be"),
    (layer(size=0), ValueError, "input_size must be at least 1"),
    (layer(size=4.0), TypeError, "input_size must be an int"),
    (layer(hidden=-1), ValueError, "hidden_size must be at least 1"),
    (layer(hidden=True), TypeError, "hidden_size must be an int"),
    (layer(x=X[..., :3]), ValueError, "x must have input_size = 4 channels"),
    (layer(x=X[0]), ValueError, r"x must be \[B,T,D\]"),
    (layer(x=X.double()), TypeError, "linear_in.weight must be torch.float64"),
    (layer(dtype=torch.half), TypeError, "linear_in.weight must be torch.float32"),
    (layer(x=X.to("meta")), ValueError, "linear_in.weight must be on x's device meta"),
    (layer(mask=MASK.int()), TypeError, "mask must be bool"),
    (layer(x=P, cu_seqlens=CU + 1), ValueError, "cu_seqlens must start at 0"),
]


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_wrong_call(index: int) -> None:
    call, error, message = WRONG[index]
    with pytest.raises(error, match=message):
        call()
    torch.testing.assert_close(attend()(), attend(backend="reference")())


def test_the_message_of_a_refused_backend_names_every_candidate() -> None:
    with pytest.raises(ValueError, match="cannot take this input") as caught:
        attend(backend="cuda")()
    for name in ("reference", "cpu", "triton"):
        assert f"{name}:" in str(caught.value)


def test_offsets_that_lie_stay_in_bounds() -> None:
    """Unchecked at the operator, as on a GPU: every element of the result is written and none is out of bounds."""
    x = torch.randn(10, 4)
    for values in ([0, 3, 1000], [0, -5, 10], [7, 3, 10], [10, 0, 10], [-(2**60), 2**60, 5], [0, 8, 2, 10]):
        out, lse, weights = torch.ops.fusefeat.attention_pool(x, Q, None, torch.tensor(values), 1.0, True)
        assert not out.isnan().any() and not weights.isnan().any() and not lse.isnan().any()
        grads = torch.ops.fusefeat.attention_pool_backward(
            out, weights, x, Q, None, torch.tensor(values), 1.0, out, lse, weights, True, True
        )
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("count", [3, 1000])
def test_few_and_many_offsets(count: int) -> None:
    """Few are looked at as numbers, many as a tensor: empty bags pass, a step back does not."""
    x, q = torch.randn(count, 4), torch.randn(4)
    good = torch.arange(count + 1).div(2, rounding_mode="floor") * 2
    good[-1] = count
    assert fusefeat.attention_pool(x, q, cu_seqlens=good, backend="cpu").shape == (count, 4)
    bad = torch.arange(count + 1)
    bad[-2] = count + 1
    with pytest.raises(
        ValueError, match=rf"must not decrease, got {count + 1} followed by {count} at index {count - 1}"
    ):
        fusefeat.attention_pool(x, q, cu_seqlens=bad, backend="cpu")
