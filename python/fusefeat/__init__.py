"""Fused feature-learning ops for PyTorch: attention softmax-pooling without the big intermediate tensors."""

from . import functional, nn
from ._version import __version__
from .functional import attention_pool, softmax_pool
from .nn import Attention, AttentionPool

__all__ = [
    "Attention",
    "AttentionPool",
    "__version__",
    "attention_pool",
    "functional",
    "nn",
    "softmax_pool",
]
