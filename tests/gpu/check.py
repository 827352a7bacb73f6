"""Everything a real GPU is needed for, in one command: build, GPU tests, benchmarks, compute-sanitizer.

Uses the Python that runs it and needs no network. A stage that fails does not stop the next one; the exit status
tells whether all passed. Logs and tables land in benchmarks/results/<name of the GPU>/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import torch
except ImportError:
    sys.exit(f"gpu-check: {sys.executable} has no torch; another Python: make gpu-check PYTHON=/path/to/python")

ROOT = Path(__file__).resolve().parents[2]
SWEEP = "tests/gpu/sanitizer_sweep.py"
BUDGET = 540  # seconds
LEAST = 10  # seconds, with fewer left a stage is not begun
GRACE = 5  # seconds to end in


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    limit: float  # seconds, of a budget of 540; more of a larger one
    reserve: float = 0.0  # seconds that the stages after this one shall still have
    needed: bool = True  # a failure when there is no time for it

    def within(self, seconds: float) -> list[str]:
        """The command, told when to begin nothing new, so that what it has measured is shown before it is stopped."""
        return [part.replace("{soon}", f"{max(1.0, 0.75 * seconds - 5):.0f}") for part in self.command]


def sanitizer() -> str:
    toolkit = Path(os.path.realpath(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")).parent
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join([str(toolkit), "/usr/local/cuda/bin"])
    )
    return found or "compute-sanitizer"


def stages(results: Path) -> list[Stage]:
    python = sys.executable

    def benchmarks(*families: str, dtype: str) -> list[str]:
        short = ["--rounds", "3", "--slice", "0.02", "--limit", "{soon}"]
        csv = str(results / f"{families[-1]}.csv")
        return [python, "-m", "benchmarks", *families, "--device", "cuda", "--dtype", dtype, *short, "--csv", csv]

    # bfloat16 first: what is promised for a GPU is promised of it, and time may be short.
    pools = benchmarks("attention_pool", dtype="bf16,fp32")
    shared = benchmarks("shared_penalty", dtype="bf16,fp32")
    others = benchmarks("clamped_reg", "shared_objective", dtype="fp32")
    # A file that misses a package of its own shall not keep the others from running.
    marked = ["-m", "gpu", "--continue-on-collection-errors"]
    # The sweep itself exits with 1 when a value is wrong, hence another status for what the tool finds.
    check = [sanitizer(), "--error-exitcode", "86"]
    return [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 240),
        Stage("info", [python, "-m", "fusefeat.info"], 60),
        Stage("tests", [python, "-m", "pytest", *marked, "-q", "-ra", "tests"], 240, reserve=240),
        Stage("benchmarks", pools, 150, reserve=180),
        Stage("benchmarks-shared", shared, 150, reserve=90),
        Stage("memcheck", [*check, "--tool", "memcheck", python, SWEEP], 120, reserve=40),
        Stage("racecheck", [*check, "--tool", "racecheck", python, SWEEP], 120),
        Stage("benchmarks-others", others, 150, needed=False),
    ]


def run(stage: Stage, log: Path, seconds: float, environment: dict[str, str]) -> str:
    """Returns "passed", or what went wrong."""
    command = stage.within(seconds)
    with log.open("w") as out:
        out.write(f"$ {' '.join(command)}\n\n")
        out.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except FileNotFoundError as error:
            return f"failed: {error.filename} was not found"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # Asked first: the benchmarks then print what they have.
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"failed: stopped after {seconds:.0f} s"
    return "passed" if code == 0 else f"failed: exit status {code}"


def environment() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability()
    values = dict(os.environ)
    values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "python"), values.get("PYTHONPATH")]))
    values["PYTHONUNBUFFERED"] = "1"  # a stage that is stopped shall have said how far it came
    values["FUSEFEAT_CUDA"] = "1"
    values.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    values["NVCC_APPEND_FLAGS"] = f"{values.get('NVCC_APPEND_FLAGS', '')} -lineinfo".strip()
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where logs and tables go")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        why = "sees no CUDA device" if torch.version.cuda else "was built without CUDA"
        print(f"gpu-check: torch {torch.__version__} {why}", file=sys.stderr)
        return 2

    name = torch.cuda.get_device_name()
    results = arguments.out or ROOT / "benchmarks" / "results" / re.sub(r"[^\w.-]+", "-", name)
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in stages(results) if not arguments.only or stage.name in arguments.only]
    if not chosen:
        parser.error(f"--only: the stages are {', '.join(stage.name for stage in stages(results))}")

    values = environment()
    begin = time.monotonic()
    lines = [f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"]
    print(lines[0], flush=True)
    all_passed = True
    for stage in chosen:
        started = time.monotonic()
        scale = max(1.0, arguments.budget / BUDGET)
        left = arguments.budget - (started - begin) - (0.0 if arguments.only else stage.reserve)
        log = results / f"{stage.name}.log"
        if left < LEAST:
            log.write_text("not run\n")
            outcome = "not run: no time left, see --budget"
        else:
            outcome = run(stage, log, min(stage.limit * scale, left), values)
        lines.append(f"{stage.name:<18}{time.monotonic() - started:7.1f} s  {outcome}")
        print(lines[-1], flush=True)
        if outcome != "passed" and (stage.needed or left >= LEAST):
            all_passed = False
            print("".join(f"    {line}" for line in log.read_text(errors="replace").splitlines(True)[-25:]), flush=True)
    (results / "summary.txt").write_text("\n".join(lines) + "\n")
    print(f"logs and tables: {results}")
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
