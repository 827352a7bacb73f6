"""Modules around the fused ops."""

from .attention_pool import Attention, AttentionPool

__all__ = ["Attention", "AttentionPool"]
