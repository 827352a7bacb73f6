"""Modules around the fused ops."""

from .attention_pool import Attention, AttentionPool
from .auto_learning import AutoLearningLayer
from .clamped_reg import ShareableReg
from .feature_extractor import AutoFeatureExtractor
from .shared_penalty import ShareableLoss

__all__ = [
    "Attention",
    "AttentionPool",
    "AutoFeatureExtractor",
    "AutoLearningLayer",
    "ShareableLoss",
    "ShareableReg",
]
