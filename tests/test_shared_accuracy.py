"""Errors of the shared-penalty family at working sizes, against float64 and beside eager PyTorch's own."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import clamped_reg, gate, shared_objective, shared_penalty
from benchmarks.case import Case, Inputs
from benchmarks.results import OURS

TYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # what is allowed whatever eager has


def case_of(module: object, rows: int, channels: int, features: int, dtype: torch.dtype) -> Case:
    case = module.cases(torch.device("cpu"), dtype, quick=True)[0]

    def inputs() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, channels, generator=generator)
        weight = torch.randn(features, channels, generator=generator) * channels**-0.5
        return {"x": x.to(dtype), "weight": weight.to(dtype)}

    return dataclasses.replace(case, inputs=inputs)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 12, 300), (1000, 10, 128), (500, 64, 3000), (40, 32, 65536)], ids=str)
@pytest.mark.parametrize("module", [shared_penalty, clamped_reg, shared_objective], ids=lambda m: m.FAMILY)
def test_within_twice_eager(module: object, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = case_of(module, *shape, dtype)
    inputs = case.inputs()
    for tensor in inputs.values():
        tensor.requires_grad_()
    grad_out = torch.tensor(0.7).to(dtype)
    wanted = case.reference(inputs, grad_out)
    errors = {}
    for contender in case.contenders:
        if contender.name in (OURS, case.baseline):
            bound = contender.bind(inputs)
            errors[contender.name] = gate.forward_errors(bound, wanted) | gate.gradient_errors(bound, wanted, grad_out)
    for name, error in errors[OURS].items():
        eager = errors[case.baseline][name]
        assert error <= max(2 * eager, TYPES[dtype]), f"{name}: {error:.1e}, eager {eager:.1e}"
