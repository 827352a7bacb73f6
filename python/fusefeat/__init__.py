"""Fused feature-learning ops for PyTorch: attention softmax-pooling, the shared penalty and the clamped regulariser,
without the big intermediate tensors."""

from . import functional, nn
from ._version import __version__
from .functional import (
    ClampStats,
    SharedStats,
    attention_pool,
    clamped_activation,
    clamped_reg,
    shared_assignment,
    shared_objective,
    shared_penalty,
    softmax_pool,
)
from .nn import (
    Attention,
    AttentionPool,
    AutoFeatureExtractor,
    AutoLearningLayer,
    ShareableLoss,
    ShareableReg,
)

__all__ = [
    "Attention",
    "AttentionPool",
    "AutoFeatureExtractor",
    "AutoLearningLayer",
    "ClampStats",
    "ShareableLoss",
    "ShareableReg",
    "SharedStats",
    "__version__",
    "attention_pool",
    "clamped_activation",
    "clamped_reg",
    "functional",
    "nn",
    "shared_assignment",
    "shared_objective",
    "shared_penalty",
    "softmax_pool",
]
