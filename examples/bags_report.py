"""What ``bags.py`` shows after training: where the attention went, and how long the pooling takes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import fusefeat
import torch
from fusefeat.backends import choose
from harness import Run, bounded_compile, interleaved, table
from matplotlib import colormaps, patches
from matplotlib import pyplot as plt
from matplotlib.figure import SubFigure
from plain_pools import PlainAttentionPool, PlainGatedPool, PlainSoftmaxPool
from torch import Tensor, nn

if TYPE_CHECKING:
    from bags import BagClassifier, Bags

Step = Callable[["BagClassifier", torch.optim.Optimizer, "Bags"], Tensor]

COLUMNS = 8
COMPILE_SECONDS = 45.0
HEAT = colormaps["YlOrRd"]
RIGHT, WRONG, NINE = "#1a7f37", "#b42318", "#1f5fbf"


def attention_picture(path: Path, bags: Bags, probabilities: Tensor, weights: Tensor) -> None:
    """One panel per bag: its digits, framed by the attention they got."""
    offsets = bags.cu_seqlens.tolist()
    rows = -(-int(bags.cu_seqlens.diff().max()) // COLUMNS)
    figure = plt.figure(figsize=(5.6 * len(bags.labels), 1.0 + 0.86 * rows), layout="constrained", facecolor="white")
    panels = figure.subfigures(1, len(bags.labels), squeeze=False, wspace=0.05)[0]
    for bag, panel in enumerate(panels):
        part = slice(offsets[bag], offsets[bag + 1])
        probability, label = float(probabilities[bag]), bool(bags.labels[bag])
        title = f"{'contains a 9' if label else 'no 9'} · predicted P(9) = {probability:.3f}"
        panel.suptitle(title, fontsize=13, fontweight="bold", color=RIGHT if (probability > 0.5) == label else WRONG)
        draw_bag(panel, bags.images[part].cpu(), bags.digits[part].cpu(), weights[part].cpu())
    figure.supxlabel("frame and number: attention · blue number: a 9 (training knows labels of bags only)", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_bag(panel: SubFigure, images: Tensor, digits: Tensor, weights: Tensor) -> None:
    rows = -(-len(images) // COLUMNS)
    axes = panel.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, digit, weight in zip(axes, images, digits.tolist(), weights.tolist(), strict=False):
        axis.imshow(image[0], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        # The square root keeps small attention visible.
        heat = weight**0.5
        frame = patches.Rectangle(
            (-0.5, -0.5), 8, 8, fill=False, clip_on=False, linewidth=1 + 4 * heat, edgecolor=HEAT(0.05 + 0.9 * heat)
        )
        axis.add_patch(frame)
        color = NINE if digit == 9 else "black" if weight >= 0.005 else "#999999"
        bold = "bold" if digit == 9 else "normal"
        axis.text(3.5, 8.0, f"{weight:.2f}", ha="center", va="top", fontsize=8, color=color, fontweight=bold)


def speed_table(run: Run, model: BagClassifier, bags: Bags, step: Step) -> tuple[str, dict[str, dict[str, float]]]:
    """Time the pooling (forward and backward) and the whole training step with ours and with plain PyTorch.

    Every row has the same weights, encoder, head and batch; only the pooling differs.
    """
    cu_seqlens = bags.cu_seqlens
    with torch.no_grad():
        tokens = model.encoder(bags.images)
    tokens.requires_grad_()

    def forward_backward(pool: nn.Module) -> None:
        tokens.grad = None
        pool.zero_grad()
        out = pool(tokens, cu_seqlens=cu_seqlens)
        out.backward(out.detach())

    pools: dict[str, nn.Module] = {"fusefeat": model.pool, **plain_pools(model.pool, cu_seqlens)}
    reasons = []
    if run.args.no_compile:
        reasons.append("torch.compile: left out (--no-compile or --smoke)")
    else:
        run.say("\nrunning torch.compile for the speed table")
        end = time.perf_counter() + COMPILE_SECONDS
        for name in [name for name in pools if name != "fusefeat"]:
            left = max(end - time.perf_counter(), 1.0)
            compiled = bounded_compile(copy.deepcopy(pools[name]), forward_backward, seconds=left)
            if isinstance(compiled, str):
                reasons.append(f"torch.compile of {name}: {compiled}")
            else:
                pools[f"torch.compile, {name.removeprefix('eager, ')}"] = compiled

    seconds = 0.2 if run.args.smoke else 4.0
    pooling = interleaved(
        {name: partial(forward_backward, pool) for name, pool in pools.items()}, run.device, seconds=seconds
    )
    whole = interleaved(
        {name: training_step(model, pool, bags, step) for name, pool in pools.items()}, run.device, seconds=seconds
    )
    ours = pooling["fusefeat"].median, whole["fusefeat"].median
    rows = []
    for name in pools:
        pool_ms, step_ms = pooling[name].median, whole[name].median
        rows.append(
            [name, f"{pool_ms:.2f}", f"{pool_ms / ours[0]:.1f}x", f"{step_ms:.2f}", f"{step_ms / ours[1]:.2f}x"]
        )
    header = ["pooling", "fwd+bwd ms", "vs ours", "train step ms", "vs ours"]
    caption = (
        f"{len(bags.labels)} bags, {len(bags.images)} digits, {tokens.shape[1]} channels on {run.device}, "
        f"{torch.get_num_threads()} threads; medians of {pooling['fusefeat'].rounds} and {whole['fusefeat'].rounds} "
        f"rounds; fusefeat's backend is {choose('softmax_pool', None, tokens)}, its pooling "
        f"{100 * ours[0] / ours[1]:.0f} % of the step"
    )
    text = "\n".join([caption, table(header, rows), *reasons])
    return text, {name: {"pooling": pooling[name].median, "step": whole[name].median} for name in pools}


def plain_pools(pool: nn.Module, cu_seqlens: Tensor) -> dict[str, nn.Module]:
    """The ways to write the same pooling, with the same weights, in plain PyTorch."""
    packed, padded = PlainSoftmaxPool(cu_seqlens, "packed"), PlainSoftmaxPool(cu_seqlens, "padded")
    if not isinstance(pool, fusefeat.AttentionPool):
        gate = pool.get_submodule("gate")
        return {"eager, packed": PlainGatedPool(gate, packed), "eager, padded": PlainGatedPool(gate, padded)}
    linears = pool.linear_in, pool.linear_out
    return {
        "eager, packed": PlainAttentionPool(*linears, packed, factorised=False),
        "eager, packed, factorised like ours": PlainAttentionPool(*linears, packed, factorised=True),
        "eager, padded": PlainAttentionPool(*linears, padded, factorised=False),
    }


def training_step(model: BagClassifier, pool: nn.Module, bags: Bags, step: Step) -> Callable[[], Tensor]:
    """A training step of a copy of the model in which the pooling is exchanged."""
    trained = copy.deepcopy(model)
    trained.pool = pool
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-6)
    return lambda: step(trained, optimizer, bags)
