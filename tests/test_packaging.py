"""The source distribution, and how setup.py reads its environment."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fusefeat
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fusefeat_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch_with_cuda(tmp_path: Path) -> SimpleNamespace:
    library = tmp_path / "torch" / "lib" / "libtorch_cuda.so"
    library.parent.mkdir(parents=True)
    library.touch()
    return SimpleNamespace(__file__=str(tmp_path / "torch" / "__init__.py"), __version__="2.15.0")


def fake_nvcc(folder: Path, release: str) -> Path:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_source_distribution_holds_all_that_the_build_reads(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("fusefeat-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"}
    for folder in ("csrc", "cmake"):
        wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "python").rglob("*.py")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyc", "build_info.json"))]


def test_version_has_one_place(setup: ModuleType) -> None:
    assert setup.version() == fusefeat.__version__


@pytest.mark.parametrize(
    ("release", "wish", "archs"),
    [
        ("13.0", None, ["80-real", "90-real", "100"]),
        ("12.4", None, ["80-real", "90"]),
        ("13.0", "9.0", ["90-real"]),
        ("13.0", "8.0;9.0a 10.0+PTX, 12.0", ["80-real", "90a-real", "100", "120-real"]),
    ],
)
def test_cuda_archs(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, wish: str | None, archs: list[str]
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if wish is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup.cuda_archs(str(fake_nvcc(tmp_path, release))) == archs


@pytest.mark.parametrize(("wish", "words"), [("Hopper", "'Hopper' is not like"), ("7.0", "older than 8.0")])
def test_bad_cuda_archs(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, words: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    with pytest.raises(SystemExit, match=words):
        setup.cuda_archs(str(fake_nvcc(tmp_path, "13.0")))


def test_whether_cuda_is_built(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_with_cuda: SimpleNamespace
) -> None:
    nvcc = fake_nvcc(tmp_path, "13.0")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(nvcc)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "links" / "nvcc"))
    monkeypatch.delenv("FUSEFEAT_CUDA", raising=False)
    assert setup.choose_cuda(torch_with_cuda) == (str(nvcc), "")

    fake_nvcc(tmp_path, "12.3")
    assert "12.3, older than 12.4" in setup.choose_cuda(torch_with_cuda)[1]
    monkeypatch.setenv("FUSEFEAT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FUSEFEAT_CUDA=1, but .*older than 12\.4"):
        setup.choose_cuda(torch_with_cuda)
    os.unlink(tmp_path / "torch" / "lib" / "libtorch_cuda.so")
    with pytest.raises(SystemExit, match=r"torch 2\.15\.0, built against, is without CUDA"):
        setup.choose_cuda(torch_with_cuda)
    monkeypatch.setenv("FUSEFEAT_CUDA", "0")
    assert setup.choose_cuda(torch_with_cuda) == (None, "FUSEFEAT_CUDA=0 was set")
    monkeypatch.setenv("FUSEFEAT_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1"):
        setup.choose_cuda(torch_with_cuda)
