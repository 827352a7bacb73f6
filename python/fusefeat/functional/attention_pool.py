"""The public pools. Each checks its arguments, chooses a backend and calls the operator."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from .. import backends, checks
from ..ops import attention_pool as pools
from ..reference import attention_pool as reference


@overload
def attention_pool(
    x: Tensor,
    query: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    return_weights: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention_pool(
    x: Tensor,
    query: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    return_weights: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_pool(
    x: Tensor,
    query: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    return_weights: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention_pool(
    x: Tensor,
    query: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 1.0,
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention softmax-pooling with scores computed inside: one pass over ``x``.

    .. math:: s_{btk} = \text{scale} \cdot \langle x_{bt}, q_k \rangle, \qquad
        \text{out}_{bk} = \sum_t \operatorname{softmax}_t(s_{b \cdot k})_t \, x_{bt}

    Attention-based multiple-instance pooling (Ilse, Tomczak & Welling 2018) with the linear score folded into a
    query; with ``K`` queries, the pooling heads of set transformers (Lee et al. 2019) and of vision encoders.

    Args:
        x: tokens, [B,T,D] padded, or [S,D] packed with ``cu_seqlens``; float16, bfloat16, float32 or float64, any
            strides.
        query: [D] or [K,D], in the dtype of ``x`` or its accumulation type (float32 for half types and float32,
            float64 for float64).
        mask: [B,T] bool, True = keep. Masked tokens are not read. Not allowed with ``cu_seqlens``.
        cu_seqlens: [B+1] int32 or int64 offsets of the packed bags: first 0, last S, non-decreasing. Values are
            verified on eager CPU tensors only; elsewhere kernels clamp them to [0, S].
        scale: factor on the scores, a finite number.
        return_weights: also return the attention weights, differentiable.
        backend: None (automatic), "reference", "cpu", "cuda" or "triton".

    Returns:
        [B,D], or [B,K,D] when ``query`` is [K,D], in the dtype of ``x``; with ``return_weights`` a pair of it and
        the weights [B,T], [B,T,K], [S] or [S,K]. A bag without a kept token gives 0, weights 0, gradients 0. A
        kept NaN or a score of +inf makes its bag NaN; a score of -inf acts like a masked token.

    Raises:
        TypeError: wrong types or dtypes. ValueError: wrong shapes, devices, offsets, or a backend that cannot take
        the input. NotImplementedError: forward-mode differentiation on a compiled backend.
    """
    checks.tokens_and_layout("attention_pool", "x", x, mask, cu_seqlens)
    checks.query("attention_pool", query, x)
    scale = checks.finite_number("attention_pool", "scale", scale)
    checks.flag("attention_pool", "return_weights", return_weights)
    out, _, weights = _attention_pool(x, query, mask, cu_seqlens, scale, return_weights, backend)
    out = out if out.dtype == x.dtype else out.to(x.dtype)
    return (out, weights.to(x.dtype)) if return_weights else out


def _attention_pool(
    x: Tensor,
    query: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    need_weights: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked arguments in; out, lse and weights in the accumulation type out."""
    chosen = backends.choose("attention_pool", backend, x)
    if chosen == "reference":
        return reference.attention_pool(x, query, mask, cu_seqlens, scale)
    checks.no_forward_mode("attention_pool", x, query)
    return pools.pool("attention_pool", chosen)(x, query, mask, cu_seqlens, scale, need_weights)


@overload
def softmax_pool(
    values: Tensor,
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_weights: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def softmax_pool(
    values: Tensor,
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_weights: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def softmax_pool(
    values: Tensor,
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_weights: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def softmax_pool(
    values: Tensor,
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax-pooling with scores from any network: ``out[b,k] = sum_t softmax_t(scores[b,:,k])[t] values[b,t]``.

    The pooling of gated attention MIL (Ilse, Tomczak & Welling 2018), attentive statistics (Okabe et al. 2018) and
    global attention on graphs (Li et al. 2016), without a [B,T,D] product in memory.

    Args:
        values: [B,T,D] padded, or [S,D] packed with ``cu_seqlens``; float16, bfloat16, float32 or float64.
        scores: [B,T], [B,T,K], [S] or [S,K], in the dtype of ``values`` or its accumulation type. A score of -inf
            acts like a masked token, for its query.
        mask, cu_seqlens, return_weights, backend: as in :func:`attention_pool`.

    Returns:
        [B,D], or [B,K,D] when the scores have a K axis, in the dtype of ``values``; with ``return_weights`` a pair
        of it and the weights, in the shape and dtype of ``scores``.

    Raises:
        As :func:`attention_pool`.
    """
    checks.tokens_and_layout("softmax_pool", "values", values, mask, cu_seqlens)
    checks.scores("softmax_pool", scores, values)
    checks.flag("softmax_pool", "return_weights", return_weights)
    chosen = backends.choose("softmax_pool", backend, values)
    if chosen == "reference":
        out, _, weights = reference.softmax_pool(values, scores, mask, cu_seqlens)
    else:
        checks.no_forward_mode("softmax_pool", values, scores)
        pool = pools.pool("softmax_pool", chosen)
        out, _, weights = pool(values, scores, mask, cu_seqlens, return_weights)
    out = out if out.dtype == values.dtype else out.to(values.dtype)
    return (out, weights.to(scores.dtype)) if return_weights else out
