"""Runs the tests of the compiled kernels under GCC's sanitizers, after showing that planted faults are found.

    python tests/sanitize/run.py            # everything
    python tests/sanitize/run.py thread     # address, cuda or thread alone; more arguments go to pytest

address: the CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, on all instruction sets of this machine.
cuda: the CUDA kernels, executed on the CPU, under both: the tests of each family (of the shared penalty all but the
cases of many rows and of many features, which take longest), the shared cases of the pools, and drawn problems.
thread: the CPU library under ThreadSanitizer, on threads that it understands (threads.cpp).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tree_copy import ROOT, Fault, TreeCopy  # noqa: E402

ADDRESS = "-fsanitize=address,undefined"
STRICT = "-fno-sanitize-recover=all"
OPTIONS = {
    # What Python and torch leave is theirs. Frames that outlive their function would need a second stack per fiber.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:suppressions={HERE / 'thread_suppressions.txt'}",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Planted:
    fault: Fault
    test: str
    report: str  # what the sanitizer says


@dataclass(frozen=True)
class Kind:
    compile_flags: str
    preload: tuple[str, ...]
    planted: tuple[Planted, ...]
    runs: tuple[tuple[str, ...], ...]  # of pytest, each with its arguments
    variables: dict[str, str]


KERNELS = (
    "tests/test_cpu_kernels.py",
    "tests/test_cpu_shared_kernels.py",
    "tests/test_cpu_sweep.py",
    "tests/test_cpu_simd.py",
)
SHARED_CASES = ("tests/test_attention_pool.py", "tests/test_shared_penalty.py", "-k", "not reference")

READ_PAST_THE_TOKENS = Planted(
    Fault(
        "csrc/cpu/vec/pool_block.h",
        "return value < 0 ? 0 : value > args.tokens ? args.tokens : value;",
        "return value < 0 ? 0 : value;",
    ),
    "tests/test_cpu_kernels.py -k bad_offsets",
    "heap-buffer-overflow",
)
SIGNED_OVERFLOW = Planted(
    Fault(
        "csrc/cpu/pool_partition.h",
        "return std::max({block_bytes / row_bytes, 16 * args.queries, int64_t{16}});",
        "return std::max({block_bytes / row_bytes, INT64_MAX - 8 + 16 * args.queries, int64_t{16}});",
    ),
    "tests/test_cpu_kernels.py -k sizes_of_zero",
    "signed integer overflow",
)
SHARED_SCRATCH = Planted(
    Fault("csrc/cpu/parallel.h", "item = next++) f(item, worker);", "item = next++) f(item, 0);"),
    "tests/test_cpu_kernels.py -k threads_and_repeats",
    "data race",
)
KERNEL_WRITES_PAST_THE_TOKENS = Planted(
    Fault("csrc/cuda/bags.cuh", "return token < tokens ? token : tokens;", "return token;"),
    "tests/test_gpu_kernels_on_shared_cases.py -k attention_pool_in_cuda and small",
    "heap-buffer-overflow",
)

SHARED_KERNEL_WRITES_PAST_THE_ROWS = Planted(
    Fault("csrc/cuda/gemm.cuh", "if (to_row >= args.rows) return;", "if (to_row > args.rows) return;"),
    "tests/test_cuda_on_cpu_shared_penalty.py -k matrices and activation",
    "heap-buffer-overflow",
)

KINDS = {
    "address": Kind(
        f"{ADDRESS} {STRICT}",
        ("libasan.so", "libubsan.so"),
        (READ_PAST_THE_TOKENS, SIGNED_OVERFLOW),
        (KERNELS, SHARED_CASES, ("tests/test_pool_bad_input.py", "tests/test_shared_bad_input.py")),
        {},
    ),
    "cuda": Kind(
        "",
        ("libasan.so", "libubsan.so"),
        (KERNEL_WRITES_PAST_THE_TOKENS, SHARED_KERNEL_WRITES_PAST_THE_ROWS),
        (
            ("tests/test_cuda_on_cpu_attention_pool.py",),
            ("tests/test_cuda_on_cpu_shared_penalty.py", "-k", "not many"),
            ("tests/test_gpu_kernels_on_shared_cases.py", "-k", "cuda"),
            ("tests/test_fuzz_gpu_kernels.py", "-k", "cuda"),
        ),
        {"CUDA_ON_CPU_FLAGS": f"{ADDRESS} {STRICT}"},
    ),
    "thread": Kind(
        "-fsanitize=thread -DFUSEFEAT_BYTES_PER_WORKER=256",
        ("libtsan.so",),
        (SHARED_SCRATCH,),
        # Which threads meet where does not depend on the instruction set.
        ((*KERNELS, "-k", "{isa}"),),
        {},
    ),
}


def library(name: str) -> str:
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"sanitize: the compiler has no {name}")
    return path


def threads_library(folder: Path) -> str:
    path = folder / "libthreads.so"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-shared", "-fPIC"]
    subprocess.run([*command, str(HERE / "threads.cpp"), "-o", str(path)], check=True)
    return str(path)


def check(name: str, arguments: list[str]) -> list[str]:
    """What went wrong, one line each."""
    kind = KINDS[name]
    folder = ROOT / "build" / f"sanitize-{name}"
    copy = TreeCopy(folder, f"-O1 -g1 {kind.compile_flags}", kind.compile_flags.partition(" ")[0])
    if kind.compile_flags:
        copy.build()
    else:
        copy.use_built()
    preload = [library(one) for one in kind.preload]
    if name == "thread":
        preload.append(threads_library(folder))
    variables = OPTIONS | kind.variables | {"LD_PRELOAD": ":".join(preload)}
    facts = "import fusefeat as f; print(f.__file__, f._library.STATE.cpu_loaded, f._library.isa()['best'])"
    where = copy.run(["-c", facts], **variables).stdout
    if where.split()[:2] != [str(copy.package / "__init__.py"), "True"]:
        return [f"{name}: the build does not load:\n{where}"]
    isa = where.split()[2]

    def pytest(*of: str) -> subprocess.CompletedProcess[str]:
        return copy.run(["-m", "pytest", "-x", "-q", "-s", "-p", "no:faulthandler", *of], **variables)

    failures = []
    for planted in kind.planted:
        begin = time.monotonic()
        with copy.planted(planted.fault, isa if kind.compile_flags else "") as errors:
            done = pytest(*planted.test.split(" ", 2))
        found = not errors and done.returncode != 0 and planted.report in done.stdout
        print(
            f"{name}: planted {planted.report}: {'found' if found else 'NOT FOUND'}, {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        if not found:
            failures.append(f"{name}: a planted fault was not found: {planted.fault}\n{errors}{done.stdout[-3000:]}")
    for run in kind.runs:
        begin = time.monotonic()
        done = pytest(*(word.format(isa=isa) for word in run), *arguments)
        summary = (done.stdout.strip().splitlines() or [""])[-1]
        print(
            f"{name}: {' '.join(run)}: exit status {done.returncode}, {summary}, {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        if done.returncode != 0:
            failures.append(f"{name}: {' '.join(run)}\n{done.stdout[-6000:]}")
    return failures


def main() -> int:
    names = [argument for argument in sys.argv[1:] if argument in KINDS]
    arguments = [argument for argument in sys.argv[1:] if argument not in KINDS]
    failures = [failure for name in names or KINDS for failure in check(name, arguments)]
    for failure in failures:
        print(f"\n{failure}")
    print("sanitize: FAILED" if failures else "sanitize: clean")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
