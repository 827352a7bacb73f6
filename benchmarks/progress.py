"""What is being done, on stderr: a bar with tqdm on a terminal, a line that is rewritten without it, lines in a log."""

from __future__ import annotations

import sys
from typing import Any

from .case import Skip
from .peers import optional


class Progress:
    """``total`` steps; ``say`` tells what the present one does."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        if self._terminal:
            try:
                self._bar = optional("tqdm", "tqdm").tqdm(total=total, file=sys.stderr, leave=False)
            except Skip:
                self._bar = None

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text)
        elif self._terminal:
            print(f"\r\x1b[K{self._prefix()}{text}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{self._prefix()}{text}", file=sys.stderr, flush=True)

    def step(self) -> None:
        self.done += 1
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _prefix(self) -> str:
        return f"[{min(self.done + 1, self.total)}/{self.total}] "
