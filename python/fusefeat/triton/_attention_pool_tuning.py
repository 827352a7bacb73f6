"""Launch configurations of the pools: a written table, chosen by shape and dtype alone, so that results repeat."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tokens, queries and channels of one tile, and the warps that share it."""

    block_t: int
    block_k: int
    block_d: int
    num_warps: int


# Queries of one program, from the number of queries there are.
QUERY_BLOCKS = {1: 1, 2: 2}
MANY_QUERIES = 4

# (block_d, num_warps, tokens per tile for 1, 2 and 4 queries). The channels of a token are spread over all lanes, so
# that only scores cross lanes, and there are 8 or 16 channels to a lane: registers for the token, for each query's
# vector and sum, and still many loads under way.
FORWARD = (
    (16, 1, (32, 32, 16)),
    (32, 1, (32, 32, 16)),
    (64, 1, (16, 16, 8)),
    (128, 1, (16, 8, 4)),
    (256, 1, (8, 4, 4)),
    (512, 1, (4, 4, 2)),
    (1024, 2, (4, 4, 2)),
    (2048, 4, (4, 4, 2)),
    (4096, 8, (4, 4, 2)),
)
BACKWARD = (
    (16, 1, (32, 32, 16)),
    (32, 1, (32, 16, 8)),
    (64, 1, (16, 8, 4)),
    (128, 1, (8, 4, 4)),
    (256, 1, (4, 4, 2)),
    (512, 1, (4, 2, 1)),
    (1024, 2, (4, 2, 1)),
    (2048, 4, (4, 2, 1)),
    (4096, 8, (4, 2, 1)),
)


def query_block(queries: int) -> int:
    return QUERY_BLOCKS.get(queries, MANY_QUERIES)


def pick(table: tuple[tuple[int, int, tuple[int, int, int]], ...], channels: int, queries: int, wide: bool) -> Config:
    """The first row that holds all channels, else the last. `wide` is float64: twice the warps, half the tokens."""
    block_d, warps, tokens = next((row for row in table if channels <= row[0]), table[-1])
    block_k = query_block(queries)
    block_t = tokens[{1: 0, 2: 1, 4: 2}[block_k]]
    if wide:
        warps, block_t = (min(2 * warps, 16), block_t) if block_d >= 256 else (warps, max(block_t // 2, 1))
    return Config(block_t, block_k, block_d, warps)
