"""Attention-based multiple-instance learning on real handwritten digits.

A bag holds 8 to 128 digits and one label: does it contain a 9? Nobody tells the model which digit decides; the
attention of the pooling finds it. Bags are packed, one after another, with ``cu_seqlens``. Digits of the
training, validation and test bags come from disjoint sets of images.

    python examples/bags.py                    # fusefeat.AttentionPool
    python examples/bags.py --pooling gated    # gated attention: any score network + fusefeat.softmax_pool
    python examples/bags.py --compare          # both, and the mean and the maximum of the bag
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import fusefeat
import torch
from bags_report import attention_picture, speed_table
from harness import Metrics, Run, compare, digit_splits, fit, parser
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, HIDDEN = 512, 128
SMALLEST, LARGEST, MOST_NINES = 8, 128, 4
REQUIRED_AUC = 0.95
Pooling = Literal["attention", "gated", "mean", "max"]


@dataclass(frozen=True)
class Bags:
    """Packed bags: ``images[cu_seqlens[b]:cu_seqlens[b + 1]]`` are bag b."""

    images: Tensor
    digits: Tensor
    cu_seqlens: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Bags:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


class Digits:
    """One split of the images, from which bags are drawn."""

    def __init__(self, images: Tensor, digits: Tensor) -> None:
        self.images, self.digits = images, digits
        self.nines = (digits == 9).nonzero().squeeze(1)
        self.others = (digits != 9).nonzero().squeeze(1)

    def draw(self, sizes: Sequence[int]) -> Bags:
        """Bags of the given sizes; every second one holds 1 to 4 nines, the rest none."""
        chosen = []
        for number, size in enumerate(sizes):
            nines = int(torch.randint(1, MOST_NINES + 1, ())) if number % 2 else 0
            bag = torch.cat([pick(self.nines, nines), pick(self.others, size - nines)])
            chosen.append(bag[torch.randperm(size)])
        index = torch.cat(chosen)
        cu_seqlens = torch.tensor([0, *sizes]).cumsum(0)
        labels = (torch.arange(len(sizes)) % 2).float()
        return Bags(self.images[index], self.digits[index], cu_seqlens, labels)

    def batches(self, count: int, batch_size: int) -> list[Bags]:
        sizes = torch.randint(SMALLEST, LARGEST + 1, (count, batch_size))
        return [self.draw(row) for row in sizes.tolist()]


def pick(pool: Tensor, count: int) -> Tensor:
    return pool[torch.randint(len(pool), (count,))]


def load_splits(seed: int) -> tuple[Digits, Digits, Digits]:
    """Training, validation and test images."""
    train, validation, test = (Digits(*split) for split in digit_splits(seed))
    return train, validation, test


class Gate(nn.Module):
    """The scores of gated attention: w . (tanh(V x) * sigmoid(U x))."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.tanh_part = nn.Linear(channels, hidden)
        self.gate_part = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.tanh_part(x).tanh() * self.gate_part(x).sigmoid()).squeeze(-1)


