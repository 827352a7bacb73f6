"""Tiles, splits and chunks of the shared-logits family: chosen by shape and dtype alone, so that results repeat."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusefeat.triton._launch import INTERPRETED

# Scratch of one call, in bytes; with the logits that a forward may leave for its backward it stays below 64 MiB.
SCRATCH_BYTES = 48 * 2**20
LEAST_SCRATCH_BYTES = 16 * 2**20
# What the parts of a split sum may add to that.
PARTS_BYTES = 8 * 2**20
# Programs that fill a chip, and the shortest part of a sum worth a program of its own.
PROGRAMS = 256
LEAST_PART = 512


class Tile(NamedTuple):
    """Rows, features and channels of one tile, the warps that share it, and its loads under way."""

    block_m: int
    block_f: int
    block_d: int
    num_warps: int
    num_stages: int


# Tiles of logits from products that the kernel computes itself, where they make enough programs, and where not.
LOGITS = Tile(128, 128, 64, 8, 3)
FEW_LOGITS = Tile(64, 64, 64, 4, 3)
# The same for operands that lie in memory as float32. The small one also serves operands that cannot be loaded 16
# bytes at a time: every element then costs registers for an address of its own.
SHORT_LOGITS = Tile(128, 128, 32, 8, 3)
SHORT_FEW_LOGITS = Tile(64, 64, 32, 4, 3)
# Tiles of logits that are there already.
RAW = Tile(16, 128, 16, 4, 1)
RAW_FLOAT64 = Tile(16, 128, 16, 4, 1)

# Products with dz: with the weight (summed over block_f) and with the rows (summed over block_m).
GRAD_ROWS = Tile(128, 64, 128, 8, 3)
FEW_GRAD_ROWS = Tile(64, 64, 64, 4, 3)
GRAD_WEIGHT = Tile(64, 128, 128, 8, 3)
FEW_GRAD_WEIGHT = Tile(64, 64, 64, 4, 3)
# Likewise, for dz in float32 too.
SHORT_GRAD_ROWS = Tile(128, 32, 128, 8, 3)
SHORT_FEW_GRAD_ROWS = Tile(64, 32, 64, 4, 3)
SHORT_GRAD_WEIGHT = Tile(32, 128, 128, 8, 3)
SHORT_FEW_GRAD_WEIGHT = Tile(32, 64, 64, 4, 3)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _interpreted(rows: int, features: int) -> Tile:
    """An interpreted program costs nearly the same whatever its tile."""
    return Tile(64 if rows <= 256 else 256, 128 if features <= 512 else 512, 64, 1, 1)


def _choose(programs: int, tile: Tile, few: Tile) -> Tile:
    return tile if programs >= PROGRAMS // 2 else few


def raw_tile(rows: int, features: int, acc: torch.dtype) -> Tile:
    """For logits whose products lie in memory."""
    if INTERPRETED:
        return _interpreted(rows, features)
    return RAW_FLOAT64 if acc == torch.float64 else RAW


def logits_tile(rows: int, features: int, short: bool, aligned: bool) -> Tile:
    """For logits whose products are computed on the way."""
    if INTERPRETED:
        return _interpreted(rows, features)
    if not aligned:
        return SHORT_FEW_LOGITS
    tile, few = (SHORT_LOGITS, SHORT_FEW_LOGITS) if short else (LOGITS, FEW_LOGITS)
    return _choose(cdiv(rows, tile.block_m) * cdiv(features, tile.block_f), tile, few)


def grad_rows_tile(rows: int, channels: int, features: int, short: bool, aligned: bool) -> Tile:
    if INTERPRETED:
        return _interpreted(rows, features)
    if not aligned:
        return SHORT_FEW_GRAD_ROWS
    tile, few = (SHORT_GRAD_ROWS, SHORT_FEW_GRAD_ROWS) if short else (GRAD_ROWS, FEW_GRAD_ROWS)
    programs = cdiv(rows, tile.block_m) * cdiv(channels, tile.block_d)
    # Where features abound, splits make up for few tiles.
    return _choose(programs * cdiv(features, LEAST_PART), tile, few)


def grad_weight_tile(rows: int, channels: int, features: int, short: bool, aligned: bool) -> Tile:
    if INTERPRETED:
        return _interpreted(rows, features)
    if not aligned:
        return SHORT_FEW_GRAD_WEIGHT
    tile, few = (SHORT_GRAD_WEIGHT, SHORT_FEW_GRAD_WEIGHT) if short else (GRAD_WEIGHT, FEW_GRAD_WEIGHT)
    programs = cdiv(features, tile.block_f) * cdiv(channels, tile.block_d)
    return _choose(programs * cdiv(rows, LEAST_PART), tile, few)


def splits(programs: int, length: int, part_bytes: int) -> int:
    """Into how many parts a sum of `length` terms is cut, when each result set takes `part_bytes`."""
    wanted = min(cdiv(PROGRAMS, max(programs, 1)), cdiv(length, LEAST_PART))
    return max(1, min(wanted, PARTS_BYTES // max(part_bytes, 1)))


def chunks(rows: int, row_bytes: int, kept_bytes: int, block: int, cut: int) -> list[tuple[int, int]]:
    """Ranges of rows whose scratch fits its bound, none of which has row `cut` inside."""
    budget = max(SCRATCH_BYTES - kept_bytes, LEAST_SCRATCH_BYTES)
    most = max(1, budget // max(row_bytes, 1))
    found = []
    for begin, end in ((0, cut), (cut, rows)):
        count = end - begin
        if count == 0:
            continue
        size = cdiv(count, cdiv(count, most))
        if most >= block:
            size = min(cdiv(size, block) * block, most // block * block)
        found += [(at, min(at + size, end)) for at in range(begin, end, size)]
    return found
