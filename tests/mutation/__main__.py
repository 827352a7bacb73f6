"""Plants the faults of the tables one at a time in a copy of the tree and runs the test that must notice.

    python tests/mutation            # all of them; what has been compiled is kept in build/mutation
    python tests/mutation triton     # one table, or several
    python tests/mutation -k scale   # faults whose file or name holds a word

Exit status 1 when a fault survives, does not compile, or is no longer found in the sources.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tree_copy import ROOT, TreeCopy

from mutation.table import Row

TABLES = ("cpu_pools", "cpu_shared", "cuda", "triton", "python")
NO_TESTS = (4, 5)  # exit statuses of pytest: bad usage, nothing collected
PYTEST = ("-x", "-q", "--no-header")
PRELOADED = ("torch", "triton", "triton.language", "numpy", "pytest", "_pytest.assertion.rewrite")
Runner = Callable[[TreeCopy, list[str]], tuple[int, str]]


def read(names: list[str]) -> list[Row]:
    return [row for name in names for row in importlib.import_module(f"mutation.{name}").FAULTS]


def outcome(copy: TreeCopy, row: Row, isa: str, runner: Runner) -> str:
    """ "caught", or what is wrong."""
    problem = row.fault.problem(copy.tree)
    if problem:
        return f"GONE: {problem}"
    with copy.planted(row.fault, isa if row.compiled else "") as errors:
        if errors:
            return f"DOES NOT COMPILE: {errors[-2000:]}"
        code, output = runner(copy, split(row.test.format(isa=isa)))
    if code in NO_TESTS:
        return f"NOT TESTED: {row.test}\n{output[-2000:]}"
    return "caught" if code else f"SURVIVED: {row.test}"


def in_process(copy: TreeCopy, arguments: list[str]) -> tuple[int, str]:
    done = copy.run(["-m", "pytest", *PYTEST, *arguments])
    return done.returncode, done.stdout


def in_fork(copy: TreeCopy, arguments: list[str]) -> tuple[int, str]:
    """The same in a child that has torch, Triton and pytest imported already, which takes longer than most tests."""
    os.environ |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(copy.tree / "python")}
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
                sys.modules["torch"].set_num_threads(1)
                own = [path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT / "tests")]
                sys.path[:] = [str(copy.tree / "python"), *own]
                for name in [name for name in sys.modules if name.partition(".")[0] in ("mutation", "tree_copy")]:
                    del sys.modules[name]
                sys.dont_write_bytecode = True
                code = int(sys.modules["pytest"].main([*PYTEST, *arguments]))
                loaded = sys.modules.get("fusefeat")
                if loaded is not None and not Path(str(loaded.__file__)).is_relative_to(copy.tree):
                    code = NO_TESTS[0]
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
                code = NO_TESTS[0]
            os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return abs(os.waitstatus_to_exitcode(status)), output.read()


def split(test: str) -> list[str]:
    """Files, then the rest of the line for -k."""
    files, _, words = test.partition(" -k ")
    return [*files.split(), *(["-k", words] if words else [])]


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
    bad = 0
    for row in chosen:
        begin = time.monotonic()
        result = outcome(copy, row, isa, in_fork)
        bad += result != "caught"
        print(f"{time.monotonic() - begin:6.1f} s  {row.fault.file}: {row.what}: {result}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} faults caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
