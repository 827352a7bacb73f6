"""An autoencoder that flags digits it has never seen, with and without the shared penalty on its code.

It learns to reconstruct nine digits; images of the tenth are anomalies. An image counts as one when its
reconstruction error exceeds the 95th percentile of the errors on validation images of known digits.

    python examples/autoencoder.py
    python examples/autoencoder.py --held-out 0 1 2 3 4 5 6 7 8 9    # averages over all choices
"""

from __future__ import annotations

import statistics
from functools import partial

import fusefeat
import torch
from harness import Metrics, Run, compare, digit_splits, fit, loader, parser
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Autoencoder(nn.Module):
    """Two linear layers down, two up, each half or twice as wide as the one before."""

    def __init__(self, pixels: int, num_features: int) -> None:
        super().__init__()
        half, code = pixels // 2, pixels // 4
        self.encoder = nn.Sequential(nn.Linear(pixels, half), nn.ReLU(), nn.Linear(half, code))
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(code, half), nn.ReLU(), nn.Linear(half, pixels))
        self.shared = fusefeat.ShareableLoss(num_features, in_features=code)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(images)
        return self.decoder(code), code

    def errors(self, images: Tensor) -> Tensor:
        """The mean squared error of every image."""
        return (self(images)[0] - images).square().mean(1)


def train_without(run: Run, held_out: int, weight: float) -> Metrics:
    """Train on all digits but one, then look for that one among the test images."""
    splits = [split.first(300 if run.args.smoke else None) for split in digit_splits(run.args.seed)]
    train_set, validation_set = (TensorDataset(s.images.flatten(1)[s.digits != held_out]) for s in splits[:2])
    validation = validation_set.tensors[0].to(run.device)
    model = Autoencoder(train_set.tensors[0].shape[1], run.args.num_features).to(run.device)
    optimizer = optim.Adam(model.parameters(), lr=run.args.lr)
    batches = loader(run, train_set, train=True)

    def train_epoch(epoch: int) -> Metrics:
        losses = []
        for (images,) in run.progress(batches, f"epoch {epoch}"):
            images = images.to(run.device)
            optimizer.zero_grad()
            output, code = model(images)
            error = F.mse_loss(output, images)
            (error + weight * model.shared(code) if weight else error).backward()
            optimizer.step()
            losses.append(error.detach())
        return {"train/error": torch.stack(losses).mean().item()}

    def validate() -> Metrics:
        return {"validation/error": model.errors(validation).mean().item()}

    fit(run, model, optimizer, train_epoch, validate, score="validation/error", lower_is_better=True)
    with torch.no_grad():
        threshold = model.errors(validation).quantile(0.95)
        errors = model.errors(splits[2].images.flatten(1).to(run.device))
    strange = (splits[2].digits == held_out).numpy()
    return {
        "error": errors.cpu()[~strange].mean().item(),
        "F-score": float(f1_score(strange, (errors > threshold).cpu())),
        "AUC": float(roc_auc_score(strange, errors.cpu())),
    }


def train(run: Run, weight: float) -> Metrics:
    parts = [train_without(run.child(f"without-{digit}"), digit, weight) for digit in run.args.held_out]
    return {name: statistics.fmean(part[name] for part in parts) for name in parts[0]}


def main() -> None:
    arguments = parser("autoencoder", "Find digits that were not trained on.", epochs=40, batch_size=32, lr=2e-3)
    arguments.add_argument("--held-out", type=int, nargs="+", default=[9], help="digits, each held out in turn")
    arguments.add_argument("--num-features", type=int, default=32, help="shared features of the penalty")
    arguments.add_argument("--weight", type=float, default=0.01, help="of the shared penalty in the loss")
    run = Run(arguments.parse_args())
    variants = {
        "reconstruction error": partial(train, weight=0.0),
        "+ shared penalty": partial(train, weight=run.args.weight),
    }
    digits = ", ".join(map(str, run.args.held_out))
    compare(run, variants, score="F-score", title=f"anomaly detection, held out: {digits}")
    run.say(f"\ncurves, checkpoints and results are in {run.out}")


if __name__ == "__main__":
    main()
