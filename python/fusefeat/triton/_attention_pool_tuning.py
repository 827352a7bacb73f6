"""Launch configurations of the pools: a written table, chosen by shape and dtype alone, so that results repeat.

The channels of a token are spread over all lanes of a program, so that only scores cross lanes. Rows keep what a lane
holds (token tile, and per query a vector, a gradient and a sum) well inside its registers, and 2 to 8 KB of tokens
under way per warp. benchmarks/triton_resources.py shows the outcome.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Channels, queries and tokens of one tile, and the warps that share it."""

    block_d: int
    block_k: int
    block_t: int
    num_warps: int


# For 1, 2 and more queries; the first row that holds all channels serves, else the last.
FORWARD = (
    (
        Config(16, 1, 32, 1),
        Config(32, 1, 32, 1),
        Config(64, 1, 16, 1),
        Config(128, 1, 16, 1),
        Config(256, 1, 8, 1),
        Config(512, 1, 4, 1),
        Config(1024, 1, 4, 2),
        Config(2048, 1, 4, 4),
        Config(4096, 1, 4, 8),
    ),
    (
        Config(16, 2, 32, 1),
        Config(32, 2, 16, 1),
        Config(64, 2, 8, 1),
        Config(128, 2, 8, 1),
        Config(256, 2, 4, 1),
        Config(512, 2, 4, 2),
        Config(1024, 2, 2, 4),
        Config(2048, 2, 2, 8),
        Config(4096, 2, 2, 16),
    ),
    (
        Config(16, 4, 8, 1),
        Config(32, 4, 8, 1),
        Config(64, 4, 4, 1),
        Config(128, 4, 4, 1),
        Config(256, 4, 2, 1),
        Config(512, 4, 2, 2),
        Config(1024, 4, 2, 4),
        Config(2048, 4, 2, 8),
        Config(4096, 2, 2, 16),
    ),
)
BACKWARD = (
    (
        Config(16, 1, 32, 1),
        Config(32, 1, 32, 1),
        Config(64, 1, 16, 1),
        Config(128, 1, 8, 1),
        Config(256, 1, 4, 1),
        Config(512, 1, 4, 1),
        Config(1024, 1, 4, 2),
        Config(2048, 1, 4, 4),
        Config(4096, 1, 4, 8),
    ),
    (
        Config(16, 2, 16, 1),
        Config(32, 2, 16, 1),
        Config(64, 2, 8, 1),
        Config(128, 2, 4, 1),
        Config(256, 2, 4, 1),
        Config(512, 2, 2, 2),
        Config(1024, 2, 2, 4),
        Config(2048, 2, 2, 8),
        Config(4096, 2, 1, 16),
    ),
    (
        Config(16, 4, 8, 1),
        Config(32, 4, 4, 1),
        Config(64, 4, 4, 2),
        Config(128, 4, 2, 1),
        Config(256, 4, 1, 2),
        Config(512, 4, 1, 4),
        Config(1024, 4, 1, 8),
        Config(2048, 2, 1, 8),
        Config(4096, 2, 1, 16),
    ),
)
Table = tuple[tuple[Config, ...], ...]


def _for_float64(rows: tuple[Config, ...]) -> tuple[Config, ...]:
    """Half the elements to a lane: half the tokens, then as many more warps as there may be."""
    wide = []
    for row in rows:
        tokens = max(row.block_t // 2, 1)
        if row.block_d < 256:
            wide.append(row._replace(block_t=tokens))
        elif row.num_warps <= 8:
            wide.append(row._replace(block_t=tokens, num_warps=2 * row.num_warps))
    return tuple(wide)


FLOAT64 = {table: tuple(_for_float64(rows) for rows in table) for table in (FORWARD, BACKWARD)}


def pick(table: Table, channels: int, queries: int, float64: bool) -> Config:
    rows = (FLOAT64[table] if float64 else table)[min(queries, 3) - 1]
    return next((row for row in rows if channels <= row.block_d), rows[-1])
