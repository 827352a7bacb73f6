"""The README's example runs and gives what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    scope: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), scope)
    assert scope["pooled"].shape == (3, 512) and scope["weights"].shape == (1043,)
    assert scope["slides"].grad is not None and scope["query"].grad is not None
    assert all(parameter.grad is not None for parameter in scope["head"].parameters())
    assert len(blocks[0].strip().splitlines()) <= 15


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in README and re.search(rf"^{command}:", makefile, re.MULTILINE)
