"""What every example shares: arguments, seed, device, progress, checkpoints, curves, comparisons, data, timing."""

from .classify import fit_classifier, loader, score_classifier
from .comparison import compare, read_curves
from .data import digit_splits, few_per_class, upscaled
from .run import Run, parser
from .timing import Timing, bounded_compile, interleaved, table
from .training import Metrics, fit

__all__ = [
    "Metrics",
    "Run",
    "Timing",
    "bounded_compile",
    "compare",
    "digit_splits",
    "few_per_class",
    "fit",
    "fit_classifier",
    "interleaved",
    "loader",
    "parser",
    "read_curves",
    "score_classifier",
    "table",
    "upscaled",
]
