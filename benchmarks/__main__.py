"""Benchmarks of fusefeat beside its peers: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from . import FAMILIES, against, environment, plot, report, scaling
from .case import DTYPES, Case, Skip
from .progress import Progress
from .results import Run
from .runner import Settings, run_case


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _dtypes(text: str) -> list[str]:
    names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    words = [names.get(word, word) for word in _words(text)]
    unknown = [word for word in words if word not in DTYPES]
    if unknown or not words:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(DTYPES)}, got {text!r}")
    return words


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time above 0, got {text}")
    return value


def _file(text: str) -> Path | None:
    """Where to write; told at once, not after an hour of measuring, when that cannot be."""
    if not text:
        return None
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent} cannot be made: {error}") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written")
    return path


def _picture(text: str) -> Path | None:
    path = _file(text)
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"expected the name of a .png (or .svg, .pdf) file, got {text}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("families", nargs="*", metavar="family", help=f"some of {', '.join(FAMILIES)}; all of them by default")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", type=_dtypes, default=["fp32"], metavar="fp32,bf16,...", help="; ".join(DTYPES))
    add("--threads", type=_positive, default=torch.get_num_threads(), help="CPU threads (default: as torch has it)")
    add("--only", type=_words, metavar="SHAPE,...", help="cases whose name or shape contains one of these words")
    add(
        "--compare",
        type=_words,
        metavar="PEER,...",
        help="only these peers: eager, compile, sdpa, ...; 'none' for none",
    )
    add("--rounds", type=_positive, default=5, help="interleaved rounds (default 5)")
    add("--slice", type=_seconds, default=0.1, metavar="SECONDS", help="time per contender and round (default 0.1)")
    add("--quick", action="store_true", help="tiny shapes, two short rounds, no torch.compile unless asked for")
    add("--cold", action="store_true", help="no call finds its inputs in the caches (copies of them in turn)")
    add("--scaling", action="store_true", help="the sizes of a scaling plot (T, D, ...) in place of the usual shapes")
    add("--against", metavar="GITREF", help="build that commit elsewhere and time it beside this tree, nothing else")
    add("--slow", action="store_true", help="also the cases that take minutes; --only NAME runs one of them, too")
    add("--thp", choices=("on", "off", "both"), help="let torch allocate huge pages too; both: one run of each")
    add("--limit", type=_seconds, metavar="SECONDS", help="begin no further case after that time, name the others")
    add("--csv", type=_file, metavar="FILE", help="write all rows, anew after each case")
    add("--update", action="store_true", help="keep the CSV file's rows of other cases, and draw them, too")
    add("--plot", type=_picture, metavar="FILE", help="write charts (PNG): bars, or lines with --scaling")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _matches(word: str, case: Case) -> bool:
    return word in case.name or word in case.shape


def _wanted(cases: Sequence[Case], only: Sequence[str] | None, slow: bool) -> list[Case]:
    if only is None:
        return [case for case in cases if slow or not case.slow]
    return [case for case in cases if any(_matches(word, case) for word in only)]


def _check_only(parser: argparse.ArgumentParser, only: Sequence[str] | None, cases: Sequence[Case]) -> None:
    """Every word must be of use, or a shape that was misspelt would be missed later."""
    unused = [word for word in only or () if not any(_matches(word, case) for case in cases)]
    if unused or only == []:
        names = ", ".join(dict.fromkeys(case.name for case in cases))
        parser.error(f"--only {','.join(unused)}: no case of that name or shape; there are {names}")


def _cases(module: ModuleType, device: torch.device, dtype: str, arguments: argparse.Namespace) -> list[Case]:
    if not arguments.scaling:
        return list(module.cases(device, DTYPES[dtype], arguments.quick))
    axes = module.scaling(device, DTYPES[dtype], arguments.quick)
    return [case for sizes in axes.values() for _, case in sizes]


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, save: Callable[[Run], None]) -> Run:
    """Everything that was asked for, in this process; saved after every case."""
    begin = time.monotonic()
    device = torch.device(arguments.device)
    modules = [importlib.import_module(f".{family}", __package__) for family in arguments.families]
    there = [(dtype, _cases(module, device, dtype, arguments)) for module in modules for dtype in arguments.dtype]
    _check_only(parser, arguments.only, [case for _, cases in there for case in cases])
    work = [(dtype, _wanted(cases, arguments.only, arguments.slow)) for dtype, cases in there]
    known = {contender.peer for _, cases in work for case in cases for contender in case.contenders if contender.peer}
    peers = arguments.compare
    if peers is None and arguments.quick:
        peers = sorted(known - {"compile"})
    unknown = sorted(set(peers or ()) - known - {"none"})
    if unknown:
        parser.error(f"--compare: no peer {', '.join(unknown)} here; there are {', '.join(sorted(known))}")
    settings = Settings(
        device=device,
        threads=arguments.threads,
        rounds=min(arguments.rounds, 2) if arguments.quick else arguments.rounds,
        seconds=min(arguments.slice, 0.005) if arguments.quick else arguments.slice,
        huge_pages=environment.huge_pages(),
        peers=peers,
        cold=arguments.cold,
    )
    torch.set_num_threads(settings.threads)
    run = Run(environment.facts(device, settings.threads))
    progress = Progress(sum(len(cases) for _, cases in work))
    remaining = [(dtype, case) for dtype, cases in work for case in cases]
    try:
        while remaining and (arguments.limit is None or time.monotonic() - begin < arguments.limit):
            dtype, case = remaining[0]
            run.about[case.name] = case.used_by
            run.rows += run_case(case, dtype, settings, progress.say)
            save(run)
            progress.step()
            del remaining[0]
    except KeyboardInterrupt:
        run.interrupted = True
    run.left_out = [f"{case.family} {case.name} {dtype}" for dtype, case in remaining]
    progress.close()
    if not (arguments.quick or arguments.scaling):
        run.targets = [target for module in modules for target in module.targets(run.rows)]
    return run


def _run_in_child(argv: Sequence[str], huge_pages: str) -> list[Run]:
    """The same in a new process: torch reads the variable when it first allocates."""
    variables = os.environ | {environment.HUGE_PAGES: "1" if huge_pages == "on" else "0"}
    # Later options win: the child prints JSON, this process writes the files.
    command = [sys.executable, "-m", "benchmarks", *argv, "--thp", huge_pages, "--json", "--csv", "", "--plot", ""]
    child = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    if not child.stdout:
        raise SystemExit(child.returncode or 1)
    return report.from_json(child.stdout)


def _draw(write: Callable[[Path, Sequence[Run]], None], path: Path, runs: Sequence[Run]) -> None:
    try:
        write(path, runs)
    except Skip as skip:
        print(f"no plot: {skip}", file=sys.stderr)


def _run_against(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """This tree and another commit in turn, ours alone."""
    device = torch.device(arguments.device)
    there = [
        (dtype, _cases(importlib.import_module(f".{family}", __package__), device, dtype, arguments))
        for family in arguments.families
        for dtype in arguments.dtype
    ]
    _check_only(parser, arguments.only, [case for _, cases in there for case in cases])
    work = [
        (case.family, dtype, case.name, case.shape)
        for dtype, cases in there
        for case in _wanted(cases, arguments.only, arguments.slow)
    ]
    rounds, seconds = (2, 0.005) if arguments.quick else (arguments.rounds, arguments.slice)
    rows: list[against.Comparison] = []
    with against.built(arguments.against, arguments.device) as path:
        workers = [
            against.Process(p, arguments.device, arguments.threads, seconds) for p in (path, against.ROOT / "python")
        ]
        try:
            progress = Progress(len(work))
            for family, dtype, name, shape in work:
                progress.say(f"{family} {name} {shape} {dtype}")
                rows += against.compare(*workers, family, dtype, name, shape, rounds, arguments.quick)
                progress.step()
            progress.close()
        finally:
            for worker in workers:
                worker.close()
    print(against.text(arguments.against, rows), flush=True)
    if arguments.csv:
        report.write_plain_csv(arguments.csv, rows)
    if arguments.plot:
        _draw(
            plot.write,
            arguments.plot,
            [Run({}, against.as_rows(arguments.against, arguments.device, arguments.threads, rows))],
        )
    return int(any(row.reason.startswith("this tree") for row in rows))


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    unknown = [family for family in arguments.families if family not in FAMILIES]
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    arguments.families = arguments.families or list(FAMILIES)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: {environment.why_no_cuda()}")
    if arguments.update and (arguments.scaling or not arguments.csv):
        parser.error("--update is about the file of --csv, of the usual shapes")
    if arguments.against:
        meaningless = [
            f"--{name}" for name in ("cold", "scaling", "thp", "limit", "json", "update") if getattr(arguments, name)
        ]
        if meaningless:
            parser.error(f"--against does not go with {', '.join(meaningless)}")
        if arguments.compare:
            print("--against times fusefeat alone: --compare has no effect", file=sys.stderr)
        return _run_against(parser, arguments)

    def save(run: Run) -> None:
        if arguments.csv:
            report.write_csv(arguments.csv, [run], arguments.update)

    if arguments.thp in (None, environment.huge_pages()):
        runs = [_run(parser, arguments, save)]
    else:
        ways = ("off", "on") if arguments.thp == "both" else (arguments.thp,)
        runs = [run for way in ways for run in _run_in_child(argv, way)]
    print(report.to_json(runs) if arguments.json else "\n\n".join(map(report.text, runs)), flush=True)
    if arguments.csv:
        report.write_csv(arguments.csv, runs, arguments.update)
    if arguments.plot:
        drawn = [Run({}, report.read_csv(arguments.csv))] if arguments.update else runs
        _draw((scaling if arguments.scaling else plot).write, arguments.plot, drawn)
    if any(run.interrupted for run in runs):
        return 130
    if any(run.ours_failed for run in runs):
        print("fusefeat failed the correctness gate: see the table", file=sys.stderr)
        return 1
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Who is told to stop, by a person or by a time limit, still prints what there is.
    signal.signal(signal.SIGTERM, _interrupt)
    raise SystemExit(main(sys.argv[1:]))
