"""``AutoLearningLayer`` inside an MLP and inside torchvision's VGG16, against the same nets without it.

The layer y = relu(scale · net(x)) takes gradient steps of its own while the net around it trains. Its stand-in is the
same linear layer and ReLU; "no local steps" keeps the published scale, so that the two effects can be told apart.

    python examples/auto_learning.py
    python examples/auto_learning.py --nets vgg16
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fusefeat import AutoLearningLayer
from harness import (
    Metrics,
    Run,
    compare,
    digit_splits,
    fit_classifier,
    loader,
    parser,
    read_curves,
    score_classifier,
    upscaled,
)
from torch import nn, optim
from torch.utils.data import TensorDataset
from torchvision.models import vgg16_bn

TARGET = 0.9  # of the validation accuracy: how soon is it reached?

# Makes the layer under test from its sizes.
Layer = Callable[[int, int], nn.Module]


def mlp(layer: Layer) -> nn.Module:
    """The published MLP, for 64 pixels instead of 784; the layer has 128 units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), layer(256, 128), nn.Linear(128, 10)
    )


def vgg16(layer: Layer) -> nn.Module:
    """VGG16 for images of 32x32: its convolutions (with batch normalisation), one cell of 512 channels, the layer."""
    return nn.Sequential(vgg16_bn().features, nn.Flatten(), layer(512, 128), nn.Linear(128, 10))


def plain(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())


def train(run: Run, net: Callable[[Layer], nn.Module], layer: Layer) -> Metrics:
    large = net is vgg16
    splits = list(digit_splits(run.args.seed))
    if large or run.args.smoke:
        most = min(run.args.vgg16_images, 16 if run.args.smoke else 10_000)
        splits = [split.first(count) for split, count in zip(splits, (most, most // 2, 2 * most), strict=True)]
    train, validation, test = (
        TensorDataset(upscaled(split.images, 32) if large else split.images, split.digits) for split in splits
    )
    model = net(layer).to(run.device)
    optimizer = optim.Adam(model.parameters(), lr=run.args.lr)
    fit_classifier(run, model, optimizer, train, validation)
    reached = [accuracy >= TARGET for accuracy in read_curves(run.out / "curves.csv")["validation/accuracy"]]
    epochs = reached.index(True) + 1 if any(reached) else run.args.epochs + 1
    return {**score_classifier(run, model, loader(run, test, train=False)), f"epochs to {TARGET}": float(epochs)}


def main() -> None:
    arguments = parser(
        "auto_learning",
        "A layer that also learns on its own, in an MLP and in VGG16.",
        epochs=10,
        batch_size=16,
        lr=5e-4,
    )
    arguments.add_argument("--nets", nargs="+", choices=("mlp", "vgg16"), default=["mlp", "vgg16"])
    arguments.add_argument("--local-lr", type=float, default=0.01, help="learning rate of the layer's own steps")
    arguments.add_argument(
        "--vgg16-images", type=int, default=160, help="training images at most; half of it for validation"
    )
    arguments.add_argument("--vgg16-epochs", type=int, default=4, help="at most --epochs")
    run = Run(arguments.parse_args())
    local_lr = run.args.local_lr
    layers: dict[str, Layer] = {
        "linear, ReLU": plain,
        "auto-learning, scale 1": partial(AutoLearningLayer, learning_rate=local_lr, scale=1.0),
        "auto-learning, published scale": partial(AutoLearningLayer, learning_rate=local_lr),
        "published scale, no local steps": partial(AutoLearningLayer, learning_rate=0.0),
    }
    for name in run.args.nets:
        net = {"mlp": mlp, "vgg16": vgg16}[name]
        epochs = min(run.args.epochs, run.args.vgg16_epochs) if net is vgg16 else run.args.epochs
        part = run.child(name, epochs=epochs)
        variants = {title: partial(train, net=net, layer=layer) for title, layer in layers.items()}
        if net is vgg16:
            del variants["published scale, no local steps"]  # for the sake of time
        compare(part, variants, score="accuracy", title=name)
    run.say(f"\ncurves, checkpoints and results are in {run.out}")


if __name__ == "__main__":
    main()
