"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time; needs no GPU.

The operators run and their launches are recorded, so what is compiled is what would be launched.

    python benchmarks/triton_resources.py [--full] [--arch 90 ...] [--jobs N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fusefeat.triton import _attention_pool_backward as backward_kernels
from fusefeat.triton import _attention_pool_forward as forward_kernels
from fusefeat.triton import _attention_pool_tuning as tuning
from fusefeat.triton import _shared_penalty_backward as shared_backward_kernels
from fusefeat.triton import _shared_penalty_forward as shared_forward_kernels
from fusefeat.triton import _shared_penalty_products as shared_product_kernels
from fusefeat.triton import attention_pool as operators
from fusefeat.triton import clamped_reg as clamp_operators
from fusefeat.triton import shared_penalty as shared_operators
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {
    name: kernel
    for module in (
        forward_kernels,
        backward_kernels,
        shared_forward_kernels,
        shared_backward_kernels,
        shared_product_kernels,
    )
    for name, kernel in vars(module).items()
    if name.startswith(("pool_", "sum_", "shared_"))
}
ARCHS = (80, 90, 100)
# Opt-in limit of one block, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# ptxas may park a few scalars of the outer loops in local memory to reach its next occupancy step. More than that is
# register pressure: tokens or sums that leave the registers inside the loop over tokens.
PARKED_LIMIT = 32
DEFAULT_STAGES = 3
TRITON_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with everything its machine code depends on."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Resources:
    kernel: str
    config: str
    arch: int
    registers: int
    spilled: int
    shared: int

    @property
    def problem(self) -> str:
        if self.spilled > PARKED_LIMIT:
            return f"{self.spilled} bytes of local memory"
        return "" if self.shared <= SHARED_LIMIT[self.arch] else f"{self.shared} bytes of shared memory"


def specialise(kernel: Any, args: tuple[Any, ...], config: dict[str, Any]) -> Launch:
    """What Triton derives from arguments: types, integers equal to 1, multiples of 16, aligned pointers."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: value for name, value in config.items() if name in names}
    signature, constants, divisible = [], [], []
    for name, parameter in zip(names, kernel.params, strict=True):
        value = values[name]
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, TRITON_TYPES[value.dtype]))
            divisible.append(name)
        elif type(value) is int:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
        else:
            signature.append((name, "fp32"))
    return Launch(
        kernel.__name__, tuple(signature), tuple(constants), tuple(divisible),
        config["num_warps"], config.get("num_stages", DEFAULT_STAGES),
    )  # fmt: skip


def launches_of(run: Any) -> list[Launch]:
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **config: found.append(specialise(self.kernel, args, config))

    with FakeTensorMode(), mock.patch.object(operators, "wrap_triton", Recorder):
        run()
    return found


def shared_launches_of(run: Any) -> list[Launch]:
    """Of operators that torch.compile does not trace, run on tensors in memory."""
    found: list[Launch] = []

    def recorder(kernel: Any, grid: Any) -> Any:
        return lambda *args, **config: found.append(specialise(kernel, args, config))

    with mock.patch.object(triton.JITFunction, "__getitem__", recorder):
        run()
    return found


def run_pools(dtype: torch.dtype, channels: int, queries: int | None, packed: bool, masked: bool, extras: bool) -> None:
    """Forward and backward of both pools, on fake tensors."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    bags, tokens = 16, 4096
    shape = (bags * tokens,) if packed else (bags, tokens)
    axis = () if queries is None else (queries,)
    x = torch.empty(*shape, channels, dtype=dtype)
    mask = torch.empty(shape, dtype=torch.bool) if masked and not packed else None
    cu = torch.empty(bags + 1, dtype=torch.int32) if packed else None
    query = torch.empty(*axis, channels, dtype=dtype)
    scores = torch.empty(*shape, *axis, dtype=dtype)
    grad_out = torch.empty(bags, *axis, channels, dtype=acc)
    grad_weights = torch.empty(*shape, *axis, dtype=acc) if extras else None
    out, lse, weights = operators.attention_pool(x, query, mask, cu, 0.5, extras)
    operators.attention_pool_backward(
        grad_out, grad_weights, x, query, mask, cu, 0.5, out, lse, weights, True, not (extras and masked)
    )
    out, lse, weights = operators.softmax_pool(x, scores, mask, cu, extras)
    operators.softmax_pool_backward(
        grad_out, grad_weights, x, scores, mask, cu, out, lse, weights, True, not (extras and masked)
    )


def run_shared(dtype: torch.dtype, operand: int, rows: int, channels: int, features: int, extras: bool) -> None:
    """Forward and backward of the shared-logits operators; extras: bias, weights, a context, everything at once."""
    x, weight = torch.empty(rows, channels, dtype=dtype), torch.empty(features, channels, dtype=dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    context = torch.empty(rows, channels, dtype=dtype) if extras else None
    count = 2 * rows if extras else rows
    row_weight = torch.empty(count, dtype=acc) if extras else None
    bias = torch.empty(features, dtype=acc) if extras else None
    args = (context, x, weight, bias, 0.5)
    per_row, per_feature = torch.empty(count, dtype=acc), torch.empty(features, dtype=acc)
    matrix = torch.empty(count, features, dtype=dtype)
    needs = [extras, True, True, extras]
    *_, kept = shared_operators.shared_penalty(*args, row_weight, operand, extras, count if extras else 0)
    incoming = (per_row, per_row if extras else None, per_feature, per_row if extras else None)
    shared_operators.shared_penalty_backward(
        *incoming, *args, row_weight, operand, per_row, per_row, kept, [*needs, extras]
    )
    clamp_operators.clamped_reg(*args, row_weight, operand)
    clamp_operators.clamped_reg_backward(per_row, *args, row_weight, operand, needs)
    shared_operators.shared_assignment(*args, operand)
    shared_operators.shared_assignment_backward(matrix, *args, operand, matrix, needs)
    clamp_operators.clamped_activation(*args, operand)
    clamp_operators.clamped_activation_backward(matrix, *args, operand, needs)


def all_cases(full: bool) -> list[tuple[Any, ...]]:
    """(dtype, channels, queries, packed, masked, extras, the architectures to compile for)."""
    widths = [row.block_d for row in tuning.FORWARD.rows[0]]
    everything = (False, True)
    if full:
        dtypes = DTYPES.values()
        cases = itertools.product(
            dtypes, [10, *widths, 600, 8192], (None, 2, 3, 17), everything, everything, everything
        )
        return [(*case, ARCHS) for case in cases]
    # Every configuration once; the options, dtypes and architectures on a few of them.
    cases = [
        (torch.bfloat16, width, queries, True, False, False, (90,)) for width in widths for queries in (None, 2, 4)
    ]
    cases += [(dtype, 512, None, False, True, False, ARCHS) for dtype in (torch.bfloat16, torch.float32)]
    cases += [(torch.bfloat16, 512, 17, False, True, True, (80,)), (torch.bfloat16, 8192, 3, True, False, True, (90,))]
    cases += [
        (torch.float16, 600, None, False, False, True, (100,)),
        (torch.float64, 256, 2, False, False, False, (90,)),
    ]
    return [
        *cases,
        (torch.float32, 10, 2, True, False, False, (80,)),
        (torch.float32, 1024, 4, True, False, False, (100,)),
    ]


def shared_cases(full: bool) -> list[tuple[Any, ...]]:
    """(dtype, operand, rows, channels, features, extras, the architectures to compile for)."""
    large, small, odd = (2048, 256, 1024), (64, 128, 96), (100, 37, 75)
    if full:
        types = [*((dtype, 0) for dtype in DTYPES.values()), (torch.float32, 1), (torch.float32, 2)]
        cases = itertools.product(types, (large, small, odd), (False, True))
        return [(*kind, *size, extras, ARCHS) for kind, size, extras in cases]
    # Every configuration once, half types on all architectures: their products are compiled differently on each.
    return [
        (torch.bfloat16, 0, *large, True, (90,)),
        (torch.bfloat16, 0, *small, False, (100,)),
        (torch.float16, 0, *large, False, (80,)),
        (torch.float16, 0, *odd, False, (90,)),
        (torch.float32, 1, *large, False, (100,)),
        (torch.float32, 2, *small, False, (80,)),
        (torch.float32, 0, *odd, True, (90,)),
        (torch.float64, 0, *small, False, (80,)),
    ]


def all_launches(full: bool, archs: tuple[int, ...]) -> Iterator[tuple[Launch, int]]:
    seen = set()
    found = [(launches_of(lambda case=case: run_pools(*case)), wanted) for *case, wanted in all_cases(full)]
    found += [(shared_launches_of(lambda case=case: run_shared(*case)), wanted) for *case, wanted in shared_cases(full)]
    for launches, case_archs in found:
        for launch, arch in itertools.product(launches, case_archs):
            if arch in archs and (launch, arch) not in seen:
                seen.add((launch, arch))
                yield launch, arch


def compile_launch(launch: Launch, arch: int) -> Resources:
    kernel = KERNELS[launch.kernel]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attrs)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    use = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    flags = [
        f"{name}={int(value) if isinstance(value, int) else value}" for name, value in launch.constants if name.isupper()
    ]
    typed = ("x_ptr", "out_ptr", "weights_ptr", "partial_ptr", "input_ptr", "dz_ptr")
    types = {kind[1:] for name, kind in launch.signature if name in typed}
    config = " ".join([*sorted(types), *flags, f"warps={launch.num_warps}"])
    return Resources(launch.kernel, config, arch, use["REG"], use["STACK"] + use["LOCAL"], compiled.metadata.shared)


def measure(full: bool, archs: tuple[int, ...], jobs: int) -> list[Resources]:
    work = list(all_launches(full, archs))
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(compile_launch, *zip(*work, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every dtype, size and option, not one of each kind")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = measure(options.full, tuple(options.arch), options.jobs)
    for row in rows:
        print(
            f"{row.kernel:16} sm_{row.arch:<4} {row.registers:4} regs {row.spilled:5} spilled {row.shared:6} shared"
            f"  {row.config}  {row.problem and 'FAILS: ' + row.problem}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    failed = [row for row in rows if row.problem]
    print(f"{len(rows)} cubins, {len(failed)} with spills or too much shared memory")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
