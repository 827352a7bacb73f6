"""The public functions, a module per family."""

from ._penalty import SharedStats
from .attention_pool import attention_pool, softmax_pool
from .clamped_reg import ClampStats, clamped_activation, clamped_reg
from .shared_penalty import shared_assignment, shared_objective, shared_penalty

__all__ = [
    "ClampStats",
    "SharedStats",
    "attention_pool",
    "clamped_activation",
    "clamped_reg",
    "shared_assignment",
    "shared_objective",
    "shared_penalty",
    "softmax_pool",
]
