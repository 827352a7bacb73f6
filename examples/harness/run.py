"""One run of an example: its arguments, seed, device, output folder and progress bars."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

# What may differ between a run and the run that resumes it.
_FREE_ON_RESUME = {"epochs", "device", "out", "resume", "no_compile", "seeds"}


def parser(name: str, description: str, *, epochs: int, batch_size: int, lr: float) -> argparse.ArgumentParser:
    """The arguments that all examples take; an example adds its own to the result."""
    shared = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    shared.add_argument("--epochs", type=int, default=epochs, help="passes over the training data")
    shared.add_argument("--batch-size", type=int, default=batch_size)
    shared.add_argument("--lr", type=float, default=lr, help="learning rate")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--seeds", type=int, default=1, help="repeat comparisons with this many seeds, from --seed on")
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    shared.add_argument("--out", type=Path, default=Path("out") / name, help="folder for everything that is written")
    shared.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue from a checkpoint or output folder; default: --out",
    )
    shared.add_argument(
        "--smoke", action="store_true", help="two epochs at most, for a test that all runs; the results mean nothing"
    )
    return shared


class Run:
    """Settings of one run, and where its output goes.

    Attributes:
        args: the parsed arguments.
        device: the chosen device.
        out: the output folder, created.
        is_part: whether this is one of several trainings of a comparison.
    """

    def __init__(self, args: argparse.Namespace, is_part: bool = False) -> None:
        self.args, self.is_part = args, is_part
        if args.smoke:
            args.epochs = min(args.epochs, 2)
        cuda = torch.cuda.is_available()
        self.device = torch.device(("cuda" if cuda else "cpu") if args.device == "auto" else args.device)
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.seed()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that a resumed run must share with the run that it continues."""
        kept = {key: value for key, value in vars(self.args).items() if key not in _FREE_ON_RESUME}
        return {key: str(value) if isinstance(value, Path) else value for key, value in kept.items()}

    @property
    def resume_from(self) -> Path | None:
        if self.args.resume is None:
            return None
        path = Path(self.args.resume) if self.args.resume else self.out
        if path.is_dir():
            path = path / "checkpoint.pt"
        # An interrupted comparison has parts that never began.
        return None if self.is_part and not path.is_file() else path

    @property
    def quiet(self) -> bool:
        """Whether to leave out the line per epoch: many trainings would print too many."""
        return self.is_part and self.args.seeds > 1

    def child(self, name: str, **settings: Any) -> Run:
        """The run of one part, in a folder of its own below this one, freshly seeded."""
        args = argparse.Namespace(**{**vars(self.args), **settings, "out": self.out / name})
        if args.resume:
            args.resume = str(Path(args.resume) / name)
        return Run(args, is_part=True)

    def seed(self, *key: int) -> None:
        """Seed torch's random numbers by the run's seed and a key, such as the epoch."""
        seed = int(np.random.SeedSequence((self.args.seed, *key)).generate_state(1)[0])
        torch.manual_seed(seed)

    def progress(self, iterable: Iterable[Any], description: str) -> tqdm[Any]:
        """A progress bar on a terminal, silence elsewhere (logs get one line per epoch from ``fit``)."""
        return tqdm(iterable, desc=description, leave=False, disable=None, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print without breaking a progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def save_results(self, results: dict[str, Any]) -> None:
        (self.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    def require(self, name: str, value: float, at_least: float) -> None:
        """End with an error when a full run falls short (a smoke run only has to be finite)."""
        if not math.isfinite(value):
            self.fail(f"{name} is {value}")
        if not self.args.smoke and value < at_least:
            self.fail(f"{name} is {value:.4f}, expected at least {at_least}")

    def fail(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}")
