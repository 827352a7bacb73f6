"""A recurrent net reads digits row by row; its last step, or an attention-pooled sum of all steps, decides.

Once the sequence ends with the digit; once blank rows follow, so that the last step must remember across them.

    python examples/sequence_rnn.py
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import fusefeat
from harness import Metrics, Run, compare, digit_splits, fit_classifier, loader, parser, score_classifier
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import TensorDataset

CHANNELS, HIDDEN, LAYERS = 8, 50, 2
Readout = Literal["last", "mean", "attention"]


class RowReader(nn.Module):
    """The published net: ``nn.RNN`` with a zero initial state, and a linear layer on what is read from its steps."""

    def __init__(self, readout: Readout) -> None:
        super().__init__()
        self.readout = readout
        self.rnn = nn.RNN(CHANNELS, HIDDEN, LAYERS, batch_first=True)
        self.head = nn.Linear(HIDDEN, 10)
        if readout == "attention":
            self.pool = fusefeat.AttentionPool(HIDDEN, HIDDEN)

    def forward(self, rows: Tensor) -> Tensor:
        steps, _ = self.rnn(rows)
        if self.readout == "last":
            return self.head(steps[:, -1])
        return self.head(self.pool(steps) if self.readout == "attention" else steps.mean(1))


def train(run: Run, readout: Readout, blank_rows: int) -> Metrics:
    data = [split.first(200 if run.args.smoke else None) for split in digit_splits(run.args.seed)]
    train, validation, test = (
        TensorDataset(F.pad(split.images.squeeze(1), (0, 0, 0, blank_rows)), split.digits) for split in data
    )
    model = RowReader(readout).to(run.device)
    optimizer = optim.Adam(model.parameters(), lr=run.args.lr)
    fit_classifier(run, model, optimizer, train, validation)
    return score_classifier(run, model, loader(run, test, train=False))


def main() -> None:
    arguments = parser("sequence_rnn", "Read digits row by row.", epochs=15, batch_size=32, lr=2e-3)
    arguments.add_argument("--blank-rows", type=int, default=24, help="after the digit, in the second comparison")
    run = Run(arguments.parse_args())

    readouts: dict[str, Readout] = {"last step": "last", "mean of steps": "mean", "attention pooling": "attention"}
    for blank_rows in (0, run.args.blank_rows):
        variants = {name: partial(train, readout=readout, blank_rows=blank_rows) for name, readout in readouts.items()}
        title = f"8 rows of a digit, {blank_rows} blank rows"
        compare(run.child(f"{blank_rows}-blank-rows"), variants, score="accuracy", title=title)
    run.say(f"\ncurves, checkpoints and results are in {run.out}")


if __name__ == "__main__":
    main()
