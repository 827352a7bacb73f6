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


def _for_float64(rows: tuple[Config, ...]) -> tuple[Config, ...]:
    """Half the elements to a lane: half the tokens, and twice the warps where there may be as many."""
    wide = []
    for row in rows:
        tokens = max(row.block_t // 2, 1)
        if row.block_d < 256:
            wide.append(row._replace(block_t=tokens))
        elif row.num_warps <= 8:
            wide.append(row._replace(block_t=tokens, num_warps=2 * row.num_warps))
    return tuple(wide)


class Table:
    """Rows for one query, for two and for more; of those, the first that holds all channels serves, else the last."""

    def __init__(self, *rows: tuple[Config, ...]) -> None:
        self.rows = rows
        self.float64_rows = tuple(_for_float64(some) for some in rows)

    def pick(self, channels: int, queries: int, float64: bool) -> Config:
        rows = (self.float64_rows if float64 else self.rows)[min(queries, 3) - 1]
        return next((row for row in rows if channels <= row.block_d), rows[-1])


FORWARD = Table(
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
BACKWARD = Table(
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
