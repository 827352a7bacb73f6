"""Run an example in its smoke form, in a process of its own, and look at what it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(EXAMPLES / f"{name}.py"),
        "--smoke",
        "--device",
        "cpu",
        "--out",
        str(out),
        *arguments,
    ]
    # One thread: thread pools of tests that run side by side would wait for each other.
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def passes(name: str, out: Path, *arguments: str) -> str:
    done = example(name, out, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    return [number for value in tree for number in numbers(value)] if isinstance(tree, list) else [float(tree)]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000
