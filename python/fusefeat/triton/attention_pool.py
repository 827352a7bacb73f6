"""The four operators of the pools in Triton: arguments and results as in the operator schema.

Nothing here looks at a tensor's values, and sizes may be symbolic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusefeat.triton import _attention_pool_tuning as tuning
from fusefeat.triton._attention_pool_backward import (
    pool_backward,
    pool_delta,
    pool_weight_dot,
    sum_partials,
)
from fusefeat.triton._attention_pool_forward import (
    pool_combine,
    pool_dots,
    pool_forward,
    pool_offsets,
    pool_weights,
)
from fusefeat.triton._launch import new_empty, triton_operator, wrap_triton

# Programs along the tokens: enough to fill any chip, few enough that joining their pieces costs nothing.
MAX_BLOCKS = 4096
MIN_BLOCK_ITEMS = 64
WEIGHTS_BLOCK = 512


@dataclass(frozen=True)
class Pool:
    """Sizes and addressing of one call. Token strides and channels count `vec` elements."""

    x: Tensor
    unused: Tensor  # stands for a tensor that is not given: tracing copies what a kernel might write to
    mask: Tensor | None
    cu_seqlens: Tensor | None
    bags: int
    tokens: int
    rows: int
    channels: int
    queries: int
    query_axis: bool
    vec: int
    items: int
    block_items: int
    blocks: int
    split: bool

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def empty(self) -> bool:
        return self.rows == 0 or self.bags == 0 or self.queries == 0

    def per_bag(self, *inner: int) -> tuple[int, ...]:
        return (self.bags, *((self.queries,) if self.query_axis else ()), *inner)

    def per_token(self) -> tuple[int, ...]:
        return (*self.x.shape[:-1], *((self.queries,) if self.query_axis else ()))

    def token_strides(self, tensor: Tensor | None) -> tuple[int, int]:
        """Bag and token stride in elements."""
        if tensor is None:
            return 0, 0
        return (0, tensor.stride(0)) if self.packed else (tensor.stride(0), tensor.stride(1))

    def score_strides(self, tensor: Tensor | None) -> tuple[int, int, int]:
        return (*self.token_strides(tensor), tensor.stride(-1) if tensor is not None and self.query_axis else 0)

    def vector_strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Bag, query and channel stride of a per-bag tensor."""
        return tensor.stride(0), tensor.stride(1) if self.query_axis else 0, tensor.stride(-1)

    def x_args(self) -> tuple[Any, ...]:
        bag, token = self.token_strides(self.x)
        return self.x, bag // self.vec, token // self.vec, self.x.stride(-1)

    def mask_args(self) -> tuple[Any, ...]:
        return self.unused if self.mask is None else self.mask, *self.token_strides(self.mask)

    def cu_args(self) -> tuple[Any, ...]:
        return (self.unused, 0) if self.cu_seqlens is None else (self.cu_seqlens, self.cu_seqlens.stride(0))

    def config(self, table: tuning.Table, most: int | None = None) -> tuning.Config:
        channels = self.channels if most is None else min(self.channels, most)
        return table.pick(channels, self.queries, self.acc == torch.float64)

    def new(self, *shape: int) -> Tensor:
        return new_empty(self.x, shape, self.acc)

    def new_lse(self, *shape: int | torch.SymInt) -> Tensor:
        return new_empty(self.x, shape, torch.float64)


def _cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def _vector_width(x: Tensor) -> int:
    """The largest of 8, 4, 2, 1 that divides channels and outer strides."""
    sizes = (x.shape[-1], *x.stride()[:-1])
    return next(width for width in (8, 4, 2, 1) if all(size % width == 0 for size in sizes))


