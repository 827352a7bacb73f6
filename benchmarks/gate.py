"""Correctness before speed: who differs from the float64 reference is not timed."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Bound, Case, Inputs

# Root-mean-square error relative to the reference's own root mean square. A peer may round its intermediate
# tensors as it likes; beyond these limits it computes something else.
PEER_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Ours may have this much at least, whatever eager has: one rounding of the result, or the contract's floor.
OWN_FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over RMS of the reference; infinite for another shape or anything not finite."""
    if got.shape != wanted.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(got.detach().double() - wanted)
    error = (difference / torch.linalg.vector_norm(wanted).clamp_min(torch.finfo(torch.float64).tiny)).item()
    return error if error < float("inf") else float("inf")


def forward_errors(bound: Bound, wanted: Inputs) -> dict[str, float]:
    with torch.no_grad():
        return {"out": relative_error(bound.forward(), wanted["out"])}


def gradient_errors(bound: Bound, wanted: Inputs, grad_out: Tensor) -> dict[str, float]:
    """Errors of the gradients that the reference has, and of the result that they belong to: a forward that keeps
    something for its backward may be another kernel."""
    with torch.enable_grad():
        out = bound.forward()
        got = dict(zip(bound.leaves, torch.autograd.grad(out, list(bound.leaves.values()), grad_out), strict=True))
    of_gradients = {
        f"grad {name}": relative_error(got[name], wanted[f"grad {name}"]) for name in got if f"grad {name}" in wanted
    }
    return {"out of training": relative_error(out, wanted["out"])} | of_gradients


def verdict(
    case: Case, dtype: torch.dtype, errors: dict[str, float], ours: bool, baseline: dict[str, float]
) -> str | None:
    """None when within limits, else the sentence that takes a contender's time away."""
    for name, error in errors.items():
        if ours:
            factor, least = case.gradient_slack if name.startswith("grad") else (2.0, 1e-6)
            limit = max(factor * baseline.get(name, 0.0), OWN_FLOOR[dtype])
            if dtype == torch.float32:
                limit = max(limit, least)
        else:
            limit = PEER_LIMIT[dtype] * case.peer_slack
        if not error <= limit:
            return f"{name} is off by {error:.1e} relative to float64, more than {limit:.1e}"
    return None
