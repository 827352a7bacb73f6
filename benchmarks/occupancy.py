"""Theoretical occupancy: how many of the warps that a multiprocessor has room for a kernel can fill.

Limits are those of the CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". Registers
and shared memory are handed out as in cuda_occupancy.h of the CUDA toolkit (what the occupancy calculators use), to
which tests/test_occupancy.py holds this. Shared memory is taken to have as much of the L1 cache as it can.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS_PER_THREAD = 255
REGISTER_UNIT = 256  # of a warp's registers
PARTITIONS = 4  # of a multiprocessor, each with a quarter of its registers
SHARED_UNIT = 128
RESERVED = 1024  # bytes of shared memory that the driver takes of each block
DEFAULT_SHARED = 48 * 1024  # of a block that has not asked for more


@dataclass(frozen=True)
class Multiprocessor:
    shared: int  # bytes, of all blocks
    block_shared: int  # of one block that has asked for more than DEFAULT_SHARED
    tensor_columns: int = 0  # of tensor memory (PTX ISA, tcgen05): blocks wait until they get theirs
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    block_threads: int = 1024


ARCHS = {
    80: Multiprocessor(shared=164 * 1024, block_shared=163 * 1024),
    90: Multiprocessor(shared=228 * 1024, block_shared=227 * 1024),
    100: Multiprocessor(shared=228 * 1024, block_shared=227 * 1024, tensor_columns=512),
}


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    percent: float
    limits: tuple[str, ...]  # what allows no more blocks; nothing at 100 %

    def __str__(self) -> str:
        return f"{self.percent:.3g} %" + (f" ({' + '.join(self.limits)})" if self.limits else "")


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: int, threads: int, registers: int, shared: int, tensor_columns: int = 0) -> Occupancy:
    """Of blocks of `threads`, with so many registers per thread and bytes of shared memory, static and dynamic."""
    chip = ARCHS[arch]
    warps = _up(threads, WARP) // WARP
    per_warp = _up(registers * WARP, REGISTER_UNIT)
    per_block = _up(shared + RESERVED, SHARED_UNIT)
    fit = {
        "registers": chip.registers // PARTITIONS // per_warp * PARTITIONS // warps,
        "shared memory": chip.shared // per_block,
        "threads": chip.warps // warps,
        "blocks": chip.blocks,
    }
    if tensor_columns:
        fit["tensor memory"] = chip.tensor_columns // tensor_columns
    # The check before a launch counts registers as if every partition took as many warps.
    if registers > REGISTERS_PER_THREAD or per_warp * _up(warps, PARTITIONS) > chip.registers:
        fit["registers"] = 0
    if shared > chip.block_shared:
        fit["shared memory"] = 0
    if threads > chip.block_threads:
        fit["threads"] = 0
    blocks = min(fit.values())
    limits = tuple(name for name, count in fit.items() if count == blocks)
    return Occupancy(blocks, 100 * blocks * warps / chip.warps, () if blocks * warps == chip.warps else limits)
