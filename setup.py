"""Drives CMake; everything else about the package is in pyproject.toml.

Environment: FUSEFEAT_CUDA=0|1 (default: build CUDA when nvcc is found), TORCH_CUDA_ARCH_LIST, MAX_JOBS,
CUDACXX or CUDA_HOME (which nvcc), CXX.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "fusefeat"
TORCH_TARGET = (2, 11)
CUDA_MIN = (12, 4)


def torch_dir(torch: ModuleType) -> Path:
    return Path(torch.__file__).resolve().parent


def version() -> str:
    text = (ROOT / "python" / PACKAGE / "_version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def find_torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "fusefeat: torch is needed to build. Either `pip install .`, which fetches its own for the build, "
            "or install torch before `pip install . --no-build-isolation`."
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_TARGET:
        raise SystemExit(f"fusefeat: torch >= {dotted(TORCH_TARGET)} is needed to build, found {torch.__version__}")
    return torch


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def tool(name: str, bin_dir: str) -> str:
    """A tool from its Python package, which sits where pip put it even if PATH does not say so; else from PATH."""
    try:
        path = shutil.which(name, path=getattr(importlib.import_module(name), bin_dir))
    except (ImportError, AttributeError, AssertionError):
        path = None
    path = path or shutil.which(name)
    if path is None:
        raise SystemExit(f"fusefeat: {name} is needed to build: pip install {name}")
    return path


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in filter(None, candidates):
        path = shutil.which(candidate)
        if path is not None:
            # nvcc looks for its toolkit beside itself, so a link to it is followed, unless it leads to a wrapper.
            real = os.path.realpath(path)
            return real if os.path.basename(real) == "nvcc" else path
    return None


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def choose_cuda(torch: ModuleType) -> tuple[str | None, str]:
    """The nvcc to build the CUDA library with, or None and the reason why it is not built."""
    wish = os.environ.get("FUSEFEAT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"fusefeat: FUSEFEAT_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "FUSEFEAT_CUDA=0 was set"
    nvcc = find_nvcc()
    reason = ""
    if not (torch_dir(torch) / "lib" / "libtorch_cuda.so").exists():
        reason = f"torch {torch.__version__}, built against, is without CUDA"
    elif nvcc is None:
        reason = "nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
    elif nvcc_version(nvcc) < CUDA_MIN:
        reason = f"{nvcc} is CUDA {dotted(nvcc_version(nvcc))}, older than {dotted(CUDA_MIN)}"
    if reason and wish == "1":
        raise SystemExit(f"fusefeat: FUSEFEAT_CUDA=1, but {reason}")
    return (None, reason) if reason else (nvcc, "")


def cuda_archs(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST in CMake's spelling: '8.0' is 80-real, '9.0a' is 90a-real, '10.0+PTX' is 100."""
    wish = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
    if wish == [""]:
        return ["80-real", "90-real", "100"] if nvcc_version(nvcc) >= (12, 8) else ["80-real", "90"]
    archs = []
    for arch in wish:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"fusefeat: TORCH_CUDA_ARCH_LIST: {arch!r} is not like 8.0, 9.0a or 10.0+PTX")
        major, minor, suffix, ptx = match.groups()
        if int(major) < 8:
            raise SystemExit(f"fusefeat: TORCH_CUDA_ARCH_LIST: {arch} is older than 8.0, the oldest supported")
        archs.append(f"{major}{minor}{suffix}{'' if ptx else '-real'}")
    return archs


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def find_pybind11() -> tuple[str, str]:
    """Where pybind11's CMake files are, or "" and the reason why the Python module is not built."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "", "Python.h was not found: install Python's development headers"
    try:
        return importlib.import_module("pybind11").get_cmake_dir(), ""
    except ImportError:
        return "", "pybind11 was not found"


def cmake_variables(torch: ModuleType) -> dict[str, str]:
    nvcc, cuda_reason = choose_cuda(torch)
    print(f"fusefeat: CUDA library: {f'built with {nvcc}' if nvcc else f'not built: {cuda_reason}'}", flush=True)
    if nvcc and torch.version.cuda and int(torch.version.cuda.split(".")[0]) != nvcc_version(nvcc)[0]:
        print(
            f"fusefeat: warning: nvcc is CUDA {nvcc_version(nvcc)[0]}, the torch here uses CUDA {torch.version.cuda}: "
            "the CUDA library will be loaded only by a torch of its own CUDA major version",
            flush=True,
        )
    pybind11_dir, bindings_reason = find_pybind11()
    if bindings_reason:
        print(f"fusefeat: warning: Python module not built: {bindings_reason}", flush=True)
    variables = {
        "FUSEFEAT_VERSION": version(),
        "FUSEFEAT_PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
        "FUSEFEAT_TORCH_DIR": str(torch_dir(torch)),
        "FUSEFEAT_TORCH_VERSION": str(torch.__version__),
        "FUSEFEAT_TORCH_TARGET": f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}",
        "FUSEFEAT_TORCH_TARGET_NAME": dotted(TORCH_TARGET),
        "FUSEFEAT_CUDA": "ON" if nvcc else "OFF",
        "FUSEFEAT_CUDA_REASON": cuda_reason,
        "FUSEFEAT_BINDINGS": "ON" if pybind11_dir else "OFF",
        "FUSEFEAT_BINDINGS_REASON": bindings_reason,
    }
    if nvcc:
        variables |= {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": ";".join(cuda_archs(nvcc))}
    if pybind11_dir:
        variables |= {"pybind11_DIR": pybind11_dir, "Python_EXECUTABLE": sys.executable}
    return variables


def execute(command: list[str]) -> None:
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(f"fusefeat: the build failed, see above ({Path(command[0]).name} gave exit status {code})")


class CMakeBuild(build_ext):
    """One build of all libraries, installed into the package: that of the source tree when editable."""

    def run(self) -> None:
        torch = find_torch()
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        # Kept between builds. An isolated build sees torch at a new path each time, hence a directory of its own.
        kind = "inplace" if self.in_source_tree() else "wheel"
        build_dir = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        build_dir.mkdir(parents=True, exist_ok=True)
        variables = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR")}
        variables |= cmake_variables(torch)
        command = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
        command += [f"-D{name}={value}" for name, value in variables.items()]
        # CMake cannot change these in a directory that has been configured before.
        fixed = f"{ROOT}\n{variables.get('CMAKE_CUDA_COMPILER', '')}\n{os.environ.get('CXX', '')}\n"
        stamp = build_dir / "configured.txt"
        if not stamp.exists() or stamp.read_text() != fixed:
            command.append("--fresh")
        execute(command)
        stamp.write_text(fixed)
        execute([cmake, "--build", str(build_dir), "-j", str(jobs())])
        for pattern in ("libfusefeat_*.so", f"_C.{sys.implementation.cache_tag}*.so"):
            for old in self.package_dir().glob(pattern):
                old.unlink()  # not overwritten: a process may have it mapped
        execute([cmake, "--install", str(build_dir), "--prefix", str(self.package_dir()), "--strip"])

    def in_source_tree(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def package_dir(self) -> Path:
        if self.in_source_tree():
            return ROOT / "python" / PACKAGE
        return Path(self.build_lib).resolve() / PACKAGE

    def get_outputs(self) -> list[str]:
        package = self.package_dir()
        return [str(path) for path in (*package.glob("*.so"), package / "build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if __name__ == "__main__":
    setup(
        # Here, because setuptools before 77 cannot read it from pyproject.toml.
        license="BSD-3-Clause",
        ext_modules=[Extension(f"{PACKAGE}._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
