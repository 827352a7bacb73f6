"""Plants the faults of the tables one at a time in a copy of the tree and runs the test that must notice.

    python tests/mutation            # all of them; what has been compiled is kept in build/mutation
    python tests/mutation triton     # one table, or several
    python tests/mutation -k scale   # faults whose file or name holds a word

Exit status 1 when a fault survives, does not compile, or is no longer found in the sources, and when a test fails
without any fault.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

from tree_copy import ROOT, TreeCopy  # noqa: E402

from mutation.table import Row  # noqa: E402

TABLES = ("cpu_pools", "cpu_pairs", "cpu_shared", "cuda", "cuda_shared", "triton", "triton_shared", "python")
PYTEST = ("-x", "-q", "--no-header")
PRELOADED = ("torch", "triton", "triton.language", "numpy", "pytest", "_pytest.assertion.rewrite")
Runner = Callable[[TreeCopy, list[str], dict[str, str]], tuple[int, str]]


def read(names: list[str]) -> list[Row]:
    return [row for name in names for row in importlib.import_module(f"mutation.faults_{name}").FAULTS]


def passes_clean(copy: TreeCopy, test: str, isa: str, runner: Runner) -> str:
    """What a test says of the sources as they are, "" when it passes."""
    code, output = runner(copy, *split(test.format(isa=isa)))
    return f"FAILS WITHOUT A FAULT: {test}\n{output[-2000:]}" if code else ""


def outcome(copy: TreeCopy, row: Row, isa: str, runner: Runner) -> str:
    """ "caught", or what is wrong."""
    problem = row.fault.problem(copy.tree)
    if problem:
        return f"GONE: {problem}"
    with copy.planted(row.fault, isa if row.compiled else "") as errors:
        if errors:
            return f"DOES NOT COMPILE: {errors[-2000:]}"
        code, _ = runner(copy, *split(row.test.format(isa=isa)))
    return "caught" if code else f"SURVIVED: {row.test}"


def in_process(copy: TreeCopy, arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
    done = copy.run(["-m", "pytest", *PYTEST, *arguments], **variables)
    return done.returncode, done.stdout


def in_fork(copy: TreeCopy, arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """The same in a child that has torch, Triton and pytest imported already, which takes longer than most tests."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.chdir(copy.tree)
                os.environ |= variables
                sys.modules["torch"].set_num_threads(1)
                sys.path[:] = [str(copy.tree / "python"), *(path for path in sys.path if path != str(HERE.parent))]
                sys.dont_write_bytecode = True
                code = int(sys.modules["pytest"].main([*PYTEST, *arguments]))
                assert Path(str(sys.modules["fusefeat"].__file__)).is_relative_to(copy.tree)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
                code = 1
            os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return abs(os.waitstatus_to_exitcode(status)), output.read()


def split(test: str) -> tuple[list[str], dict[str, str]]:
    """Arguments of pytest: files, then the rest of the line for -k. And the variables that come first."""
    first, _, words = test.partition(" -k ")
    variables = dict(word.split("=") for word in first.split() if "=" in word)
    files = [word for word in first.split() if "=" not in word]
    return [*files, *(["-k", words] if words else [])], variables


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mutation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("-k", dest="word", default="", help="only faults whose file or name holds this")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutation", help="of the copy and its build")
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}")
    chosen = [r for r in read(arguments.tables or list(TABLES)) if arguments.word in f"{r.fault.file} {r.what}"]
    copy = TreeCopy(arguments.folder.resolve())
    if any(row.compiled for row in chosen):
        copy.build()
    else:
        copy.use_built()
    isa = copy.run(["-c", "from fusefeat import _library; print(_library.isa()['best'])"]).stdout.strip()
    os.environ.setdefault("CUDA_ON_CPU_FLAGS", "-O0")  # compiling takes longer than running
    os.environ |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(copy.package.parent)}
    failed = 0

    def report(what: str, result: str, good: str) -> bool:
        nonlocal failed, begin
        failed += result != good
        print(f"{time.monotonic() - begin:6.1f} s  {what}: {result or 'passes without a fault'}", flush=True)
        begin = time.monotonic()
        return result == good

    begin = time.monotonic()
    tests = {row.test for row in chosen}
    sound = {test for test in sorted(tests) if report(test, passes_clean(copy, test, isa, in_fork), "")}
    caught = 0
    for row in chosen:
        if row.test in sound:
            caught += report(f"{row.fault.file}: {row.what}", outcome(copy, row, isa, in_fork), "caught")
    print(f"{caught} of {len(chosen)} faults caught")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
