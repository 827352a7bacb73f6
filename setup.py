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

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "fusefeat"
TORCH_DIR = Path(torch.__file__).resolve().parent
TORCH_TARGET = (2, 11)
CUDA_MIN = (12, 4)


def version() -> str:
    text = (ROOT / "python" / PACKAGE / "_version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text)[1]


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


def choose_cuda() -> tuple[str | None, str]:
    """The nvcc to build the CUDA library with, or None and the reason why it is not built."""
    wish = os.environ.get("FUSEFEAT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"fusefeat: FUSEFEAT_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "FUSEFEAT_CUDA=0 was set"
    nvcc = find_nvcc()
    reason = ""
    if not list((TORCH_DIR / "lib").glob("libtorch_cuda.so")):
        reason = f"torch {torch.__version__}, built against, is without CUDA"
    elif nvcc is None:
        reason = "nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
    elif nvcc_version(nvcc) < CUDA_MIN:
        reason = f"{nvcc} is CUDA {'.'.join(map(str, nvcc_version(nvcc)))}, older than {'.'.join(map(str, CUDA_MIN))}"
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


def bindings() -> tuple[list[str], str]:
    """CMake settings for the pybind11 module, or none and the reason why it is not built."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return [], "Python.h was not found: install Python's development headers"
    try:
        pybind11 = importlib.import_module("pybind11")
    except ImportError:
        return [], "pybind11 was not found"
    return [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"], ""


def settings(nvcc: str | None, cuda_reason: str) -> dict[str, str]:
    print(f"fusefeat: CUDA library: {f'built with {nvcc}' if nvcc else f'not built: {cuda_reason}'}", flush=True)
    if nvcc and torch.version.cuda and int(torch.version.cuda.split(".")[0]) != nvcc_version(nvcc)[0]:
        print(
            f"fusefeat: warning: nvcc is CUDA {nvcc_version(nvcc)[0]}, the torch here uses CUDA {torch.version.cuda}: "
            "the CUDA library will be loaded only by a torch of its own CUDA major version",
            flush=True,
        )
    return {
        "CUDA": "ON" if nvcc else "OFF",
        "CUDA_REASON": cuda_reason,
        "CUDA_ARCHS": ";".join(cuda_archs(nvcc)) if nvcc else "",
        "VERSION": version(),
        "PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
        "TORCH_DIR": str(TORCH_DIR),
        "TORCH_VERSION": torch.__version__,
        "TORCH_TARGET": f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}",
        "TORCH_TARGET_NAME": ".".join(map(str, TORCH_TARGET)),
    }


class CMakeBuild(build_ext):
    """One build of all libraries, installed into the package: that of the source tree when editable."""

    def run(self) -> None:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_TARGET:
            raise SystemExit(f"fusefeat: torch >= {'.'.join(map(str, TORCH_TARGET))} is needed, found {torch.__version__}")
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        build_dir.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        nvcc, cuda_reason = choose_cuda()
        values = settings(nvcc, cuda_reason)
        binding_args, reason = bindings()
        values |= {"BINDINGS": "OFF" if reason else "ON", "BINDINGS_REASON": reason}
        command = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        command += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}", *binding_args]
        command += [f"-DFUSEFEAT_{name}={value}" for name, value in values.items()]
        if nvcc:
            command += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={values['CUDA_ARCHS']}"]
        cache = build_dir / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            command.append("--fresh")  # the source tree was moved
        subprocess.run(command, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "-j", str(jobs())], check=True)
        for pattern in ("libfusefeat_*.so", f"_C.{sys.implementation.cache_tag}*.so"):
            for old in self.package_dir().glob(pattern):
                old.unlink()  # not overwritten: a process may have it mapped
        subprocess.run([cmake, "--install", str(build_dir), "--prefix", str(self.package_dir()), "--strip"], check=True)

    def package_dir(self) -> Path:
        if self.inplace or self.editable_mode:
            return ROOT / "python" / PACKAGE
        return Path(self.build_lib).resolve() / PACKAGE

    def get_outputs(self) -> list[str]:
        package = self.package_dir()
        return [str(path) for path in (*package.glob("*.so"), package / "build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension(f"{PACKAGE}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
