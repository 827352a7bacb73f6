"""What a row of the table of faults is. To add one: a file, a text that occurs in it exactly once, what it becomes."""

from __future__ import annotations

from dataclasses import dataclass

from tree_copy import Fault


@dataclass(frozen=True)
class Row:
    what: str
    fault: Fault
    test: str  # variables and arguments of the pytest that must fail; {isa}: the best instruction set of the machine

    @property
    def compiled(self) -> bool:
        """Whether the CPU library is compiled from the file. CUDA kernels are compiled by their tests."""
        return self.fault.file.startswith(("csrc/cpu/", "csrc/common/"))


def rows(file: str, test: str, *faults: tuple[str, str, str] | tuple[str, str, str, str]) -> list[Row]:
    """Faults of one file: (what, text, replacement), and another test where the usual one is not the one."""
    return [Row(what, Fault(file, text, new), (*rest, test)[0]) for what, text, new, *rest in faults]
