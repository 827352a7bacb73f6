"""The pools of ``bags.py`` written in plain PyTorch, as the yardstick for the compiled ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Layout = Literal["packed", "padded"]


class PlainSoftmaxPool(nn.Module):
    """Softmax-pooling of packed bags, bound to one batch so that its index tensors cost nothing when timed."""

    segment: Tensor
    slot: Tensor

    def __init__(self, cu_seqlens: Tensor, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        sizes = cu_seqlens.diff()
        self.bags, self.longest = len(sizes), int(sizes.max())
        segment = torch.repeat_interleave(torch.arange(self.bags, device=sizes.device), sizes)
        position = torch.arange(len(segment), device=sizes.device) - cu_seqlens[segment]
        self.register_buffer("segment", segment)
        self.register_buffer("slot", segment * self.longest + position)

    def forward(self, values: Tensor, scores: Tensor) -> Tensor:
        return self.packed(values, scores) if self.layout == "packed" else self.padded(values, scores)

    def packed(self, values: Tensor, scores: Tensor) -> Tensor:
        peak = scores.new_full((self.bags,), -torch.inf)
        peak = peak.scatter_reduce(0, self.segment, scores.detach(), "amax")
        exponential = (scores - peak[self.segment]).exp()
        total = scores.new_zeros(self.bags).scatter_add(0, self.segment, exponential)
        weights = exponential / total[self.segment]
        # Scattering along an expanded index takes less time here, forward and backward, than index_add.
        index = self.segment[:, None].expand_as(values)
        return values.new_zeros(self.bags, values.shape[1]).scatter_add(0, index, weights[:, None] * values)

    def padded(self, values: Tensor, scores: Tensor) -> Tensor:
        slots, channels = self.bags * self.longest, values.shape[1]
        padded_values = values.new_zeros(slots, channels).index_copy(0, self.slot, values)
        padded_scores = scores.new_full((slots,), -torch.inf).index_copy(0, self.slot, scores)
        weights = padded_scores.view(self.bags, self.longest).softmax(1)
        return torch.einsum("bt,btd->bd", weights, padded_values.view(self.bags, self.longest, channels))


class PlainAttentionPool(nn.Module):
    """``fusefeat.AttentionPool`` as published, or (``factorised``) with its projection moved behind the pooling."""

    def __init__(self, linear_in: nn.Linear, linear_out: nn.Linear, pool: PlainSoftmaxPool, factorised: bool) -> None:
        super().__init__()
        self.linear_in, self.linear_out, self.pool, self.factorised = linear_in, linear_out, pool, factorised

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.factorised:
            query = (self.linear_out.weight @ self.linear_in.weight).squeeze(0)
            return self.linear_in(self.pool(x, x @ query))
        hidden = self.linear_in(x)
        return self.pool(hidden, self.linear_out(hidden).squeeze(-1))


class PlainGatedPool(nn.Module):
    """Gated attention whose softmax-pooling is plain PyTorch."""

    def __init__(self, gate: nn.Module, pool: PlainSoftmaxPool) -> None:
        super().__init__()
        self.gate, self.pool = gate, pool

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.pool(x, self.gate(x))
