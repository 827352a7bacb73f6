"""Backward kernels of both pools, one read of x for as many queries as one program holds.

With p = exp(score - lse), dp = <grad_out, x> + grad_weights and delta = <grad_out, out> + sum_t w_t grad_weights_t:
ds = p (dp - delta); grad_x = sum_k p grad_out + scale ds query; grad_query = scale sum_t ds x.
"""

import triton
import triton.language as tl

from fusefeat.triton._attention_pool_forward import (
    kept_tokens,
    load_scores,
    load_tokens,
    load_vectors,
    weight_of,
)
from fusefeat.triton._partition import bag_rows, block_of_bag_start, cut_point


@triton.jit
def store_zero_rows(ptr, first, last, width, column, mask, BLOCK_T: tl.constexpr):
    """Zeros in the given columns of rows [first, last): tokens of no bag have zero gradients."""
    for tile_row in range(first, last, BLOCK_T):
        rows = tile_row + tl.arange(0, BLOCK_T)
        at = (rows * width)[:, None] + column[None, :]
        tl.store(ptr + at, 0.0, mask=(rows < last)[:, None] & mask[None, :])


@triton.jit
def pool_backward(
    grad_ptr, g_bag, g_query, g_inner,
    grad_weights_ptr, w_bag, w_token, w_query,
    x_ptr, x_bag, x_token, x_inner,
    query_ptr, q_query, q_inner,
    scores_ptr, s_bag, s_token, s_query,
    mask_ptr, m_bag, m_token,
    cu_ptr, cu_step,
    out_ptr, lse_ptr, delta_ptr, dots_ptr,
    grad_x_ptr, grad_scores_ptr, partial_ptr,
    bags, tokens, channel_units, queries, scale, items, block_items,
    PACKED: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_SCORES: tl.constexpr, HAS_DOTS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr, HAS_DELTA: tl.constexpr, ALL_QUERIES: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SCORES: tl.constexpr, NEED_QUERY: tl.constexpr,
    VEC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of rows, for one tile of channels.

    The tile holds all channels unless scores and dots are given (HAS_SCORES, HAS_DOTS, from pool_dots).
    ALL_QUERIES loops over the queries for each tile of tokens, as grad_x needs; otherwise a program owns BLOCK_K of
    them and keeps what belongs to them at hand, which grad_query needs.
    """
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    NEED_DS: tl.constexpr = NEED_SCORES or NEED_QUERY or HAS_QUERY
    READ_X: tl.constexpr = NEED_QUERY or (NEED_DS and not HAS_DOTS)
    channels = channel_units * VEC
    tiles = tl.maximum(tl.cdiv(channels, BLOCK_D), 1)
    block = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) % tiles
    channel = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    own_query = tl.program_id(0) // tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    score_queries = tl.where(tile == 0, queries, 0)
    query_blocks = tl.cdiv(queries, BLOCK_K) if ALL_QUERIES else 1

    bag, first_row = cut_point(cu_ptr, cu_step, block * block_items, bags, tokens, PACKED)
    last_item = tl.minimum((block + 1) * block_items, items)
    last_bag, last_row = cut_point(cu_ptr, cu_step, last_item, bags, tokens, PACKED)
    if NEED_QUERY:
        grad_query = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    if HAS_QUERY and not ALL_QUERIES:
        query = load_vectors(query_ptr, 0, q_query, q_inner, own_query, channel, queries, channels).to(ACC)

    row = first_row
    stop = tl.minimum(last_bag, bags - 1)
    while bag <= stop:
        start, end = bag_rows(cu_ptr, cu_step, bag, tokens, PACKED)
        origin = start * 0 if PACKED else start
        first = tl.maximum(start, row)
        last = tl.minimum(end, last_row)
        gap_end = tl.minimum(first, last_row)
        if NEED_X:
            store_zero_rows(grad_x_ptr, row, gap_end, channels, channel, channel < channels, BLOCK_T)
        if NEED_SCORES:
            for query_block in range(0, query_blocks):
                index = query_block * BLOCK_K + own_query
                column_mask = index < score_queries
                store_zero_rows(grad_scores_ptr, row, gap_end, queries, index, column_mask, BLOCK_T)
        if not ALL_QUERIES:
            per_bag = bag * queries + own_query
            grad = load_vectors(grad_ptr, bag * g_bag, g_query, g_inner, own_query, channel, queries, channels).to(ACC)
            lse = tl.load(lse_ptr + per_bag, mask=own_query < queries, other=0.0)
            if HAS_DELTA:
                delta = tl.load(delta_ptr + per_bag, mask=own_query < queries, other=0.0)
            elif NEED_DS:
                out = load_vectors(
                    out_ptr, bag * queries * channels, channels, 1, own_query, channel, queries, channels
                )
                delta = tl.reshape(tl.sum(grad * out, axis=2), [BLOCK_K])
        for tile_row in range(first, last, BLOCK_T):
            rows = tile_row + tl.arange(0, BLOCK_T)
            token = rows - origin
            in_range = rows < last
            keep = kept_tokens(mask_ptr, bag * m_bag, m_token, token, in_range, HAS_MASK)
            if READ_X:
                x = load_tokens(x_ptr, bag * x_bag, x_token, x_inner, token, channel, keep, channels, VEC).to(ACC)
            if NEED_X:
                grad_x = tl.zeros([BLOCK_T, 1, BLOCK_D], ACC)
            for query_block in range(0, query_blocks):
                if ALL_QUERIES:
                    index = query_block * BLOCK_K + tl.arange(0, BLOCK_K)
                    if HAS_QUERY:
                        query = load_vectors(query_ptr, 0, q_query, q_inner, index, channel, queries, channels).to(ACC)
                    grad = load_vectors(grad_ptr, bag * g_bag, g_query, g_inner, index, channel, queries, channels)
                    lse = tl.load(lse_ptr + bag * queries + index, mask=index < queries, other=0.0)
                    if NEED_DS:
                        delta = tl.load(delta_ptr + bag * queries + index, mask=index < queries, other=0.0)
                else:
                    index = own_query
                at = (rows * queries)[:, None] + index[None, :]
                present = in_range[:, None] & (index < queries)[None, :]
                if HAS_SCORES:
                    score = load_scores(scores_ptr, bag * s_bag, s_token, s_query, token, index, keep, queries).to(ACC)
                else:
                    score = tl.where(keep[:, None], tl.sum(x * query, axis=2) * scale, float("-inf"))
                weight = weight_of(score, lse[None, :])
                absent = score == float("-inf")
                if NEED_DS:
                    if HAS_DOTS:
                        dp = tl.load(dots_ptr + at, mask=present, other=0.0)
                    else:
                        dp = tl.sum(x * grad, axis=2)
                    if HAS_GRAD_WEIGHTS:
                        where = bag * w_bag + (token * w_token)[:, None] + (index * w_query)[None, :]
                        dp += tl.load(grad_weights_ptr + where, mask=keep[:, None] & present, other=0.0)
                    ds = tl.where(absent, 0.0, weight * (dp - delta[None, :]))
                    if NEED_SCORES:
                        tl.store(grad_scores_ptr + at, ds, mask=in_range[:, None] & (index < score_queries)[None, :])
                if NEED_X:
                    term = weight[:, :, None] * grad
                    if HAS_QUERY:
                        term += (ds * scale)[:, :, None] * query
                    grad_x += tl.sum(tl.where(absent[:, :, None], 0.0, term), axis=1, keep_dims=True)
                if NEED_QUERY:
                    grad_query += tl.sum((ds * scale)[:, :, None] * tl.where(absent[:, :, None], 0.0, x), axis=0)
            if NEED_X:
                at = (rows * channels)[:, None, None] + channel[None, None, :]
                tl.store(grad_x_ptr + at, grad_x, mask=in_range[:, None, None] & (channel < channels)[None, None, :])
        row = tl.maximum(row, last)
        bag += 1
    if NEED_X:
        store_zero_rows(grad_x_ptr, row, last_row, channels, channel, channel < channels, BLOCK_T)
    if NEED_SCORES:
        for query_block in range(0, query_blocks):
            index = query_block * BLOCK_K + own_query
            column_mask = index < score_queries
            store_zero_rows(grad_scores_ptr, row, last_row, queries, index, column_mask, BLOCK_T)
    if NEED_QUERY:
        at = ((block * queries + own_query) * channels)[:, None] + channel[None, :]
        tl.store(partial_ptr + at, grad_query, mask=(own_query < queries)[:, None] & (channel < channels)[None, :])


@triton.jit
def pool_weight_dot(
    weights_ptr, grad_weights_ptr, w_bag, w_token, w_query, cu_ptr, cu_step, ends_ptr, carry_ptr,
    bags, tokens, queries, items, block_items,
    PACKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_t weights * grad_weights over a block's part of each bag: to ends where a bag ends here, else to carry."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    block = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    bag, first_row = cut_point(cu_ptr, cu_step, block * block_items, bags, tokens, PACKED)
    last_item = tl.minimum((block + 1) * block_items, items)
    last_bag, last_row = cut_point(cu_ptr, cu_step, last_item, bags, tokens, PACKED)
    row = first_row
    stop = tl.minimum(last_bag, bags - 1)
    while bag <= stop:
        start, end = bag_rows(cu_ptr, cu_step, bag, tokens, PACKED)
        origin = start * 0 if PACKED else start
        first = tl.maximum(start, row)
        last = tl.minimum(end, last_row)
        total = tl.zeros([BLOCK_K], ACC)
        for tile_row in range(first, last, BLOCK_T):
            rows = tile_row + tl.arange(0, BLOCK_T)
            mask = (rows < last)[:, None] & (index < queries)[None, :]
            weight = tl.load(weights_ptr + (rows * queries)[:, None] + index[None, :], mask=mask, other=0.0)
            where = bag * w_bag + ((rows - origin) * w_token)[:, None] + (index * w_query)[None, :]
            grad = tl.load(grad_weights_ptr + where, mask=mask, other=0.0)
            # A token without weight may have any incoming gradient.
            total += tl.sum(tl.where(weight == 0.0, 0.0, weight * grad), axis=0)
        if bag < last_bag:
            tl.store(ends_ptr + bag * queries + index, total, mask=index < queries)
        else:
            tl.store(carry_ptr + block * queries + index, total, mask=index < queries)
        row = tl.maximum(row, last)
        bag += 1


@triton.jit
def pool_delta(
    grad_ptr, g_bag, g_query, g_inner, out_ptr, cu_ptr, cu_step, ends_ptr, carry_ptr, delta_ptr,
    tokens, channels, queries, block_items,
    PACKED: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta of one bag and query."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    bag = (tl.program_id(0) // queries).to(tl.int64)
    query = tl.program_id(0) % queries
    terms = tl.zeros([BLOCK_D], ACC)
    at = bag * queries + query
    for tile in range(0, channels, BLOCK_D):
        channel = tile + tl.arange(0, BLOCK_D)
        where = bag * g_bag + query * g_query + channel * g_inner
        grad = tl.load(grad_ptr + where, mask=channel < channels, other=0.0)
        terms += grad * tl.load(out_ptr + at * channels + channel, mask=channel < channels, other=0.0)
    delta = tl.sum(terms, axis=0)
    if HAS_GRAD_WEIGHTS:
        start, end = bag_rows(cu_ptr, cu_step, bag, tokens, PACKED)
        first = (start + bag) // block_items
        last = (end + bag) // block_items
        carried = tl.zeros([BLOCK_S], ACC)
        for tile_slot in range(first, last, BLOCK_S):
            slots = tile_slot + tl.arange(0, BLOCK_S)
            carried += tl.load(carry_ptr + slots * queries + query, mask=slots < last, other=0.0)
        delta += tl.sum(carried, axis=0) + tl.load(ends_ptr + at)
    tl.store(delta_ptr + at, delta)


@triton.jit
def sum_partials(partial_ptr, total_ptr, count, width, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums [count, width] over its first axis, in a fixed order."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_S, BLOCK_D], partial_ptr.dtype.element_ty)
    for tile in range(0, count, BLOCK_S):
        slots = tile + tl.arange(0, BLOCK_S)
        mask = (slots < count)[:, None] & (column < width)[None, :]
        total += tl.load(partial_ptr + (slots * width)[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(total_ptr + column, tl.sum(total, axis=0).to(total_ptr.dtype.element_ty), mask=column < width)
