"""The numbers behind the CPU kernels, seen through softmax_pool: exp, and the conversions of half types."""

from __future__ import annotations

import pytest
import torch
from cpu_isas import every_isa, rounds_weights  # noqa: F401 (the fixture isa)

INF, NAN = float("inf"), float("nan")
OPS = torch.ops.fusefeat


def test_exp_is_accurate_over_its_whole_range(isa: str) -> None:
    for dtype, low, ulp in ((torch.float32, -103.0, 2.0**-23), (torch.float64, -744.0, 2.0**-52)):
        scores = torch.linspace(low, 0, 5001, dtype=torch.float64).to(dtype).unsqueeze(0)
        out, lse, weights = OPS.softmax_pool(torch.ones(1, 5001, 1, dtype=dtype), scores, None, None, True)
        want = torch.softmax(scores.double(), 1)
        normal = want > torch.finfo(dtype).smallest_normal
        assert ((weights.double() - want) / want)[normal].abs().max() < 6 * ulp
        rest = (weights.double() - want)[~normal].abs()
        assert (rest <= 2 * torch.finfo(dtype).smallest_normal * ulp).all()
        assert abs(lse.item() - torch.logsumexp(scores.double(), 1).item()) < 8 * ulp and abs(out.item() - 1) < 8 * ulp


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_of_half_types(isa: str, dtype: torch.dtype) -> None:
    """All 65536 values come in exactly; what goes out is rounded as torch does, ties, infinities and NaN included."""
    # Products of pairs of bfloat16 take numbers below the smallest normal one for 0.
    atol = torch.finfo(dtype).smallest_normal if rounds_weights(dtype) else 0
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for values in (every.view(1, 1, -1), every[: 100 * 655].view(1, 100, 655), every.view(-1, 1, 1)):
        bags = values.flatten(0, 1)[:, None]
        out = OPS.softmax_pool(bags, torch.zeros(bags.shape[:2], dtype=dtype), None, None, False)[0]
        torch.testing.assert_close(out, bags[:, 0].float(), rtol=0, atol=atol, equal_nan=True)
    exact = every.float()
    ties = (exact[:-1] + exact[1:]) / 2
    random = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    for grads in (ties, random, torch.tensor([65519.99, 65520.0, 3.4e38, INF, -INF, NAN, 0.0, -0.0, 1e-45])):
        x = torch.zeros(1, 1, grads.numel(), dtype=dtype)
        scores, out, lse = torch.zeros(1, 1), torch.zeros(1, grads.numel()), torch.zeros(1, dtype=torch.float64)
        args = (None, x, scores, None, None, out, lse, torch.empty(0), True, False)
        grad_x = OPS.softmax_pool_backward(grads[None], *args)[0]
        torch.testing.assert_close(grad_x[0, 0], grads.to(dtype), rtol=0, atol=0, equal_nan=True)