def _make_pool(
    x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, queries: int, query_axis: bool, minor: Tensor, name: str
) -> Pool:
    torch._check(x.dim() == (3 if cu_seqlens is None else 2), lambda: "fusefeat: tokens must be [B,T,D] or [S,D]")
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    torch._check(minor.dtype in (x.dtype, acc) and minor.device == x.device, partial(_wrong, name))
    if cu_seqlens is None:
        bags, tokens = x.shape[0], x.shape[1]
        rows = bags * tokens
        torch._check(
            mask is None or (mask.shape == x.shape[:2] and mask.dtype == torch.bool and mask.device == x.device),
            lambda: "fusefeat: mask must be [B,T] bool",
        )
    else:
        torch._check(mask is None, lambda: "fusefeat: mask is not allowed with cu_seqlens")
        torch._check(
            cu_seqlens.dim() == 1
            and cu_seqlens.dtype in (torch.int32, torch.int64)
            and cu_seqlens.device == x.device
            and cu_seqlens.shape[0] >= 1,
            lambda: "fusefeat: cu_seqlens must be [B+1] int32 or int64",
        )
        bags, tokens = cu_seqlens.shape[0] - 1, x.shape[0]
        rows = tokens
    items = rows + bags
    # A piece costs queries x channels of scratch: at least so many tokens that scratch stays below 1/8 of x.
    least = max(MIN_BLOCK_ITEMS, 32 * queries // x.element_size())
    block_items: Any = torch.sym_max(least, _cdiv(items, MAX_BLOCKS))
    if cu_seqlens is None and tokens + 1 <= least:
        # Short bags of one length: whole ones only.
        block_items = block_items // (tokens + 1) * (tokens + 1)
        split = False
    else:
        split = items > block_items
    blocks = _cdiv(items, block_items)
    return Pool(
        x, x.new_empty(0), mask, cu_seqlens, bags, tokens, rows, x.shape[-1], queries, query_axis, _vector_width(x),
        items, block_items, blocks, split,
    )  # fmt: skip


def _attention(x: Tensor, query: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Pool:
    torch._check(
        query.dim() in (1, 2) and query.shape[-1] == x.shape[-1], lambda: "fusefeat: query must be [D] or [K,D]"
    )
    query_axis = query.dim() == 2
    return _make_pool(x, mask, cu_seqlens, query.shape[0] if query_axis else 1, query_axis, query, "query")


def _scored(values: Tensor, scores: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Pool:
    query_axis = scores.dim() == values.dim()
    torch._check(
        scores.dim() in (values.dim(), values.dim() - 1) and scores.shape[: values.dim() - 1] == values.shape[:-1],
        lambda: "fusefeat: scores has the wrong shape",
    )
    return _make_pool(values, mask, cu_seqlens, scores.shape[-1] if query_axis else 1, query_axis, scores, "scores")


def _query_args(query: Tensor) -> tuple[Any, ...]:
    return query, query.stride(0) if query.dim() == 2 else 0, query.stride(-1)


def _scaled(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Kernels take scale in float32: for float64 it goes into the query."""
    return (query * scale, 1.0) if query.dtype == torch.float64 else (query, scale)


def _dots(
    pool: Pool, query: Tensor | None, scale: float, grad_out: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Scores and <x, grad_out>, [rows, queries] each, where a program cannot hold all channels."""
    scores = None if query is None else pool.new(*pool.per_token())
    dots = None if grad_out is None else pool.new(*pool.per_token())
    config = pool.config(tuning.FORWARD, 512)
    programs = _cdiv(pool.rows, config.block_t) * _cdiv(pool.queries, config.block_k)
    wrap_triton(pool_dots)[(programs,)](
        *pool.x_args(),
        *((pool.unused, 0, 0) if query is None else _query_args(query)),
        *((pool.unused, 0, 0, 0) if grad_out is None else (grad_out, *pool.vector_strides(grad_out))),
        *pool.mask_args(), *pool.cu_args(),
        pool.unused if scores is None else scores, pool.unused if dots is None else dots,
        pool.bags, pool.tokens, pool.rows, pool.channels // pool.vec, pool.queries, scale,
        PACKED=pool.packed, HAS_QUERY=query is not None, HAS_GRAD=grad_out is not None,
        HAS_MASK=pool.mask is not None, VEC=pool.vec, BLOCK_T=config.block_t, BLOCK_K=config.block_k,
        BLOCK_D=config.block_d, num_warps=config.num_warps,
    )  # fmt: skip
    return scores, dots


def _forward(
    pool: Pool, query: Tensor | None, scores: Tensor | None, scale: float, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weights = pool.new(*pool.per_token()) if need_weights else pool.new(0)
    if pool.empty:
        out = pool.new(*pool.per_bag(pool.channels)).zero_()
        return out, pool.new_lse(*pool.per_bag()).fill_(float("-inf")), weights.zero_()
    out, lse = pool.new(*pool.per_bag(pool.channels)), pool.new_lse(*pool.per_bag())
    config = pool.config(tuning.FORWARD)
    if query is not None and pool.channels > config.block_d:
        scores, _ = _dots(pool, query, scale, None)
        query = None
    if query is None:
        # Channels are independent once scores are given: small tiles.
        config = pool.config(tuning.FORWARD, 512)
    tiles = max(_cdiv(pool.channels, config.block_d), 1)
    carry_out = carry_lse = owner = pool.unused
    if pool.split:
        carry_out = pool.new(pool.blocks, pool.queries, pool.channels)
        carry_lse = pool.new_lse(2, pool.blocks, pool.queries)
        owner = new_empty(pool.x, (pool.blocks,), torch.int64)
    store_raw = need_weights and query is not None
    wrap_triton(pool_forward)[(tiles * _cdiv(pool.queries, config.block_k), pool.blocks)](
        *pool.x_args(),
        *((pool.unused, 0, 0) if query is None else _query_args(query)),
        pool.unused if scores is None else scores, *pool.score_strides(scores),
        *pool.mask_args(), *pool.cu_args(),
        out, lse, weights if store_raw else pool.unused, carry_out, carry_lse, owner,
        pool.bags, pool.tokens, pool.channels // pool.vec, pool.queries, scale, pool.items, pool.block_items,
        PACKED=pool.packed, HAS_QUERY=query is not None, HAS_MASK=pool.mask is not None, STORE_RAW=store_raw,
        SPLIT=pool.split, VEC=pool.vec, BLOCK_T=config.block_t, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    if pool.split:
        wrap_triton(pool_combine)[(max(_cdiv(pool.channels, 64), 1) * pool.queries, pool.blocks)](
            carry_out, carry_lse, owner, *pool.cu_args(), out, lse,
            pool.tokens, pool.channels, pool.queries, pool.block_items,
            PACKED=pool.packed, BLOCK_S=64, BLOCK_D=64, num_warps=8,
        )  # fmt: skip
    if pool.packed:
        wrap_triton(pool_offsets)[(1,)](
            *pool.cu_args(), out, lse, pool.bags, pool.tokens, out.numel(), lse.numel(), BLOCK=1024, num_warps=8
        )
    if need_weights:
        source = weights if scores is None else scores
        wrap_triton(pool_weights)[(_cdiv(pool.rows * pool.queries, WEIGHTS_BLOCK),)](
            source, *pool.score_strides(source), *pool.mask_args(), *pool.cu_args(), lse, weights,
            pool.bags, pool.tokens, pool.rows, pool.queries,
            PACKED=pool.packed, HAS_MASK=pool.mask is not None, BLOCK=WEIGHTS_BLOCK, num_warps=4,
        )  # fmt: skip
    return out, lse, weights


def _delta(pool: Pool, grad_out: Tensor, grad_weights: Tensor | None, out: Tensor, weights: Tensor) -> Tensor:
    """<grad_out, out> + sum_t weights * grad_weights, per bag and query."""
    ends = carry = pool.unused
    if grad_weights is not None:
        ends, carry = pool.new(*pool.per_bag()), pool.new(pool.blocks, pool.queries)
        block_k = pool.config(tuning.BACKWARD).block_k
        wrap_triton(pool_weight_dot)[(_cdiv(pool.queries, block_k), pool.blocks)](
            weights, grad_weights, *pool.score_strides(grad_weights), *pool.cu_args(), ends, carry,
            pool.bags, pool.tokens, pool.queries, pool.items, pool.block_items,
            PACKED=pool.packed, BLOCK_T=64, BLOCK_K=block_k, num_warps=1,
        )  # fmt: skip
    delta = pool.new(*pool.per_bag())
    wrap_triton(pool_delta)[(pool.bags * pool.queries,)](
        grad_out, *pool.vector_strides(grad_out), out, *pool.cu_args(), ends, carry, delta,
        pool.tokens, pool.channels, pool.queries, pool.block_items,
        PACKED=pool.packed, HAS_GRAD_WEIGHTS=grad_weights is not None, BLOCK_S=64, BLOCK_D=256, num_warps=1,
    )  # fmt: skip
    return delta


def _backward(
    pool: Pool, grad_out: Tensor, grad_weights: Tensor | None, query: Tensor | None, scores: Tensor | None,
    scale: float, out: Tensor, lse: Tensor, weights: Tensor, need_x: bool, need_scores: bool, need_query: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad_x, grad_scores and the per-block parts of grad_query; [0] for those not needed."""
    _check_backward(pool, grad_out, grad_weights, out, lse, weights)
    grad_x = new_empty(pool.x, pool.x.shape if need_x else (0,))
    grad_scores = pool.unused if scores is None or not need_scores else new_empty(scores, scores.shape)
    partials = pool.new(pool.blocks, pool.queries, pool.channels) if need_query else pool.unused
    needs_ds = need_scores or query is not None
    config = pool.config(tuning.BACKWARD)
    query_blocks = _cdiv(pool.queries, config.block_k)
    dots = None
    if pool.channels > config.block_d and needs_ds:
        given, dots = _dots(pool, query, scale, grad_out)
        scores = given if query is not None else scores
    delta = None
    if needs_ds and (grad_weights is not None or query_blocks > 1 or pool.channels > config.block_d):
        delta = _delta(pool, grad_out, grad_weights, out, weights)

    def launch(all_queries: bool, need_x: bool, need_scores: bool, need_query: bool) -> None:
        tiles = max(_cdiv(pool.channels, config.block_d), 1)
        wrap_triton(pool_backward)[(tiles * (1 if all_queries else query_blocks), pool.blocks)](
            grad_out, *pool.vector_strides(grad_out),
            pool.unused if grad_weights is None else grad_weights, *pool.score_strides(grad_weights),
            *pool.x_args(),
            *((pool.unused, 0, 0) if query is None else _query_args(query)),
            pool.unused if scores is None else scores, *pool.score_strides(scores),
            *pool.mask_args(), *pool.cu_args(),
            out, lse, pool.unused if delta is None else delta, pool.unused if dots is None else dots,
            grad_x, grad_scores, partials,
            pool.bags, pool.tokens, pool.channels // pool.vec, pool.queries, scale, pool.items, pool.block_items,
            PACKED=pool.packed, HAS_QUERY=query is not None, HAS_SCORES=scores is not None, HAS_DOTS=dots is not None,
            HAS_MASK=pool.mask is not None, HAS_GRAD_WEIGHTS=grad_weights is not None, HAS_DELTA=delta is not None,
            ALL_QUERIES=all_queries, NEED_X=need_x, NEED_SCORES=need_scores, NEED_QUERY=need_query,
            VEC=pool.vec, BLOCK_T=config.block_t, BLOCK_K=config.block_k, BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip

    if query_blocks == 1:
        launch(False, need_x, need_scores, need_query)
    else:
        # grad_x needs all queries at once, grad_query must hold those it sums for.
        if need_x or need_scores:
            launch(True, need_x, need_scores, False)
        if need_query:
            launch(False, False, False, True)
    return grad_x, grad_scores, partials


def _wrong(name: str) -> str:
    return f"fusefeat: {name}: wrong shape, dtype or device"


def _check_backward(
    pool: Pool, grad_out: Tensor, grad_weights: Tensor | None, out: Tensor, lse: Tensor, weights: Tensor
) -> None:
    wanted = [("grad_out", grad_out, pool.per_bag(pool.channels)), ("out", out, pool.per_bag(pool.channels))]
    wanted.append(("lse", lse, pool.per_bag()))
    if grad_weights is not None:
        wanted += [("grad_weights", grad_weights, pool.per_token()), ("weights", weights, pool.per_token())]
    for name, tensor, shape in wanted:
        dtype = torch.float64 if name == "lse" else pool.acc
        torch._check(
            tensor.shape == shape and tensor.dtype == dtype and tensor.device == pool.x.device,
            partial(_wrong, name),
        )


@triton_operator("attention_pool_triton")
def attention_pool(
    x: Tensor, query: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, scale: float, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    query, scale = _scaled(query, scale)
    return _forward(_attention(x, query, mask, cu_seqlens), query, None, scale, need_weights)


@triton_operator("attention_pool_backward_triton")
def attention_pool_backward(
    grad_out: Tensor, grad_weights: Tensor | None, x: Tensor, query: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, out: Tensor, lse: Tensor, weights: Tensor, need_grad_x: bool,
    need_grad_query: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pool = _attention(x, query, mask, cu_seqlens)
    no_query = query.new_empty(0)
    if pool.empty:
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_grad_x else x.new_empty(0)
        return grad_x, query.new_zeros(query.shape) if need_grad_query else no_query
    if not (need_grad_x or need_grad_query):
        return x.new_empty(0), no_query
    scaled, kernel_scale = _scaled(query, scale)
    grad_x, _, partials = _backward(
        pool, grad_out, grad_weights, scaled, None, kernel_scale, out.contiguous(), lse.contiguous(),
        weights.contiguous(), need_grad_x, False, need_grad_query,
    )  # fmt: skip
    if not need_grad_query:
        return grad_x, no_query
    grad_query = new_empty(query, query.shape)
    width = pool.queries * pool.channels
    wrap_triton(sum_partials)[(max(_cdiv(width, 64), 1),)](
        partials, grad_query, pool.blocks, width, BLOCK_S=64, BLOCK_D=64, num_warps=8
    )
    return grad_x, grad_query * scale if query.dtype == torch.float64 else grad_query


@triton_operator("softmax_pool_triton")
def softmax_pool(
    values: Tensor, scores: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(_scored(values, scores, mask, cu_seqlens), None, scores, 1.0, need_weights)


@triton_operator("softmax_pool_backward_triton")
def softmax_pool_backward(
    grad_out: Tensor, grad_weights: Tensor | None, values: Tensor, scores: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, out: Tensor, lse: Tensor, weights: Tensor, need_grad_values: bool,
    need_grad_scores: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pool = _scored(values, scores, mask, cu_seqlens)
    no_scores = scores.new_empty(0)
    if pool.empty:
        grad = torch.zeros_like(values, memory_format=torch.contiguous_format)
        grad_scores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
        return grad if need_grad_values else values.new_empty(0), grad_scores if need_grad_scores else no_scores
    if not (need_grad_values or need_grad_scores):
        return values.new_empty(0), no_scores
    grad_values, grad_scores, _ = _backward(
        pool, grad_out, grad_weights, None, scores, 1.0, out.contiguous(), lse.contiguous(),
        weights.contiguous(), need_grad_values, need_grad_scores, False,
    )  # fmt: skip
    return grad_values, grad_scores if need_grad_scores else no_scores
