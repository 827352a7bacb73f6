"""The table of planted faults fits the sources, and the machinery tells a caught fault from one that survives."""

from __future__ import annotations

from pathlib import Path

from mutation import table
from mutation.__main__ import TABLES, in_process, outcome, passes_clean, read, split
from sanitize.run import KINDS
from tree_copy import ROOT, TreeCopy

ROWS = read(list(TABLES))


def test_every_fault_is_found_once_in_the_sources() -> None:
    faults = [row.fault for row in ROWS] + [planted.fault for kind in KINDS.values() for planted in kind.planted]
    problems = [problem for fault in faults if (problem := fault.problem())]
    assert not problems, "\n".join(problems)
    assert len(set(faults)) == len(faults) >= 40


def test_every_test_is_there() -> None:
    for row in ROWS:
        files = [part for part in split(row.test)[0] if part.endswith(".py")]
        assert files and all((ROOT / file).exists() for file in files), row


def test_a_fault_that_is_caught_and_one_that_survives(tmp_path: Path) -> None:
    copy = TreeCopy(tmp_path)
    copy.use_built()
    file, test = "python/fusefeat/functional/clamped_reg.py", "tests/test_shared_penalty.py -k definition"
    caught, survives, gone = table.rows(
        file,
        test,
        ("mean over rows only", "reg = excess / (safe_total * max(features, 1))", "reg = excess / safe_total"),
        ("a comment", "# sum_k R_nk is the excess", "# sum_k R_nk is excess"),
        ("text that is not there", "no such text", "text"),
    )
    assert outcome(copy, caught, "", in_process) == "caught"
    assert outcome(copy, survives, "", in_process).startswith("SURVIVED")
    assert outcome(copy, gone, "", in_process).startswith("GONE")
    assert passes_clean(copy, test, "", in_process) == ""
    assert "WITHOUT A FAULT" in passes_clean(copy, "tests/test_shared_penalty.py -k no_such_test", "", in_process)
    assert (copy.tree / file).read_text() == (ROOT / file).read_text()
