"""Sizes at which 32-bit arithmetic would break, and ways of calling that break what is not reentrant."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusefeat
import pytest
import torch
from fusefeat import _library
from torch import Tensor

pytestmark = pytest.mark.skipif(not _library.STATE.cpu_loaded, reason=str(_library.STATE.cpu_reason))
scale = pytest.mark.scale


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@scale
def test_more_than_2_to_the_31_elements_in_a_bag() -> None:
    """A token past element 2^31 has the largest score: it alone must come out, and get the gradient."""
    tokens, channels = 2**31 // 512 + 7, 512
    x = torch.zeros(tokens, channels, dtype=torch.bfloat16)
    x[-1] = 1.0
    x.requires_grad_()
    query = torch.ones(channels, dtype=torch.bfloat16, requires_grad=True)
    out = fusefeat.attention_pool(x, query, cu_seqlens=torch.tensor([0, tokens]))
    assert torch.equal(out, torch.ones(1, channels, dtype=torch.bfloat16))
    out.sum().backward()
    grad = x.grad
    assert grad is not None and torch.equal(grad[-1], torch.ones(channels, dtype=torch.bfloat16))
    assert grad[: tokens - 1].count_nonzero() == 0


@scale
def test_more_than_2_to_the_31_elements_over_bags() -> None:
    """Expanded along the bags, so that only the result and the addresses are large."""
    channels, tokens = 2048, 3
    x = torch.randn(1, tokens, channels, dtype=torch.bfloat16).expand(2**31 // channels // tokens + 5, -1, -1)
    query = torch.randn(channels, dtype=torch.bfloat16)
    out = fusefeat.attention_pool(x, query, scale=channels**-0.5)
    assert x.numel() > 2**31 and torch.equal(out[-1], out[0]) and torch.equal(out[len(out) // 2], out[0])
    torch.testing.assert_close(
        out[:1], fusefeat.attention_pool(x[:1], query, scale=channels**-0.5, backend="reference")
    )


@scale
def test_more_than_2_to_the_31_logits() -> None:
    """N F > 2^31: equal to the same rows in parts."""
    rows, features = 2**31 // 65536 + 40, 65536
    x, weight = torch.randn(rows, 4), torch.randn(features, 4)
    total, stats = fusefeat.shared_penalty(x, None, weight, return_stats=True)
    parts = [fusefeat.shared_penalty(part, None, weight, return_stats=True)[1] for part in x.split(10_000)]
    torch.testing.assert_close(stats.row_entropy, torch.cat([part.row_entropy for part in parts]))
    shares = torch.tensor([len(part.row_entropy) / rows for part in parts])
    mean = sum(share * part.mean_probs for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(stats.mean_probs, mean)
    assert total.isfinite()
    args = x.bfloat16(), None, weight.bfloat16()
    assert torch.equal(fusefeat.shared_assignment(*args)[-1], fusefeat.shared_assignment(args[0][-1:], *args[1:])[0])


def test_a_million_bags() -> None:
    lengths = torch.randint(0, 4, (1_000_000,))
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    x = torch.randn(int(cu_seqlens[-1]), 4, requires_grad=True)
    scores = torch.randn(len(x), requires_grad=True)
    out = fusefeat.softmax_pool(x, scores, cu_seqlens=cu_seqlens)
    bag = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    weights = scores.detach().exp()
    total = torch.zeros(len(lengths)).index_add_(0, bag, weights)
    want = torch.zeros_like(out).index_add_(0, bag, (weights / total[bag])[:, None] * x.detach())
    torch.testing.assert_close(out.detach(), want, rtol=1e-4, atol=1e-5)
    grad_x = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(grad_x, (weights / total[bag])[:, None].expand_as(x), rtol=1e-4, atol=1e-5)


def test_a_bag_of_a_million_tokens_beside_one_of_three() -> None:
    x = torch.randn(1_000_003, 8, requires_grad=True)
    query = torch.randn(8, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1_000_000, 1_000_003])
    results = []
    for tensor, other, backend in ((x, query, None), (x.double(), query.double(), "reference")):
        out = fusefeat.attention_pool(tensor, other, cu_seqlens=cu_seqlens, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, query])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-4, atol=1e-6)


def work() -> list[Tensor]:
    """Both families, forward and backward, on fixed data."""
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(*s, generator=generator).requires_grad_() for s in ((4, 300, 24), (24,), (90, 24), (70, 24))]
    x, query, rows, weight = draw
    out = fusefeat.attention_pool(x, query)
    penalty, reg = fusefeat.shared_objective(rows, None, weight)
    return [out.detach(), penalty.detach(), *torch.autograd.grad(out.square().sum() + penalty + reg, draw)]


def same(results: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def test_eight_python_threads_at_once() -> None:
    want = work()
    wrong: list[Any] = []

    def many() -> None:
        try:
            wrong.extend(i for i in range(25) if not same(work(), want))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _report(queue: Any, want: list[Tensor]) -> None:
    torch.set_num_threads(1)  # as a DataLoader's worker does: OpenMP's threads do not survive a fork
    queue.put(same(work(), want))


def test_after_a_fork() -> None:
    want = work()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_report, args=(queue, want)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers == [True, True] and all(worker.exitcode == 0 for worker in workers)


class Pooled(torch.utils.data.Dataset):
    """Pools in the worker process."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return fusefeat.softmax_pool(torch.full((1, 50, 40), float(index)), torch.zeros(1, 50))[0]


def test_in_the_workers_of_a_data_loader() -> None:
    work()  # the parent's thread pool exists already
    loader = torch.utils.data.DataLoader(Pooled(), batch_size=4, num_workers=2)
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, torch.arange(8.0)[:, None].expand(8, 40))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def small_calls() -> dict[str, Callable[[], Any]]:
    x, query, rows, weight = (torch.randn(*s, requires_grad=True) for s in ((2, 6, 4), (4,), (8, 4), (9, 4)))
    offsets = torch.tensor([0, 5, 12])
    layer = fusefeat.AttentionPool(4, 3)

    def refused() -> None:
        with pytest.raises(ValueError, match="query"):
            fusefeat.attention_pool(x, query[:3])

    return {
        "attention_pool": lambda: fusefeat.attention_pool(x, query).sum().backward(),
        "packed": lambda: fusefeat.attention_pool(x.reshape(12, 4), query, cu_seqlens=offsets).sum().backward(),
        "layer": lambda: layer(x).sum().backward(),
        "shared_objective": lambda: sum(fusefeat.shared_objective(rows, None, weight)).backward(),
        "shared_assignment": lambda: fusefeat.shared_assignment(rows, rows, weight).sum().backward(),
        "refused": refused,
    }


def test_no_leak_over_ten_thousand_calls() -> None:
    calls = small_calls()

    def repeat(times: int) -> None:
        for _ in range(times):
            for call in calls.values():
                call()
        gc.collect()

    repeat(150)
    before = resident()
    repeat(10_000 // len(calls) + 1)
    grown = resident() - before
    assert grown < 6 * 2**20, f"{grown / 2**20:.1f} MiB"
