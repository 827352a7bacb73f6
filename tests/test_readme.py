"""The README's examples run and give what their comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block: str) -> dict:
    scope: dict = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), scope)
    return scope


def test_the_example_runs() -> None:
    assert len(BLOCKS) == 2
    scope = run(BLOCKS[0])
    assert scope["pooled"].shape == (3, 512) and scope["weights"].shape == (1043,)
    assert scope["slides"].grad is not None and scope["query"].grad is not None
    assert all(parameter.grad is not None for parameter in scope["head"].parameters())
    assert len(BLOCKS[0].strip().splitlines()) <= 15


def test_the_backbone_starts_as_it_was_and_learns_to_attend() -> None:
    torchvision = pytest.importorskip("torchvision")
    scope = run(BLOCKS[1])
    model, images = scope["model"].eval(), torch.randn(2, 3, 64, 64)
    assert scope["scores"].shape == (2, 1000)
    published = torchvision.models.resnet18().eval()
    published.load_state_dict({k: v for k, v in model.state_dict().items() if k != "avgpool.query"})
    torch.testing.assert_close(model(images), published(images), rtol=1e-4, atol=1e-5)
    model(images).square().sum().backward()
    assert model.avgpool.query.grad.abs().max() > 0
    assert len([line for line in BLOCKS[1].splitlines() if line and "import" not in line]) <= 10


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command}" in README and re.search(rf"^{command}:", makefile, re.MULTILINE)