class GatedPool(nn.Module):
    """Scores from plain layers, then ``fusefeat.softmax_pool``."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate = Gate(channels, hidden)

    def forward(self, x: Tensor, cu_seqlens: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        return fusefeat.softmax_pool(x, self.gate(x), cu_seqlens=cu_seqlens, return_weights=return_weights)


class PlainPool(nn.Module):
    """The mean or the maximum over the tokens of a bag."""

    def __init__(self, reduction: Literal["mean", "max"]) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return torch.segment_reduce(x, self.reduction, offsets=cu_seqlens, axis=0)


class BagClassifier(nn.Module):
    """A small CNN describes each digit, the pooling describes the bag, a linear layer decides."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, CHANNELS // 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.pool: nn.Module
        if pooling == "attention":
            self.pool = fusefeat.AttentionPool(CHANNELS, HIDDEN)
            self.head = nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, 1))
        else:
            self.pool = GatedPool(CHANNELS, HIDDEN) if pooling == "gated" else PlainPool(pooling)
            self.head = nn.Sequential(nn.Linear(CHANNELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, bags: Bags) -> Tensor:
        return self.head(self.pool(self.encoder(bags.images), cu_seqlens=bags.cu_seqlens)).squeeze(-1)

    def explain(self, bags: Bags) -> tuple[Tensor, Tensor]:
        """The probability that each bag contains a 9, and the attention that each digit got."""
        pooled, weights = self.pool(self.encoder(bags.images), cu_seqlens=bags.cu_seqlens, return_weights=True)
        return self.head(pooled).squeeze(-1).sigmoid(), weights


def evaluate(model: BagClassifier, batches: list[Bags]) -> Metrics:
    logits = torch.cat([model(bags) for bags in batches])
    labels = torch.cat([bags.labels for bags in batches])
    return {
        "loss": F.binary_cross_entropy_with_logits(logits, labels).item(),
        "accuracy": ((logits > 0) == labels.bool()).float().mean().item(),
        "auc": float(roc_auc_score(labels.cpu(), logits.cpu())),
    }


def train(run: Run, pooling: Pooling) -> tuple[BagClassifier, Metrics, Metrics]:
    """The trained model, the metrics of its best epoch, and those on test bags."""
    args = run.args
    train, validation, test = load_splits(args.seed)
    held_out = 2 if args.smoke else 16
    validation_batches = [bags.to(run.device) for bags in validation.batches(held_out, args.batch_size)]
    test_batches = [bags.to(run.device) for bags in test.batches(held_out, args.batch_size)]
    model = BagClassifier(pooling).to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    def train_epoch(epoch: int) -> Metrics:
        losses = []
        for bags in run.progress(train.batches(args.steps, args.batch_size), f"epoch {epoch}"):
            losses.append(step(model, optimizer, bags.to(run.device)))
        return {"train/loss": torch.stack(losses).mean().item()}

    def validate() -> Metrics:
        return {f"validation/{name}": value for name, value in evaluate(model, validation_batches).items()}

    best = fit(run, model, optimizer, train_epoch, validate, score="validation/auc")
    with torch.no_grad():
        return model, best, evaluate(model, test_batches)


def step(model: BagClassifier, optimizer: torch.optim.Optimizer, bags: Bags) -> Tensor:
    optimizer.zero_grad()
    loss = F.binary_cross_entropy_with_logits(model(bags), bags.labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def main() -> None:
    arguments = parser(
        "bags", "Find the bags of handwritten digits that contain a 9.", epochs=12, batch_size=32, lr=1e-3
    )
    arguments.add_argument("--pooling", choices=("attention", "gated"), default="attention")
    arguments.add_argument(
        "--compare", action="store_true", help="accuracy of all poolings, instead of picture and speed"
    )
    arguments.add_argument("--steps", type=int, default=50, help="batches of new bags per epoch")
    arguments.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the speed table")
    run = Run(arguments.parse_args())
    if run.args.smoke:
        run.args.steps, run.args.batch_size, run.args.no_compile = 4, 8, True
    if run.args.compare:
        poolings: tuple[Pooling, ...] = ("mean", "max", "attention", "gated")
        variants: dict[str, partial[Metrics]] = {pooling: partial(accuracy_of, pooling=pooling) for pooling in poolings}
        compare(run, variants, score="auc", title="does the bag contain a 9?")
    else:
        demonstrate(run)


def accuracy_of(run: Run, pooling: Pooling) -> Metrics:
    return train(run, pooling)[2]


def demonstrate(run: Run) -> None:
    """Train with one pooling, show where the attention went and how long it takes."""
    args = run.args
    run.say(f"{args.pooling} pooling on {run.device}, {torch.get_num_threads()} threads")
    start = time.perf_counter()
    model, best, results = train(run, args.pooling)
    seconds = time.perf_counter() - start
    splits = load_splits(args.seed)
    shown = splits[2].draw([32, 32]).to(run.device)
    with torch.no_grad():
        probabilities, weights = model.explain(shown)
    attention_picture(run.out / "attention.png", shown, probabilities, weights)
    run.say(f"\ntrained in {seconds:.0f} s, best epoch {best['epoch']:.0f}")
    run.say(f"test accuracy {results['accuracy']:.4f}  test AUC {results['auc']:.4f}")

    timed = splits[0].batches(1, args.batch_size)[0].to(run.device)
    text, speed = speed_table(run, copy.deepcopy(model), timed, step)
    run.say(f"\n{text}")
    run.save_results({"test": results, "best": best, "milliseconds": speed})
    run.say(f"\ncurves, checkpoints and the picture attention.png are in {run.out}")
    run.require("test AUC", results["auc"], REQUIRED_AUC)


if __name__ == "__main__":
    main()
