"""What a GPU would take at best, from data sheets: `python -m benchmarks.roofline [--write | --check]`. Not measured.

A kernel lasts as long as the slowest of its traffic at BANDWIDTH of the memory's peak, its matrix products at PRODUCTS
of the tensor cores' dense bfloat16 peak, and its exponentials; kernels follow one another. --write puts the tables
into docs/performance.md, --check looks whether they are there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from . import loads as loads_under_way
from .shared_logits import SHAPES, shape_of
from .tables import PAGE

BANDWIDTH, PRODUCTS = 0.85, 0.6
# Per clock and multiprocessor: CUDA C++ Programming Guide, throughput of native arithmetic instructions.
EXPONENTIALS = 16

POOL = (16, 4096, 512)
PENALTIES = ("widest", "medium")


@dataclass(frozen=True)
class Chip:
    """As in NVIDIA's data sheets: bytes and (bfloat16, dense) operations per second."""

    name: str
    bandwidth: float
    products: float
    multiprocessors: int
    operations: int  # of tensor cores, per clock and multiprocessor

    @property
    def exponentials(self) -> float:
        return self.products / self.operations * EXPONENTIALS

    @property
    def under_way(self) -> float:
        """Bytes that a multiprocessor must have asked for at any time to use the whole bandwidth."""
        return self.bandwidth * loads_under_way.LATENCY / self.multiprocessors


CHIPS = (
    Chip("A100 80 GB (sm_80)", 2.04e12, 312e12, 108, 2048),
    Chip("H100 SXM (sm_90)", 3.35e12, 989e12, 132, 4096),
    Chip("B200 (sm_100)", 8.0e12, 2250e12, 148, 8192),
)


@dataclass(frozen=True)
class Kernel:
    """What one kernel does for all chunks of rows together, but for `weight`, which each chunk costs anew.

    Attributes:
        products: of all rows, channels and features.
        exponentials: per logit.
        logits, rows, weight: bytes read and written of tensors [N,F], [N,D] and [F,D], per element.
    """

    name: str
    products: int = 0
    exponentials: int = 0
    logits: int = 0
    rows: int = 0
    weight: int = 0


@dataclass(frozen=True)
class Path:
    """The penalty of bfloat16 rows: kernels in the order of their launches, and how many chunks a shape is cut into.

    Left out are small kernels that combine partial results, and the partial sums of products that are split.
    """

    name: str
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    chunks: Callable[[int, int], tuple[int, int]]  # of rows, features: forward, backward

    @property
    def products(self) -> int:
        return sum(kernel.products for kernel in (*self.forward, *self.backward))


