"""One wheel under every supported torch: builds it once, then runs smoke.py with each version."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("2.11.0", "2.13.0+cpu", "2.14.1", "2.15.0")


def execute(command: list[str], **options: object) -> None:
    subprocess.run(command, check=True, **options)  # type: ignore[call-overload]


def build_wheel(python: str, folder: Path) -> Path:
    print(f"building the wheel with {python}", flush=True)
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    execute([*command, str(ROOT)])
    return next(folder.glob("fusefeat-*.whl"))


def environment(version: str, cache: Path, pip_options: list[str]) -> str:
    """The Python of a virtual environment with this torch, made on first use."""
    folder = cache / f"torch-{version}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"installing torch {version} into {folder}", flush=True)
        execute([sys.executable, "-m", "venv", "--clear", str(folder)])
        execute([str(python), "-m", "pip", "install", "--quiet", *pip_options, f"torch=={version}", "numpy"])
        (folder / "complete").touch()
    return str(python)


def smoke(python: str, wheel: Path) -> dict[str, object]:
    """What smoke.py found, or {"error": ...}. The wheel goes into a folder of its own, not into the environment."""
    with tempfile.TemporaryDirectory() as site:
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, str(wheel)]
        for command in (install, [python, str(ROOT / "tests" / "compat" / "smoke.py"), site]):
            done = subprocess.run(
                command, cwd=site, env={**os.environ, "PYTHONPATH": site}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                return {"error": done.stderr.strip()[-2000:] or f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", help=f"torch versions (default: {' '.join(VERSIONS)})")
    parser.add_argument("--wheel", type=Path, help="use this wheel instead of building one")
    parser.add_argument(
        "--build-python", default=sys.executable, help="the Python whose torch the wheel is built against"
    )
    parser.add_argument(
        "--venv", action="append", default=[], metavar="VERSION=PATH", help="use this virtual environment, unchanged"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "compat", help="where environments are kept")
    parser.add_argument("--pip-option", action="append", default=[], help="for installing torch, e.g. an extra index")
    arguments = parser.parse_args()
    given = dict(item.split("=", 1) for item in arguments.venv)
    versions = arguments.versions or [*VERSIONS, *(version for version in given if version not in VERSIONS)]

    failed = False
    rows = [("torch", "result", "instruction sets", "CUDA library")]
    with tempfile.TemporaryDirectory() as folder:
        wheel = (arguments.wheel or build_wheel(arguments.build_python, Path(folder))).resolve()
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        for version in versions:
            if version in given:
                python = str(Path(given[version]).absolute() / "bin" / "python")
            else:
                python = environment(version, arguments.cache, arguments.pip_option)
            found = smoke(python, wheel)
            if "error" in found:
                failed = True
                print(f"torch {version}:\n{found['error']}\n", flush=True)
                rows.append((version, "FAILED", "", ""))
            elif str(found["torch"]).split("+")[0] != version.split("+")[0]:
                failed = True
                rows.append((version, f"FAILED: the environment holds torch {found['torch']}", "", ""))
            else:
                rows.append((version, "passed", " ".join(found["isas"]), str(found["cuda"])))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
