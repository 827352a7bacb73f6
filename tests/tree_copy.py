"""A copy of the source tree with a build of its own, in which faults can be planted."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("CMakeLists.txt", "setup.py", "pyproject.toml", "cmake", "csrc", "python", "tests")
LIBRARY = "libfusefeat_cpu.so"
BUILT = (LIBRARY, "_C.*.so", "build_info.json")


@dataclass(frozen=True)
class Fault:
    """A change of source text that tests must notice. The text occurs exactly once in the file."""

    file: str
    text: str
    replacement: str

    def problem(self, root: Path = ROOT) -> str:
        """Why this fault cannot be planted, or ""."""
        count = (root / self.file).read_text().count(self.text) if (root / self.file).exists() else 0
        if count != 1:
            return f"{self.file} holds {self.text!r} {count} times"
        return "the replacement changes nothing" if self.text == self.replacement else ""


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fusefeat_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TreeCopy:
    """Kept in `folder` from run to run; files that have not changed keep their time, so builds are incremental."""

    def __init__(self, folder: Path, compile_flags: str = "-O1", link_flags: str = "") -> None:
        self.tree, self.build_folder = folder / "tree", folder / "build"
        self.package = self.tree / "python" / "fusefeat"
        self.flags = {"CMAKE_CXX_FLAGS_CHECK": f"{compile_flags} -DNDEBUG", "CMAKE_MODULE_LINKER_FLAGS": link_flags}
        self._copy_sources()

    def _copy_sources(self) -> None:
        files = set()
        for part in PARTS:
            paths = [ROOT / part] if (ROOT / part).is_file() else (ROOT / part).rglob("*")
            files |= {path.relative_to(ROOT) for path in paths if path.is_file() and path.suffix not in (".so", ".pyc")}
        files.discard(Path("python/fusefeat/build_info.json"))
        for old in (path for path in self.tree.rglob("*") if path.is_file()):
            kept = old.suffix == ".so" or old.name == "build_info.json" or ".pytest_cache" in old.parts
            if not kept and old.relative_to(self.tree) not in files:
                old.unlink()
        for name in sorted(files):
            target = self.tree / name
            if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)

    def use_built(self) -> None:
        """Takes the libraries of the original as they are, for faults that need no compiler."""
        for pattern in BUILT:
            for path in (ROOT / "python" / "fusefeat").glob(pattern):
                shutil.copyfile(path, self.package / path.name)

    def build(self, jobs: int = 2) -> None:
        import torch

        setup = _setup()
        os.environ["FUSEFEAT_CUDA"] = "0"
        variables = setup.cmake_variables(torch) | self.flags | {"CMAKE_BUILD_TYPE": "Check"}
        self.ninja = setup.tool("ninja", "BIN_DIR")
        variables["CMAKE_MAKE_PROGRAM"] = self.ninja
        command = [setup.tool("cmake", "CMAKE_BIN_DIR"), "-S", str(self.tree), "-B", str(self.build_folder)]
        command += ["-G", "Ninja", *(f"-D{name}={value}" for name, value in variables.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([self.ninja, "-C", str(self.build_folder), "-j", str(jobs)], check=True)
        for old in (path for pattern in BUILT for path in self.package.glob(pattern)):
            old.unlink()  # not overwritten: a process may have it mapped
        for path in (path for pattern in BUILT for path in self.build_folder.glob(pattern)):
            shutil.copyfile(path, self.package / path.name)

    def run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs Python in the copy; the output of both streams is in stdout."""
        environment = {**os.environ, "PYTHONPATH": str(self.tree / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, *command], cwd=self.tree, env=environment | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @contextmanager
    def planted(self, fault: Fault, isa: str = "") -> Iterator[str]:
        """With the fault in the sources and, given an instruction set, in the CPU library. Yields compiler errors."""
        problem = fault.problem(self.tree)
        assert not problem, problem
        source = self.tree / fault.file
        objects = self._objects_of(fault.file, isa) if isa else []
        touched = [source, *objects, *([self.build_folder / LIBRARY, self.package / LIBRARY] if isa else [])]
        for path in touched:
            shutil.copy2(path, f"{path}.clean")
        try:
            source.write_text(source.read_text().replace(fault.text, fault.replacement))
            yield self._compile(objects) if isa else ""
        finally:
            for path in touched:
                os.replace(f"{path}.clean", path)

    def _objects_of(self, file: str, isa: str) -> list[Path]:
        """The objects compiled from a file; of those for instruction sets only those for this one and more."""
        listing = self._ninja("-t", "deps")
        objects = []
        for entry in listing.strip().split("\n\n"):
            head, *dependencies = entry.splitlines()
            name = head.partition(":")[0]
            used = any(os.path.samefile(self.tree / file, path.strip()) for path in dependencies if file in path)
            if used and ("/vec_" not in name or f"vec_{isa}" in name) and "_C.dir" not in name:
                objects.append(self.build_folder / name)
        assert objects, f"nothing is compiled from {file} for {isa}"
        return objects

    def _ninja(self, *arguments: str) -> str:
        command = [self.ninja, "-C", str(self.build_folder), "--quiet", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _compile(self, objects: list[Path]) -> str:
        names = [str(path.relative_to(self.build_folder)) for path in objects]
        commands = [self._ninja("-t", "commands", name).splitlines()[-1] for name in names]
        commands.append(self._ninja("-t", "commands", LIBRARY).splitlines()[-1])
        for command in commands:
            done = subprocess.run(command, shell=True, cwd=self.build_folder, capture_output=True, text=True)
            if done.returncode:
                return done.stdout + done.stderr
        target = self.package / LIBRARY
        target.unlink()
        shutil.copyfile(self.build_folder / LIBRARY, target)
        return ""
