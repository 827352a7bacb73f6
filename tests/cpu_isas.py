"""The fixture that runs a test of CPU kernels on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fusefeat import _library

if not _library.STATE.cpu_loaded or _library.STATE.bindings is None:
    pytest.skip(f"no compiled CPU kernels: {_library.STATE.reasons}", allow_module_level=True)

ISAS = ["generic", "avx2", "avx512"]
ISAS = ISAS[: ISAS.index(_library.isa()["best"]) + 1]

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_PAIRS = CPUINFO.exists() and "avx512_bf16" in CPUINFO.read_text()


def rounds_weights(dtype: torch.dtype) -> bool:
    """Whether the kernels in use multiply pairs of bfloat16, and round softmax weights to it for that."""
    return dtype == torch.bfloat16 and BFLOAT16_PAIRS and _library.isa()["current"] == "avx512"


@pytest.fixture(params=ISAS, name="isa")
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    with _library.use_isa(request.param):
        yield request.param
