"""The modules under DistributedDataParallel: two gloo processes against one that does what they should do together."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import fusefeat
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
RATE = 0.1
ROWS = (5, 2)


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(ROWS[rank], 3, generator=generator, dtype=torch.float64)


def make(name: str, process_group: Any = None) -> nn.Module:
    torch.manual_seed(0)
    double: dict[str, Any] = {"dtype": torch.float64}
    if name == "learning":
        return fusefeat.AutoLearningLayer(3, 6, RATE, scale=2.0, process_group=process_group, **double)
    if name == "extractor":
        return fusefeat.AutoFeatureExtractor(3, 6, 0.8, context_size=4, **double)
    return fusefeat.ShareableLoss(6, 0.8, 3, reduction=name, process_group=process_group, **double)


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group: Any = dist.group.WORLD
    found: dict[str, Any] = {}
    for name in ("mean", "sum"):
        ddp = DistributedDataParallel(make(name, group))
        loss = ddp(batch(0, rank))
        loss.backward()
        found[name] = loss.detach(), ddp.module.weight.grad
    ddp = DistributedDataParallel(make("extractor"))
    optimizer = torch.optim.SGD(ddp.parameters(), RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        features = ddp(batch(step, rank))
        (features.square().sum() + ddp.module.objective(process_group=group)).backward()
        optimizer.step()
    found["extractor"] = ddp.module.state_dict()
    layer = make("learning", group)
    assert copy.deepcopy(layer).process_group is group and copy.deepcopy(make("mean", group)).process_group is group
    for key, module in (("learning", layer), ("drifting", make("learning"))):
        ddp = DistributedDataParallel(module)
        for step in range(STEPS):
            outs = [ddp(batch(step, rank)), ddp(batch(step + 5, rank))]  # two forwards before one backward
            grads = torch.autograd.grad(outs[0].sum() + outs[1].sum(), list(module.parameters()))
        out = ddp(batch(9, rank))
        out.square().mean().backward()
        found[key] = module.state_dict(), [g.detach() for g in grads], module.net.weight.grad
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def local_gradients(layer: Any, x: Tensor) -> list[Tensor]:
    penalty, reg = fusefeat.shared_objective(x, None, layer.net.weight, layer.net.bias)
    return list(torch.autograd.grad(penalty + reg, list(layer.net.parameters())))


def test_replicas_agree_with_one_process(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    for name in ("mean", "sum"):
        module: Any = make(name)
        want = module(torch.cat([batch(0, 0), batch(0, 1)]))
        want.backward()
        for found in (first, second):
            torch.testing.assert_close(found[name], (want.detach(), module.weight.grad))

    # DDP hands out the queue of rank 0 before every forward; the parameters are the same everywhere.
    for key in ("linear.weight", "linear.bias"):
        assert torch.equal(first["extractor"][key], second["extractor"][key])
        assert not torch.equal(first["extractor"][key], make("extractor").state_dict()[key])
    rows = torch.cat([batch(step, 0) for step in range(STEPS)])
    assert torch.equal(first["extractor"]["queue"], rows[-4:])

    layer: Any = make("learning")
    for step in range(STEPS):
        for half in (0, 5):
            both = [local_gradients(layer, batch(step + half, rank)) for rank in range(2)]
            with torch.no_grad():
                for parameter, one, other in zip(layer.net.parameters(), *both, strict=True):
                    parameter -= RATE * (one + other) / 2
    both = [layer.eval()(batch(9, rank)).square().mean() for rank in range(2)]
    (want_grad,) = torch.autograd.grad((both[0] + both[1]) / 2, [layer.net.weight])
    layer.train()
    both = [local_gradients(layer, batch(9, rank)) for rank in range(2)]
    with torch.no_grad():
        for parameter, one, other in zip(layer.net.parameters(), *both, strict=True):
            parameter -= RATE * (one + other) / 2
    for found in (first, second):
        torch.testing.assert_close(dict(found["learning"][0]), dict(layer.state_dict()))
        torch.testing.assert_close(found["learning"][2], want_grad)
    assert torch.equal(first["learning"][0]["net.weight"], second["learning"][0]["net.weight"])
    assert not torch.equal(first["drifting"][0]["net.weight"], second["drifting"][0]["net.weight"])
