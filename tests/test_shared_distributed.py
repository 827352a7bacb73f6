"""process_group: two gloo processes with unequal batches against one process on the joined batch."""

from __future__ import annotations

import os
from pathlib import Path

import fusefeat
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

# Rows per rank (input, context); one rank of the second pair has none at all.
BATCHES = (((7, 2), (3, 0)), ((5, 1), (0, 0)))
MARGIN = 0.8


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((12, 6), (9, 6), (9,), (9,))]
    return draw[0], draw[1], draw[2], draw[3].abs() / draw[3].abs().sum()


def rows_of(split: tuple[tuple[int, int], ...], rank: int) -> tuple[Tensor, Tensor | None, Tensor]:
    x = batch()[0]
    start = sum(sum(rows) for rows in split[:rank])
    inputs, contexts = split[rank]
    rows = x[start : start + inputs + contexts]
    row_weight = torch.arange(1, 13, dtype=torch.float64)[start : start + inputs + contexts]
    return rows[contexts:], rows[:contexts] if contexts else None, row_weight


def worker(rank: int, folder: str, split: tuple[tuple[int, int], ...], weighted: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    _, weight, bias, prior = batch()
    leaves = [t.requires_grad_() for t in (weight, bias, prior)]
    rows, context, row_weight = rows_of(split, rank)
    penalty, stats = fusefeat.shared_penalty(
        rows,
        context,
        weight,
        bias,
        margin=MARGIN,
        prior=prior,
        row_weight=row_weight if weighted else None,
        process_group=dist.group.WORLD,
        return_stats=True,
    )
    # A loss of the global statistics as well: the all-reduce must carry their gradients.
    loss = penalty + stats.marginal_entropy * 0.3 + (stats.mean_probs**2).sum()
    grads = torch.autograd.grad(loss, leaves)
    for grad in grads:  # what DDP does to parameter gradients
        dist.all_reduce(grad)
        grad /= 2
    torch.save((loss.detach(), stats.mean_probs.detach(), grads), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("split", BATCHES, ids=str)
def test_equals_one_process_on_the_joined_batch(
    tmp_path: Path, split: tuple[tuple[int, int], ...], weighted: bool
) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(worker, (str(tmp_path), split, weighted), nprocs=2)
    _, weight, bias, prior = batch()
    leaves = [t.requires_grad_() for t in (weight, bias, prior)]
    parts = [rows_of(split, rank) for rank in range(2)]
    rows = torch.cat([torch.cat([c, r]) if c is not None else r for r, c, _ in parts])
    row_weight = torch.cat([w for _, _, w in parts]) if weighted else None
    penalty, stats = fusefeat.shared_penalty(
        rows, None, weight, bias, margin=MARGIN, prior=prior, row_weight=row_weight, return_stats=True
    )
    loss = penalty + stats.marginal_entropy * 0.3 + (stats.mean_probs**2).sum()
    want = torch.autograd.grad(loss, leaves)
    for rank in range(2):
        got_loss, mean_probs, grads = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(got_loss, loss.detach())
        torch.testing.assert_close(mean_probs, stats.mean_probs.detach())
        for mine, truth in zip(grads, want, strict=True):
            torch.testing.assert_close(mine, truth)
