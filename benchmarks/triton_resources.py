"""Registers, spills, shared memory and occupancy of every Triton kernel, compiled ahead of time; needs no GPU.

The operators run and their launches are recorded, so what is compiled is what would be launched. Occupancy is
theoretical (occupancy.py): the warps that fit on a multiprocessor, in percent of its 64, and what keeps more from
fitting. "tmem" counts columns of tensor memory.

    python benchmarks/triton_resources.py [--each-arch | --full] [--arch 90 ...] [--jobs N]
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

import occupancy
import torch
import triton
from fusefeat.triton import _attention_pool_backward as backward_kernels
from fusefeat.triton import _attention_pool_forward as forward_kernels
from fusefeat.triton import _shared_penalty_backward as shared_backward_kernels
from fusefeat.triton import _shared_penalty_forward as shared_forward_kernels
from fusefeat.triton import _shared_penalty_products as shared_product_kernels
from fusefeat.triton import attention_pool as operators
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_launches import ARCHS, all_cases, run_pools, run_shared, shared_cases

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
    tensor_columns: int
    warps: int  # per block

    @property
    def occupancy(self) -> occupancy.Occupancy:
        threads = self.warps * occupancy.WARP
        return occupancy.occupancy(self.arch, threads, self.registers, self.shared, self.tensor_columns)

    @property
    def problem(self) -> str:
        if self.spilled > PARKED_LIMIT:
            return f"{self.spilled} bytes of local memory"
        return "" if self.occupancy.blocks else f"does not start: {', '.join(self.occupancy.limits)}"


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


def all_launches(full: bool, each_arch: bool, archs: tuple[int, ...]) -> Iterator[tuple[Launch, int]]:
    seen = set()
    found = [(launches_of(lambda case=case: run_pools(*case)), wanted) for *case, wanted in all_cases(full)]
    found += [(shared_launches_of(lambda case=case: run_shared(*case)), wanted) for *case, wanted in shared_cases(full)]
    for launches, case_archs in found:
        for launch, arch in itertools.product(launches, ARCHS if each_arch else case_archs):
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
        f"{name}={int(value) if isinstance(value, int) else value}"
        for name, value in launch.constants
        if name.isupper()
    ]
    typed = ("x_ptr", "out_ptr", "weights_ptr", "partial_ptr", "input_ptr", "dz_ptr")
    types = {kind[1:] for name, kind in launch.signature if name in typed}
    config = " ".join([*sorted(types), *flags, f"warps={launch.num_warps}"])
    return Resources(
        launch.kernel, config, arch, use["REG"], use["STACK"] + use["LOCAL"], compiled.metadata.shared,
        compiled.metadata.tmem_size or 0, launch.num_warps,
    )  # fmt: skip


def measure(full: bool, each_arch: bool, archs: tuple[int, ...], jobs: int) -> list[Resources]:
    work = list(all_launches(full, each_arch, archs))
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(compile_launch, *zip(*work, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every dtype, size and option, not one of each kind")
    parser.add_argument("--each-arch", action="store_true", help="each configuration for all architectures")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = measure(options.full, options.each_arch, tuple(options.arch), options.jobs)
    for row in rows:
        print(
            f"{row.kernel:22} sm_{row.arch:<4} {row.registers:4} regs {row.spilled:5} spilled {row.shared:6} shared"
            f" {row.tensor_columns:4} tmem  {row.occupancy!s:22}  {row.config}"
            f"  {row.problem and 'FAILS: ' + row.problem}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    failed = [row for row in rows if row.problem]
    print(f"{len(rows)} cubins, {len(failed)} with spills or beyond what can be launched")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
