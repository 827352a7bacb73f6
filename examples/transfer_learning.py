"""Transfer learning with torchvision's AlexNet: features learned on half of the digits, used for the other half.

The convolutions are pretrained on digits 0 to 4, or read from a file (``--weights``); a new head on top of them
learns digits 5 to 9 from a few images each, with the convolutions frozen or fine-tuned. The head pools the cells of
the feature map by average, as torchvision's does, or by attention.

    python examples/transfer_learning.py
    python examples/transfer_learning.py --weights alexnet.pth    # a state_dict of torchvision.models.alexnet
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import fusefeat
import torch
from harness import (
    Metrics,
    Run,
    compare,
    digit_splits,
    few_per_class,
    fit_classifier,
    loader,
    parser,
    score_classifier,
    upscaled,
)
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset
from torchvision.models import alexnet

CHANNELS, CLASSES = 256, 5
FIRST_HALF, SECOND_HALF = range(5), range(5, 10)
Pooling = Literal["average", "attention"]


class AttentionHead(nn.Module):
    """Attention-pooled cells: [B,C,H,W] to [B,C]."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = fusefeat.AttentionPool(CHANNELS, CHANNELS)

    def forward(self, features: Tensor) -> Tensor:
        return self.pool(features.flatten(2).transpose(1, 2))


class Classifier(nn.Module):
    """AlexNet's convolutions, a pooling, dropout and a linear layer.

    The last max-pooling is left out: 3x3 cells remain of 64x64 pixels, which it would reduce to one.
    """

    def __init__(self, pooling: Pooling, grid: int, dropout: float) -> None:
        super().__init__()
        self.features = alexnet().features[:-1]
        self.pool: nn.Module
        if pooling == "attention":
            self.pool, cells = AttentionHead(), 1
        else:
            self.pool, cells = nn.Sequential(nn.AdaptiveAvgPool2d(grid), nn.Flatten()), grid * grid
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(CHANNELS * cells, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.features(images)))


def digits(run: Run, wanted: range, images_per_class: int | None) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Colour images of some digits; the training images limited to a number per class."""
    parts = []
    for number, split in enumerate(digit_splits(run.args.seed)):
        chosen = split.only(*wanted)
        few = 4 if run.args.smoke else images_per_class if number == 0 else None
        kept = slice(None) if few is None else few_per_class(chosen.digits, few)
        parts.append(TensorDataset(upscaled(chosen.images[kept], run.args.size), chosen.digits[kept]))
    return parts[0], parts[1], parts[2]


def train(
    run: Run, pooling: Pooling, weights: dict[str, Tensor] | None, frozen: bool, wanted: range, few: int | None
) -> Metrics:
    train_set, validation_set, test_set = digits(run, wanted, few)
    model = Classifier(pooling, run.args.grid, run.args.dropout)
    if weights is not None:
        model.features.load_state_dict(weights)
    model.features.requires_grad_(not frozen)
    model.to(run.device)
    new = [*model.pool.parameters(), *model.head.parameters()]
    groups = [{"params": new, "lr": run.args.head_lr}, {"params": list(model.features.parameters())}]
    optimizer = optim.Adam(groups, lr=run.args.lr)
    fit_classifier(run, model, optimizer, train_set, validation_set)
    return score_classifier(run, model, loader(run, test_set, train=False))


def features_of(path: Path) -> dict[str, Tensor]:
    """The convolutions' weights in a state_dict of AlexNet, or in a checkpoint of an example."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("model", state)
    return {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}


def pretrain(run: Run) -> dict[str, Tensor]:
    """Weights of the convolutions after training on all images of digits 0 to 4."""
    run.args.epochs = min(run.args.epochs, run.args.pretraining_epochs)
    metrics = train(run, "average", None, False, FIRST_HALF, None)
    run.say(f"pretraining, seed {run.args.seed}: test accuracy {metrics['accuracy']:.4f} on digits 0 to 4")
    return features_of(run.out / "best.pt")


def main() -> None:
    arguments = parser(
        "transfer_learning",
        "Transfer AlexNet from one half of the digits to the other.",
        epochs=12,
        batch_size=16,
        lr=5e-4,
    )
    arguments.add_argument("--weights", type=Path, help="state_dict of torchvision's AlexNet; default: pretrain here")
    arguments.add_argument("--pretraining-epochs", type=int, default=6, help="at most --epochs")
    arguments.add_argument("--few", type=int, default=20, help="training images per class of the second half")
    arguments.add_argument("--size", type=int, default=64, help="height and width of the images")
    arguments.add_argument("--grid", type=int, default=1, help="cells per side that average pooling keeps")
    arguments.add_argument("--head-lr", type=float, default=5e-3, help="learning rate of the new layers")
    arguments.add_argument("--dropout", type=float, default=0.5)
    run = Run(arguments.parse_args())
    given = features_of(run.args.weights) if run.args.weights else None
    pretrained = {}
    for seed in range(run.args.seed, run.args.seed + run.args.seeds):
        pretrained[seed] = given or pretrain(run.child(f"seed-{seed}", seed=seed).child("pretraining"))

    def transfer(part: Run, pooling: Pooling, frozen: bool) -> Metrics:
        return train(part, pooling, pretrained[part.args.seed], frozen, SECOND_HALF, run.args.few)

    variants = {}
    for pooling in ("average", "attention"):
        variants[f"frozen, {pooling} pooling"] = partial(transfer, pooling=pooling, frozen=True)
        variants[f"fine-tuned, {pooling} pooling"] = partial(transfer, pooling=pooling, frozen=False)
        variants[f"from scratch, {pooling} pooling"] = partial(
            train, pooling=pooling, weights=None, frozen=False, wanted=SECOND_HALF, few=run.args.few
        )
    compare(run, variants, score="accuracy", title=f"digits 5 to 9 from {run.args.few} images each")
    run.say(f"\ncurves, checkpoints and results are in {run.out}")


if __name__ == "__main__":
    main()
