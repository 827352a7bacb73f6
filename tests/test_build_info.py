"""The binaries: what they say of themselves, and what happens when they do not fit or cannot be loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fusefeat import __version__, _library

PACKAGE = Path(_library.__file__).parent
ISAS = ("generic", "avx2", "avx512")


@pytest.fixture
def facts() -> dict:
    return json.loads((PACKAGE / "build_info.json").read_text())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `_library.load` looks in this test."""
    monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
    return tmp_path


def run(code: str, path: Path, **variables: str) -> str:
    """Runs code in a fresh interpreter that imports fusefeat from path."""
    command = [sys.executable, *code.split()] if code.startswith("-m") else [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=path, env={"PYTHONPATH": str(path), **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_is_current(facts: dict) -> None:
    state = _library.STATE
    assert state.cpu_loaded, state.cpu_reason
    assert state.bindings is not None, state.reasons
    assert facts == state.build_info == json.loads(state.bindings.build_info())
    assert facts["version"] == __version__
    assert facts["torch_target"] == "2.11"
    assert facts["cuda"] or facts["not_built"]["cuda"]


def test_not_compiled(package: Path) -> None:
    state = _library.load()
    assert not state.cpu_loaded
    assert not state.cuda_loaded
    assert state.bindings is None
    assert "has not been compiled" in str(state.cpu_reason)
    assert "pip install" in str(state.cpu_reason)


@pytest.mark.parametrize("text", ["", "[]", '{"version": "0.1.0"}'])
def test_unreadable_build_info(package: Path, text: str) -> None:
    (package / "build_info.json").write_text(text)
    state = _library.load()
    assert not state.cpu_loaded
    assert "build_info.json" in str(state.cpu_reason)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "0.0.7"}, ["compiled for fusefeat 0.0.7", __version__, "pip install"]),
        ({"torch_target": "99.1"}, ["need torch >= 99.1", torch.__version__]),
    ],
)
def test_stale_binaries_are_not_loaded(package: Path, facts: dict, change: dict, words: list[str]) -> None:
    # Were they loaded, the registration of the same operators for a second time would raise.
    shutil.copy(PACKAGE / "libfusefeat_cpu.so", package)
    (package / "build_info.json").write_text(json.dumps(facts | change))
    state = _library.load()
    assert not state.cpu_loaded
    assert all(word in str(state.cpu_reason) for word in words)
    assert "not loaded" in str(state.cuda_reason)


def test_broken_library(package: Path, facts: dict) -> None:
    (package / "build_info.json").write_text(json.dumps(facts))
    assert "libfusefeat_cpu.so is missing" in str(_library.load().cpu_reason)
    (package / "libfusefeat_cpu.so").write_bytes(b"not a library")
    assert "libfusefeat_cpu.so cannot be loaded" in str(_library.load().cpu_reason)


def test_module_of_another_build(facts: dict) -> None:
    module, reason = _library._load_bindings(facts | {"compiler": "another"})
    assert module is None
    assert "another build" in reason


@pytest.mark.parametrize(
    ("torch_cuda", "reason"), [(None, "is without CUDA"), ("11.8", "with CUDA 13.0.1, .*uses CUDA 11.8")]
)
def test_cuda_library_of_another_torch(
    facts: dict, monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    built = facts | {"cuda": "13.0.1", "not_built": {"cuda": "", "bindings": ""}}
    with pytest.raises(RuntimeError, match=reason):
        raise RuntimeError(_library._load_cuda(built))


def test_everything_but_the_kernels_works_without_binaries(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fusefeat", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    pooled = run(
        "import torch, fusefeat\n"
        "x = torch.ones(2, 3, 4, requires_grad=True)\n"
        "fusefeat.attention_pool(x, torch.ones(4)).sum().backward()\n"
        "print(x.grad.sum().item(), fusefeat.nn.AttentionPool(4, 5)(x).shape)",
        tmp_path,
    )
    assert pooled == "8.0 torch.Size([2, 5])\n"
    text = run("-m fusefeat.info", tmp_path)
    assert "libfusefeat_cpu.so is missing" in text
    found = json.loads(run("-m fusefeat.info --json", tmp_path))
    assert found["dispatch"]["attention_pool"]["cpu"]["backend"] == "reference"
    assert "libfusefeat_cpu.so is missing" in found["backends"]["cpu"]


def test_isa_override() -> None:
    before = _library.isa()
    for isa in ISAS[: ISAS.index(before["best"]) + 1]:
        with _library.use_isa(isa):
            assert _library.isa() == {"current": isa, "best": before["best"]}
    assert _library.isa() == before
    with pytest.raises(ValueError, match="no instruction set 'sse9'"), _library.use_isa("sse9"):
        pass


@pytest.mark.parametrize("wish", ["generic", "sse9"])
def test_isa_from_the_environment(wish: str) -> None:
    code = "from fusefeat import _library as l; print(l.isa()['current'], l.STATE.reasons.get('isa', ''))"
    current, _, reason = run(code, PACKAGE.parent, FUSEFEAT_ISA=wish).strip().partition(" ")
    if wish == "generic":
        assert (current, reason) == ("generic", "")
    else:
        assert current == _library.isa()["best"]
        assert "FUSEFEAT_ISA=sse9 cannot be had" in reason


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_library_uses_the_stable_interface_alone(name: str) -> None:
    """C++ functions of torch change from release to release; only its C functions are kept."""
    path = PACKAGE / f"libfusefeat_{name}.so"
    if not path.exists():
        pytest.skip(f"{path.name} is not built")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", str(path)]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [
        symbol for symbol in symbols if symbol.startswith(("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch"))
    ]


def test_no_paths_of_the_build_machine_in_the_binaries() -> None:
    roots = (Path(torch.__file__).parent, PACKAGE.parent.parent)
    for path in PACKAGE.glob("*.so"):
        data = path.read_bytes()
        for root in roots:
            assert str(root).encode() not in data, f"{path.name} holds {root}"


def test_import_leaves_compiler_and_triton_alone() -> None:
    code = "import sys, torch, fusefeat; print(sorted({'torch._dynamo', 'triton'} & set(sys.modules)))"
    assert run(code, PACKAGE.parent) == "[]\n"


@pytest.mark.parametrize("keep_out", ["sys.modules['triton'] = None", "sys.meta_path.insert(0, Refusing())"])
def test_without_triton(keep_out: str) -> None:
    code = f"""
import sys
import torch

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no " + name)

{keep_out}
import fusefeat
from fusefeat import backends
print(backends.BACKENDS["triton"].why_unavailable(), fusefeat.attention_pool(torch.ones(1, 1, 1), torch.ones(1)).item())
"""
    assert run(code, PACKAGE.parent) == "triton is not installed (pip install triton) 1.0\n"
