"""``AutoFeatureExtractor`` on (features, labels, context) triples, judged by a linear probe on what it extracts.

Half of the training digits have labels; the other half are context, seen without labels by the shared penalty
only. The extractor is trained under a linear classifier with and without its objective, and by its objective alone.

    python examples/extract_features.py
"""

from __future__ import annotations

from functools import partial

import torch
from fusefeat import AutoFeatureExtractor
from harness import Metrics, Run, compare, digit_splits, fit, loader, parser
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Model(nn.Module):
    """The extractor, and the linear classifier that trains it where labels are used."""

    def __init__(self, args: object, input_dim: int) -> None:
        super().__init__()
        num_features, margin, context_size = (getattr(args, name) for name in ("num_features", "margin", "batch_size"))
        self.extractor = AutoFeatureExtractor(input_dim, num_features, margin, context_size=context_size)
        self.head = nn.Linear(num_features, 10)


def triples(run: Run) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training, validation and test samples (features [64], label, context [64]), scaled as the training pixels are."""
    splits = [split.first(300 if run.args.smoke else None) for split in digit_splits(run.args.seed)]
    pixels = splits[0].images.flatten(1)
    mean, scale = pixels.mean(0), pixels.std(0) + 0.1
    parts = []
    for split in splits:
        rows, half = (split.images.flatten(1) - mean) / scale, len(split.images) // 2
        parts.append(TensorDataset(rows[:half], split.digits[:half], rows[half : 2 * half]))
    return parts[0], parts[1], parts[2]


def train(run: Run, with_labels: bool, weight: float) -> Metrics:
    """Fit with cross-entropy (if labels are used) plus ``weight`` times the extractor's objective, then probe."""
    args = run.args
    train_set, validation_set, test_set = triples(run)
    model = Model(args, train_set.tensors[0].shape[1]).to(run.device)
    optimizer = optim.Adam(model.parameters(), lr=args.lr)
    batches, held_out = loader(run, train_set, train=True), loader(run, validation_set, train=False)

    def loss_of(features: Tensor, labels: Tensor, context: Tensor) -> Tensor:
        with torch.no_grad():
            model.extractor(context)  # joins the queue that the next objective compares with
        shared = model.extractor(features)
        loss = weight * model.extractor.objective(reg_weight=args.reg_weight) if weight else shared.new_zeros(())
        return loss + F.cross_entropy(model.head(shared), labels) if with_labels else loss

    def train_epoch(epoch: int) -> Metrics:
        losses = []
        for batch in run.progress(batches, f"epoch {epoch}"):
            optimizer.zero_grad()
            loss = loss_of(*(tensor.to(run.device) for tensor in batch))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return {"train/loss": torch.stack(losses).mean().item()}

    def validate() -> Metrics:
        losses = [loss_of(*(tensor.to(run.device) for tensor in batch)) for batch in held_out]
        return {"validation/loss": torch.stack(losses).mean().item()}

    if with_labels or weight:
        fit(run, model, optimizer, train_epoch, validate, score="validation/loss", lower_is_better=True)
    return probe(run, model.extractor, train_set, test_set)


@torch.no_grad()
def probe(run: Run, extractor: AutoFeatureExtractor, train_set: TensorDataset, test_set: TensorDataset) -> Metrics:
    """Accuracy of a logistic regression on the extracted features, and how many different features there are.

    "in use" is the exponential of the entropy of the mean features; "alike" the mean absolute correlation between them.
    """
    extractor.eval()
    inputs, test = (extractor(part.tensors[0].to(run.device)).cpu() for part in (train_set, test_set))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    classifier.fit(inputs, train_set.tensors[1])
    mean = test.mean(0)
    used = test[:, test.std(0) > 1e-6]
    alike = torch.corrcoef(used.T).abs() - torch.eye(used.shape[1])
    return {
        "accuracy": float(classifier.score(test, test_set.tensors[1])),
        "in use": torch.special.entr(mean).sum().exp().item(),
        "alike": alike.mean().item(),
    }


def main() -> None:
    arguments = parser(
        "extract_features", "Features shared among samples, with and without labels.", epochs=40, batch_size=32, lr=0.01
    )
    arguments.add_argument("--num-features", type=int, default=32, help="shared features")
    arguments.add_argument(
        "--margin", type=float, default=1.0, help="inverse temperature, and where the regulariser sets in"
    )
    arguments.add_argument("--weight", type=float, default=0.1, help="of the objective beside the cross-entropy")
    arguments.add_argument("--reg-weight", type=float, default=0.1, help="of the regulariser in the objective")
    run = Run(arguments.parse_args())
    variants = {
        "labels, no penalty": partial(train, with_labels=True, weight=0.0),
        "labels and penalty": partial(train, with_labels=True, weight=run.args.weight),
        "penalty, no labels": partial(train, with_labels=False, weight=1.0),
        "not trained": partial(train, with_labels=False, weight=0.0),
    }
    compare(run, variants, score="accuracy", title=f"linear probe on {run.args.num_features} shared features")
    run.say(f"\ncurves, checkpoints and results are in {run.out}")


if __name__ == "__main__":
    main()
