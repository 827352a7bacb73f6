"""A CNN on a folder of images, with and without the shared objective on its penultimate features.

The digits are written out as PNG files, then read back as users read theirs: ``ImageFolder``, transforms, batches.
Every training sample is a triple (image, label, context); the context is another training image, whose label nobody
looks at. The shared objective sees the features of both. It is tried with all labels, and with a few per class.

    python examples/classify_images.py
    python examples/classify_images.py --data FOLDER    # your own train/CLASS/*.png and test/CLASS/*.png
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import fusefeat
import torch
from harness import Metrics, Run, compare, digit_splits, few_per_class, fit_classifier, loader, parser, score_classifier
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.utils import save_image

HIDDEN = 512


class ImageClassifier(nn.Module):
    """The published layout: two convolutions (64 and 128 maps), a hidden layer of 512, raw class scores."""

    def __init__(self, size: int, classes: int, num_features: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * (size // 4) ** 2, HIDDEN),
            nn.ReLU(),
        )
        self.head = nn.Linear(HIDDEN, classes)
        self.shared = nn.Linear(HIDDEN, num_features, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Triples(Dataset[Any]):
    """(image, label, context): each sample with another image of the pool."""

    def __init__(self, samples: Dataset[Any], length: int, pool: Dataset[Any], pool_size: int) -> None:
        self.samples, self.length, self.pool, self.pool_size = samples, length, pool, pool_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        image, label = self.samples[index]
        return image, label, self.pool[int(torch.randint(self.pool_size, ()))][0]


def digit_folder(folder: Path, seed: int, most: int | None) -> Path:
    """Write the digits as train/CLASS/NUMBER.png and test/CLASS/NUMBER.png, unless they are there."""
    train, validation, test = digit_splits(seed)
    for name, splits in {"train": (train, validation), "test": (test,)}.items():
        images = torch.cat([split.images for split in splits])[:most]
        digits = torch.cat([split.digits for split in splits])[:most]
        for number, (image, digit) in enumerate(zip(images, digits.tolist(), strict=True)):
            path = folder / name / str(digit) / f"{number:04}.png"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(image, path)
    return folder


def cross_entropy(model: ImageClassifier, images: Tensor, labels: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    scores = model(images)
    return F.cross_entropy(scores, labels), scores


def with_shared_objective(
    model: ImageClassifier, images: Tensor, labels: Tensor, context: Tensor, *, weight: float, layer: str
) -> tuple[Tensor, Tensor]:
    """Cross-entropy plus the shared objective of the penultimate features, over the weights of one layer."""
    features = model.features(images)
    scores = model.head(features)
    shared: nn.Linear = getattr(model, layer)
    penalty, reg = fusefeat.shared_objective(features, model.features(context), shared.weight, shared.bias)
    return F.cross_entropy(scores, labels) + weight * (penalty + reg), scores


def train(run: Run, objective: Any, labels_per_class: int | None) -> Metrics:
    args = run.args
    folder = args.data or digit_folder(run.out.parent / "images", args.seed, 100 if args.smoke else None)
    transform = transforms.Compose([transforms.Resize((args.size, args.size)), transforms.ToTensor()])
    known, test = (ImageFolder(str(folder / part), transform) for part in ("train", "test"))
    train_part, held_out = train_test_split(
        range(len(known)), test_size=0.2, random_state=args.seed, stratify=known.targets
    )
    labelled = train_part
    if labels_per_class is not None:
        few = few_per_class(torch.tensor(known.targets)[train_part], labels_per_class).tolist()
        # Every epoch takes as many steps as with all labels.
        labelled = [train_part[few[index % len(few)]] for index in range(len(train_part))]
    triples = Triples(Subset(known, labelled), len(labelled), Subset(known, train_part), len(train_part))

    model = ImageClassifier(args.size, len(known.classes), args.num_features).to(run.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    fit_classifier(run, model, optimizer, triples, Subset(known, held_out), objective)
    return score_classifier(run, model, loader(run, test, train=False))


def main() -> None:
    arguments = parser(
        "classify_images",
        "Classify a folder of images with a CNN and the shared objective.",
        epochs=8,
        batch_size=32,
        lr=0.02,
    )
    arguments.add_argument(
        "--data", type=Path, help="folder with train/CLASS and test/CLASS; default: write the digits"
    )
    arguments.add_argument("--size", type=int, default=8, help="height and width that images are resized to")
    arguments.add_argument("--num-features", type=int, default=128, help="shared features")
    arguments.add_argument("--weight", type=float, default=0.1, help="of the shared objective in the loss")
    arguments.add_argument("--few", type=int, default=5, help="labels per class in the second comparison")
    run = Run(arguments.parse_args())

    objectives = {
        "cross-entropy": cross_entropy,
        "+ shared objective": partial(with_shared_objective, weight=run.args.weight, layer="shared"),
        "+ the same on class scores": partial(with_shared_objective, weight=run.args.weight, layer="head"),
    }
    for name, few in {"all labels": None, f"{run.args.few} labels per class": run.args.few}.items():
        variants = {
            variant: partial(train, objective=objective, labels_per_class=few)
            for variant, objective in objectives.items()
        }
        compare(run.child(name.replace(" ", "-")), variants, score="accuracy", title=name)
    run.say(f"\ncurves, checkpoints and results are in {run.out}")


if __name__ == "__main__":
    main()
