"""The fixture that runs a test of CPU kernels on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fusefeat import _library

if not _library.STATE.cpu_loaded or _library.STATE.bindings is None:
    pytest.skip(f"no compiled CPU kernels: {_library.STATE.reasons}", allow_module_level=True)

ISAS = ["generic", "avx2", "avx512"]
ISAS = ISAS[: ISAS.index(_library.isa()["best"]) + 1]


@pytest.fixture(params=ISAS, name="isa")
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    with _library.use_isa(request.param):
        yield request.param
