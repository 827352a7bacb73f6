"""What every example shares: arguments, seed, device, progress, checkpoints, curves, timing."""

from .run import Run, parser
from .timing import Timing, bounded_compile, interleaved, table
from .training import fit

__all__ = ["Run", "Timing", "bounded_compile", "fit", "interleaved", "parser", "table"]
