"""One library in a process of its own, told what to time: a JSON line in, a JSON line out. See against.py."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import runner
from .case import DTYPES, Case
from .results import OURS


class Worker:
    """Holds one case at a time, through the gate, ready to be timed."""

    def __init__(self, settings: runner.Settings) -> None:
        self.settings = settings
        self._ready: runner.Ready | None = None

    def prepare(self, family: str, dtype: str, quick: bool, case: str) -> dict[str, str]:
        """By mode, why it gets no time."""
        module = importlib.import_module(f".{family}", __package__)
        cases: list[Case] = module.cases(self.settings.device, DTYPES[dtype], quick)
        found = next(c for c in cases if c.name == case)
        self._ready = runner.make_ready(found, OURS, self.settings)
        return self._ready.refused

    def time(self, mode: str) -> list[float]:
        assert self._ready is not None
        return self._ready.slices[mode]()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slice", type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(runner.Settings(torch.device(arguments.device), arguments.threads, 1, arguments.slice, "off", ()))
    calls: dict[str, Callable[..., Any]] = {
        "prepare": worker.prepare,
        "time": worker.time,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": calls[request["call"]](**request["arguments"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