def cuda_chunks(rows: int, features: int, budget: int = 32 << 20) -> tuple[int, int]:
    """SharedProblem::chunk_rows, without kept logits."""
    each = min(max(budget // (-(-features // 8) * 8 * 4), 1), 1 << 16)
    each = each // 128 * 128 if each >= 128 else each
    return (-(-rows // each),) * 2


def triton_chunks(rows: int, features: int) -> tuple[int, int]:
    """chunks_of, with the scratch of run_statistics and run_gradients."""
    from fusefeat.triton import _shared_penalty_tuning as tuning

    tile = tuning.LOGITS
    column_tiles = tuning.cdiv(features, tile.block_f)
    forward = 3 * 4 * column_tiles + features * 4 / tile.block_m
    backward = features * 4 / tile.block_m + 4 * column_tiles + features * 2
    counts = [len(tuning.chunks(rows, int(each), 0, tile.block_m, 0)) for each in (forward, backward)]
    return counts[0], counts[1]


# float32 logits pass through scratch.
_MULTIPLY = Kernel("multiply", products=1, logits=4, rows=2, weight=2)
CUDA = Path(
    "CUDA",
    (
        _MULTIPLY,
        Kernel("row_statistics", exponentials=1, logits=8),
        Kernel("column_statistics", exponentials=1, logits=4),
    ),
    (
        _MULTIPLY,
        Kernel("row_dots", exponentials=1, logits=4),
        Kernel("logit_gradient", exponentials=1, logits=8),
        _MULTIPLY,
        Kernel("multiply", products=1, logits=4, rows=2, weight=8),
    ),
    cuda_chunks,
)
# Logits are computed again by every kernel that wants them; their gradient passes through scratch in bfloat16.
TRITON = Path(
    "Triton",
    (
        Kernel("shared_row_statistics", products=1, exponentials=1, rows=2, weight=2),
        Kernel("shared_column_sums", products=1, exponentials=1, rows=2, weight=2),
    ),
    (
        Kernel("shared_row_dots", products=1, exponentials=1, rows=2, weight=2),
        Kernel("shared_grad_logits", products=1, exponentials=1, logits=2, rows=2, weight=2),
        Kernel("shared_grad_rows", products=1, logits=2, rows=2, weight=2),
        Kernel("shared_grad_weight", products=1, logits=2, rows=2, weight=8),
    ),
    triton_chunks,
)
# What no implementation can do without, by torch.mm on a whole matrix of logits.
_MM = Kernel("mm", products=1, logits=2, rows=2, weight=2)
BARE = Path("three bare products", (_MM,), (_MM, _MM), lambda rows, features: (1, 1))


def traffic(kernel: Kernel, sizes: tuple[int, int, int], chunks: int, cached: bool) -> int:
    """In bytes; cached: logits stay in the L2 cache."""
    rows, channels, features = sizes
    logits = 0 if cached else kernel.logits * rows * features
    return logits + kernel.rows * rows * channels + kernel.weight * features * channels * chunks


def _kernels(path: Path, sizes: tuple[int, int, int]) -> list[tuple[Kernel, int]]:
    """With their numbers of chunks."""
    forward, backward = path.chunks(sizes[0], sizes[2])
    return [(kernel, forward) for kernel in path.forward] + [(kernel, backward) for kernel in path.backward]


def seconds(path: Path, sizes: tuple[int, int, int], chip: Chip, cached: bool) -> float:
    rows, channels, features = sizes
    return sum(
        max(
            traffic(kernel, sizes, chunks, cached) / (chip.bandwidth * BANDWIDTH),
            kernel.products * 2 * rows * channels * features / (chip.products * PRODUCTS),
            kernel.exponentials * rows * features / chip.exponentials,
        )
        for kernel, chunks in _kernels(path, sizes)
    )


def _table(titles: list[str], aligned: str, rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (titles, *rows)]
    rule = "|" + "|".join({"l": "---", "r": "---:"}[side] for side in aligned) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def pools() -> str:
    elements = POOL[0] * POOL[1] * POOL[2]
    rows = []
    for chip in CHIPS:
        times = [
            elements * size * passes / (chip.bandwidth * BANDWIDTH) for size, passes in ((4, 1), (4, 2), (2, 1), (2, 2))
        ]
        cells = [f"{1e3 * time:.3f}" for time in times]
        rows.append([chip.name, f"{chip.bandwidth / 1e12:.2f}", *cells])
    titles = [f"{way} {dtype}, ms" for dtype in ("fp32", "bf16") for way in ("forward", "backward")]
    return _table(["chip", "bandwidth, TB/s (data sheet)", *titles], "l" + "r" * 5, rows)


def loads() -> str:
    needed = ["needed for the whole bandwidth", *(f"{chip.under_way / 1024:.0f}" for chip in CHIPS)]
    titles = ["KiB under way per multiprocessor: median (least)", *(chip.name for chip in CHIPS)]
    return _table(titles, "lrrr", [needed, *loads_under_way.rows()])


def _span(low: float, high: float, form: str) -> str:
    texts = [format(value, form) for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def penalties() -> str:
    rows = []
    for shape in PENALTIES:
        sizes = SHAPES[shape][1:]
        product = 2 * sizes[0] * sizes[1] * sizes[2]
        for path in (BARE, TRITON, CUDA):
            # The library's matrix of logits is no scratch that could stay in the cache.
            ways = (False, False) if path is BARE else (True, False)
            moved = [sum(traffic(k, sizes, n, cached) for k, n in _kernels(path, sizes)) / 1e9 for cached in ways]
            cells = []
            for chip in CHIPS:
                fast, slow = (seconds(path, sizes, chip, cached) for cached in ways)
                bare = seconds(BARE, sizes, chip, False)
                share = "" if path is BARE else f" ({_span(bare / slow * 100, bare / fast * 100, '.0f')} %)"
                cells.append(_span(1e3 * fast, 1e3 * slow, ".3f") + share)
            work = f"{path.products} = {path.products * product / 1e9:.0f} GFLOP"
            rows.append([f"`{shape_of(shape)}`", path.name, work, _span(*moved, ".2f"), *cells])
    return _table(["shape", "path", "products", "GB moved", *(f"{c.name}, ms" for c in CHIPS)], "lllrrrr", rows)


TABLES = {"loads": loads, "pools": pools, "penalties": penalties}
_BLOCK = re.compile(r"(<!-- roofline (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(page: str) -> str:
    return _BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found['name']]()}\n\n{found[3]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    what.add_argument("--check", action="store_true", help="fail when the page is not up to date")
    arguments = parser.parse_args()
    before = PAGE.read_text()
    if arguments.check and before != updated(before):
        print(f"{PAGE} is not up to date: run python -m benchmarks.roofline --write", file=sys.stderr)
        return 1
    if arguments.write:
        PAGE.write_text(updated(before))
    elif not arguments.check:
        print("\n\n".join(table() for table in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
