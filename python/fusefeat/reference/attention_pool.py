"""Attention softmax-pooling in plain PyTorch: the definition of both pools in executable form.

Every product is written as multiply-and-sum rather than as a matmul, so that autocast leaves it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NEG_INF = float("-inf")


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation type: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bag_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Packed layout: the index of the bag each of the S tokens belongs to, [S] int64; B for a token of no bag."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    bag = torch.searchsorted(cu_seqlens[1:].long().contiguous(), position, right=True)
    return torch.where(position < cu_seqlens[0], cu_seqlens.shape[0] - 1, bag)


def _sum_per_bag(terms: Tensor, bag: Tensor | None, bags: int) -> Tensor:
    """Sum over tokens: [B,T,...] -> [B,...], or packed [S,...] -> [B,...]."""
    if bag is None:
        return terms.sum(1)
    # One slot more than bags, for tokens that unchecked offsets leave outside every bag.
    return terms.new_zeros((bags + 1, *terms.shape[1:])).index_add(0, bag, terms)[:bags]


def _pool_one_query(
    values: Tensor, score: Tensor, keep: Tensor, bag: Tensor | None, bags: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One query: scores [B,T] or [S] -> out [B,D], lse [B], weights like the scores."""
    if bag is not None:
        keep = keep & (bag < bags)
    score = torch.where(keep, score, NEG_INF)
    if bag is None:
        peak = score.detach().amax(1) if score.shape[1] else score.new_full((bags,), NEG_INF)
        peak = torch.where(peak == NEG_INF, 0.0, peak)
        peak_of_token = peak[:, None]
    else:
        peak = score.new_full((bags + 1,), NEG_INF).scatter_reduce(0, bag, score.detach(), "amax")
        peak = torch.where(peak == NEG_INF, 0.0, peak)
        peak_of_token, peak = peak[bag], peak[:bags]
    weight = torch.where(keep, torch.where(keep, score - peak_of_token, 0.0).exp(), 0.0)
    total = _sum_per_bag(weight, bag, bags)
    empty = total == 0
    safe_total = torch.where(empty, 1.0, total)
    if bag is None:
        weight = weight / safe_total[:, None]
    else:
        weight = weight / torch.cat([safe_total, safe_total.new_ones(1)])[bag]
    weight = torch.where(keep, weight, 0.0)
    out = _sum_per_bag(weight[..., None] * torch.where(keep[..., None], values, 0.0), bag, bags)
    lse = torch.where(empty, NEG_INF, peak.double() + safe_total.double().log())
    return out, lse, weight


def _pool(
    values: Tensor, score_columns: list[Tensor], keep_columns: list[Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    bag = None if cu_seqlens is None else bag_of_token(cu_seqlens, values.shape[0])
    bags = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    columns = [
        _pool_one_query(values, score, keep, bag, bags) for score, keep in zip(score_columns, keep_columns, strict=True)
    ]
    outs, lses, weights = zip(*columns, strict=True)
    return torch.stack(outs, 1), torch.stack(lses, 1), torch.stack(weights, -1)


def attention_pool(
    x: Tensor, query: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores s = scale * <x, query>, then softmax over each bag's tokens and the weighted sum.

    x [B,T,D] (or [S,D] with cu_seqlens [B+1]), query [D] or [K,D], mask [B,T] with True = keep.
    Returns out [B,(K,)D] and weights [B,T,(K)] or [S,(K)] in the accumulation type, and lse [B,(K)] in float64.
    """
    acc = acc_dtype(x.dtype)
    tokens = x.to(acc)
    scores, keeps = [], []
    for q in torch.atleast_2d(query.to(acc)).unbind(0):
        visible = tokens if mask is None else torch.where(mask[..., None], tokens, 0.0)
        keep = (scale * (visible.detach() * q.detach()).sum(-1)) != NEG_INF
        keep = keep if mask is None else keep & mask
        # Scored again from cleaned tokens: a dropped token must not reach a gradient as 0 * inf.
        scores.append(scale * (torch.where(keep[..., None], tokens, 0.0) * q).sum(-1))
        keeps.append(keep)
    out, lse, weights = _pool(tokens, scores, keeps, cu_seqlens)
    return (out, lse, weights) if query.dim() == 2 else (out.squeeze(1), lse.squeeze(1), weights.squeeze(-1))


def softmax_pool(
    values: Tensor, scores: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over each bag's tokens of given scores [B,T,(K)] or [S,(K)], then the weighted sum of the values.

    Shapes and results as in :func:`attention_pool`.
    """
    acc = acc_dtype(values.dtype)
    score_axis = scores.dim() == values.dim()
    columns = scores.to(acc).unbind(-1) if score_axis else (scores.to(acc),)
    keeps = [s != NEG_INF if mask is None else (s != NEG_INF) & mask for s in columns]
    out, lse, weights = _pool(values.to(acc), list(columns), keeps, cu_seqlens)
    return (out, lse, weights) if score_axis else (out.squeeze(1), lse.squeeze(1), weights.squeeze(-1))


def attention_layer(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    pool: Callable[..., Any] = attention_pool,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """nn.AttentionPool by its factorisation, around any pool and product of matrices.

    Returns out [B,H], pooled [B,D], lse [B], weights and the query [D].
    """
    acc = acc_dtype(x.dtype)
    weight_in = weight_in.to(acc)
    query = product(weight_out.to(acc), weight_in).squeeze(0)
    if bias_out is not None:
        # Takes part in the graph, so that its gradient is 0 rather than None, and in nothing else.
        never = torch.zeros((), dtype=torch.bool, device=x.device)
        query = query + torch.where(never, bias_out.to(acc), 0.0)
    pooled, lse, weights = pool(x, query, mask, cu_seqlens, 1.0)
    out = product(pooled, weight_in.t())
    if bias_in is not None:
        out = out + bias_in.to(acc)
    out = torch.where((lse != NEG_INF)[:, None], out, 0.0)
    return out, pooled, lse, weights, query
