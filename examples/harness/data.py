"""The data of all examples: the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F


class Split(NamedTuple):
    """Images [N,1,8,8] with values in [0, 1], and which digit each shows, [N] int64."""

    images: Tensor
    digits: Tensor

    def only(self, *digits: int) -> Split:
        """The images of these digits, whose labels become 0, 1, ... in the order given."""
        label = torch.full((10,), -1)
        label[list(digits)] = torch.arange(len(digits))
        kept = label[self.digits] >= 0
        return Split(self.images[kept], label[self.digits[kept]])

    def first(self, count: int | None) -> Split:
        return Split(self.images[:count], self.digits[:count])


def digit_splits(seed: int) -> tuple[Split, Split, Split]:
    """Training, validation and test images: 60, 15 and 25 %, stratified, drawn by the seed."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(data.target)
    rest, test = train_test_split(range(len(digits)), test_size=0.25, random_state=seed, stratify=digits)
    train, validation = train_test_split(rest, test_size=0.2, random_state=seed, stratify=digits[rest])
    splits = [Split(images[part], digits[part]) for part in (train, validation, test)]
    return splits[0], splits[1], splits[2]


def few_per_class(labels: Tensor, count: int) -> Tensor:
    """The indices of the first ``count`` samples of every class."""
    return torch.cat([(labels == label).nonzero().squeeze(1)[:count] for label in labels.unique().tolist()])


def upscaled(images: Tensor, size: int) -> Tensor:
    """[N,1,8,8] as colour images [N,3,size,size], scaled to [-1, 1]."""
    larger = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return (larger * 2 - 1).expand(-1, 3, -1, -1)
