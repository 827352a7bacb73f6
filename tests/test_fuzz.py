"""Drawn shapes, dtypes, strides, masks, offsets, margins and special values on the CPU kernels, against the float64
reference. Those of test_fuzz_gpu_kernels.py are drawn and held to it alike.

FUSEFEAT_FUZZ=10000 (``make fuzz``) draws that many examples anew; ``--hypothesis-seed=N`` repeats a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuzz
import pytest
import torch
from cpu_isas import ISAS
from fusefeat import _library
from fuzz_problems import bags, check_matrices, check_objective, check_pool, rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def test_a_wrong_number_is_caught() -> None:
    """The comparison itself: a result off by 1e-4, a NaN and a gradient left out are each seen."""

    def doubled(fault: Callable[[Tensor], Tensor]) -> Callable[..., fuzz.Outputs]:
        return lambda leaves, backend: {"y": (fault if backend == "cpu" else lambda t: t)(2 * leaves["x"])}

    leaves = {"x": torch.randn(50)}
    fuzz.compare(doubled(lambda t: t * (1 + 1e-7)), leaves, "cpu", 0)
    faults = (lambda t: t * (1 + 1e-4), lambda t: fuzz.place(t, [(0.5, fuzz.NAN)]), lambda t: t.detach() + 0)
    for fault in faults:
        with pytest.raises(AssertionError):
            fuzz.compare(doubled(fault), leaves, "cpu", 0)


@fuzz.fuzzed(0.45)
@given(bags(), st.sampled_from(ISAS), fuzz.seeds)
def test_pools_on_the_cpu(problem: dict[str, Any], isa: str, seed: int) -> None:
    with _library.use_isa(isa):
        check_pool(problem, "cpu", seed)


@fuzz.fuzzed(0.4)
@given(rows(), st.sampled_from(ISAS), fuzz.seeds)
def test_objective_on_the_cpu(problem: dict[str, Any], isa: str, seed: int) -> None:
    with _library.use_isa(isa):
        check_objective(problem, "cpu", seed)


@fuzz.fuzzed(0.15)
@given(rows(), st.sampled_from(ISAS), fuzz.seeds)
def test_matrices_on_the_cpu(problem: dict[str, Any], isa: str, seed: int) -> None:
    with _library.use_isa(isa):
        check_matrices(problem, "cpu", seed)
