"""Training and scoring of classifiers, on top of the epoch loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from .run import Run
from .training import Metrics, fit

# (model, inputs, labels, whatever else a batch holds) -> (loss, class scores)
Objective = Callable[..., tuple[Tensor, Tensor]]


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    scores = model(inputs)
    return F.cross_entropy(scores, labels), scores


def loader(run: Run, data: Dataset[Any], *, train: bool) -> DataLoader[Any]:
    return DataLoader(data, batch_size=run.args.batch_size if train else 256, shuffle=train)


def fit_classifier(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Dataset[Any],
    validation: Dataset[Any],
    objective: Objective = cross_entropy,
) -> Metrics:
    """``fit`` a classifier and leave the weights of the epoch with the best validation accuracy in it.

    Args:
        train, validation: samples (input, label, ...).
        objective: the loss of a training batch and the class scores its accuracy is taken from.
    """
    batches = loader(run, train, train=True)
    held_out = loader(run, validation, train=False)

    def train_epoch(epoch: int) -> Metrics:
        losses, right, seen = 0.0, 0, 0
        for batch in run.progress(batches, f"epoch {epoch}"):
            inputs, labels, *others = (tensor.to(run.device) for tensor in batch)
            optimizer.zero_grad()
            loss, scores = objective(model, inputs, labels, *others)
            loss.backward()
            optimizer.step()
            losses += loss.item() * len(labels)
            right += int((scores.argmax(1) == labels).sum())
            seen += len(labels)
        return {"train/loss": losses / seen, "train/accuracy": right / seen}

    def validate() -> Metrics:
        return {f"validation/{name}": value for name, value in score_classifier(run, model, held_out).items()}

    return fit(run, model, optimizer, train_epoch, validate, score="validation/accuracy")


@torch.no_grad()
def score_classifier(run: Run, model: nn.Module, batches: DataLoader[Any]) -> Metrics:
    """Mean cross-entropy and accuracy."""
    model.eval()
    losses, right, seen = 0.0, 0, 0
    for inputs, labels, *_ in batches:
        scores, labels = model(inputs.to(run.device)), labels.to(run.device)
        losses += F.cross_entropy(scores, labels, reduction="sum").item()
        right += int((scores.argmax(1) == labels).sum())
        seen += len(labels)
    return {"loss": losses / seen, "accuracy": right / seen}
