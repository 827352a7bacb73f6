"""Forward kernels of both pools. All sums run in the dtype of out; see _partition for rows, items and blocks.

Strides of x count VEC elements and channels come in units of VEC, so that the compiler knows both to be multiples of
it and loads VEC elements at once. A score of -inf marks a token that is not there: masked, or never to be read.
"""

import triton
import triton.language as tl

from fusefeat.triton._partition import bag_rows, bags_of_rows, block_of_bag_start, cut_point


@triton.jit
def load_tokens(x_ptr, base, x_token, x_inner, tokens, channel, keep, channels, VEC: tl.constexpr):
    """Tokens as [T, 1, D] in their own dtype; 0 where not kept."""
    at = ((base + tokens * x_token) * VEC)[:, None, None] + channel[None, None, :] * x_inner
    return tl.load(x_ptr + at, mask=keep[:, None, None] & (channel < channels)[None, None, :], other=0.0)


@triton.jit
def load_vectors(ptr, base, step, inner, index, channel, count, channels):
    """Per-query vectors (query, grad_out, out) as [1, K, D]; 0 out of range."""
    at = base + (index * step)[None, :, None] + (channel * inner)[None, None, :]
    return tl.load(ptr + at, mask=(index < count)[None, :, None] & (channel < channels)[None, None, :], other=0.0)


@triton.jit
def load_scores(scores_ptr, base, s_token, s_query, tokens, index, keep, count):
    """Given scores as [T, K]; -inf where there is none."""
    at = base + (tokens * s_token)[:, None] + (index * s_query)[None, :]
    return tl.load(scores_ptr + at, mask=keep[:, None] & (index < count)[None, :], other=float("-inf"))


@triton.jit
def kept_tokens(mask_ptr, base, m_token, tokens, in_range, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        kept = in_range & (tl.load(mask_ptr + base + tokens * m_token, mask=in_range, other=0) != 0)
    else:
        kept = in_range
    return kept


@triton.jit
def finite_peak(peak):
    """A peak to subtract: scores that are all -inf have none."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def weight_of(score, peak):
    """exp(score - peak), exactly 0 for a token that is not there."""
    return tl.where(score == float("-inf"), 0.0, tl.exp(score - finite_peak(peak)))


@triton.jit
def final_weight(score, lse):
    """exp(score - lse) with lse in float64: the difference of near numbers is exact, and the rest of lse follows."""
    high = finite_peak(lse).to(score.dtype)
    low = (finite_peak(lse) - high).to(score.dtype)
    return tl.where(score == float("-inf"), 0.0, tl.exp(score - high - low))


@triton.jit
def pool_forward(
    x_ptr, x_bag, x_token, x_inner,
    query_ptr, q_query, q_inner,
    scores_ptr, s_bag, s_token, s_query,
    mask_ptr, m_bag, m_token,
    cu_ptr, cu_step,
    out_ptr, lse_ptr, raw_ptr,
    carry_out_ptr, carry_lse_ptr, owner_ptr,
    bags, tokens, channel_units, queries, scale, items, block_items,
    PACKED: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_MASK: tl.constexpr, STORE_RAW: tl.constexpr,
    SPLIT: tl.constexpr, VEC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Softmax pooling of one block for BLOCK_K queries and one tile of channels.

    With a query the tile holds all channels. A bag that ends here goes to out and lse; the unfinished last one goes,
    normalised, to the carry slot of the block. Where the bag that ends here began in an earlier block, owner names it,
    and its lse goes to the second half of carry_lse: pool_combine puts the pieces together.
    """
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    channels = channel_units * VEC
    tiles = tl.maximum(tl.cdiv(channels, BLOCK_D), 1)
    block = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) // tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = tl.program_id(0) % tiles
    channel = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    stores = (index < queries)[:, None] & (channel < channels)[None, :]
    lse_queries = tl.where(tile == 0, queries, 0)

    bag, first_row = cut_point(cu_ptr, cu_step, block * block_items, bags, tokens, PACKED)
    last_item = tl.minimum((block + 1) * block_items, items)
    last_bag, last_row = cut_point(cu_ptr, cu_step, last_item, bags, tokens, PACKED)
    if HAS_QUERY:
        query = load_vectors(query_ptr, 0, q_query, q_inner, index, channel, queries, channels).to(ACC)

    row = first_row
    first_bag = bag
    owner = bag * 0 - 1
    stop = tl.minimum(last_bag, bags - 1) if SPLIT else last_bag - 1
    while bag <= stop:
        start, end = bag_rows(cu_ptr, cu_step, bag, tokens, PACKED)
        origin = start * 0 if PACKED else start
        first = tl.maximum(start, row)
        last = tl.minimum(end, last_row)
        peak = tl.full([BLOCK_K], float("-inf"), ACC)
        total = tl.zeros([BLOCK_K], ACC)
        pooled = tl.zeros([BLOCK_K, BLOCK_D], ACC)
        for tile_row in range(first, last, BLOCK_T):
            rows = tile_row + tl.arange(0, BLOCK_T)
            token = rows - origin
            in_range = rows < last
            keep = kept_tokens(mask_ptr, bag * m_bag, m_token, token, in_range, HAS_MASK)
            x = load_tokens(x_ptr, bag * x_bag, x_token, x_inner, token, channel, keep, channels, VEC).to(ACC)
            if HAS_QUERY:
                score = tl.where(keep[:, None], tl.sum(x * query, axis=2) * scale, float("-inf"))
            else:
                score = load_scores(scores_ptr, bag * s_bag, s_token, s_query, token, index, keep, queries).to(ACC)
            if STORE_RAW:
                at = (rows * queries)[:, None] + index[None, :]
                tl.store(raw_ptr + at, score, mask=in_range[:, None] & (index < queries)[None, :])
            new_peak = tl.maximum(peak, tl.max(score, axis=0))
            weight = weight_of(score, new_peak[None, :])
            fade = tl.exp(peak - finite_peak(new_peak))
            total = total * fade + tl.sum(weight, axis=0)
            present = tl.where((score == float("-inf"))[:, :, None], 0.0, x)
            pooled = pooled * fade[:, None] + tl.sum(weight[:, :, None] * present, axis=0)
            peak = new_peak
        empty = total == 0.0
        pooled = tl.where(empty[:, None], 0.0, pooled / tl.where(empty, 1.0, total)[:, None])
        log_total = tl.log(tl.where(empty, 1.0, total).to(tl.float64))
        lse = tl.where(empty, float("-inf"), peak.to(tl.float64) + log_total)
        is_piece = (bag == first_bag) & (start < first_row) & (bag < last_bag)
        owner = tl.where(is_piece, bag, owner)
        if bag < last_bag:
            at = bag * queries + index
            tl.store(out_ptr + (at * channels)[:, None] + channel[None, :], pooled, mask=stores)
            if SPLIT:
                slot = (tl.num_programs(1) + block) * queries + index
                tl.store(carry_lse_ptr + slot, lse, mask=index < tl.where(is_piece, lse_queries, 0))
                tl.store(lse_ptr + at, lse, mask=index < tl.where(is_piece, 0, lse_queries))
            else:
                tl.store(lse_ptr + at, lse, mask=index < lse_queries)
        elif SPLIT:
            at = block * queries + index
            tl.store(carry_out_ptr + (at * channels)[:, None] + channel[None, :], pooled, mask=stores)
            tl.store(carry_lse_ptr + at, lse, mask=index < lse_queries)
        row = tl.maximum(row, last)
        bag += 1
    if SPLIT:
        tl.store(owner_ptr + block, owner, mask=tl.program_id(0) == 0)


@triton.jit
def pool_combine(
    carry_out_ptr, carry_lse_ptr, owner_ptr, cu_ptr, cu_step, out_ptr, lse_ptr,
    tokens, channels, queries, block_items,
    PACKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Joins the pieces of the bag that ends in a block and began in an earlier one, in the order of its blocks."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    block = tl.program_id(1).to(tl.int64)
    bag = tl.load(owner_ptr + block)
    if bag >= 0:
        tiles = tl.maximum(tl.cdiv(channels, BLOCK_D), 1)
        query = tl.program_id(0) // tiles
        tile = tl.program_id(0) % tiles
        channel = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        first = block_of_bag_start(cu_ptr, cu_step, bag, tokens, block_items, PACKED)
        # The piece that ends the bag lies in out already.
        at = (bag * queries + query) * channels + channel
        peak = tl.load(carry_lse_ptr + (tl.num_programs(1) + block) * queries + query)
        total = tl.where(peak == float("-inf"), 0.0, peak * 0 + 1.0)
        piece = tl.load(out_ptr + at, mask=channel < channels, other=0.0)
        for tile_slot in range(first, block, BLOCK_S):
            slots = tile_slot + tl.arange(0, BLOCK_S)
            lse = tl.load(carry_lse_ptr + slots * queries + query, mask=slots < block, other=float("-inf"))
            new_peak = tl.maximum(peak, tl.max(lse, axis=0))
            weight = weight_of(lse, new_peak)
            fade = tl.exp(peak - finite_peak(new_peak))
            total = total * fade + tl.sum(weight, axis=0)
            where = ((slots * queries + query) * channels)[:, None] + channel[None, :]
            mask = (lse != float("-inf"))[:, None] & (channel < channels)[None, :]
            pooled = tl.load(carry_out_ptr + where, mask=mask, other=0.0)
            piece = piece * fade.to(ACC) + tl.sum(weight.to(ACC)[:, None] * pooled, axis=0)
            peak = new_peak
        empty = total == 0.0
        safe_total = tl.where(empty, 1.0, total)
        tl.store(out_ptr + at, tl.where(empty, 0.0, piece / safe_total.to(ACC)), mask=channel < channels)
        lse = tl.where(empty, float("-inf"), peak + tl.log(safe_total))
        tl.store(lse_ptr + bag * queries + query, lse, mask=tile == 0)


@triton.jit
def pool_weights(
    scores_ptr, s_bag, s_token, s_query, mask_ptr, m_bag, m_token, cu_ptr, cu_step, lse_ptr, weights_ptr,
    bags, tokens, rows_end, queries,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights = exp(score - lse), elementwise over [rows, queries]; scores may be the same memory as weights."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = element // queries
    query = element % queries
    in_range = rows < rows_end
    bag, inside = bags_of_rows(cu_ptr, cu_step, rows, bags, tokens, PACKED)
    inside = inside & in_range
    token = rows if PACKED else rows - bag * tokens
    keep = kept_tokens(mask_ptr, bag * m_bag, m_token, token, inside, HAS_MASK)
    at = bag * s_bag + token * s_token + query * s_query
    score = tl.load(scores_ptr + at, mask=keep, other=float("-inf")).to(ACC)
    lse = tl.load(lse_ptr + bag * queries + query, mask=keep, other=0.0)
    tl.store(weights_ptr + element, final_weight(score, lse), mask=in_range)


@triton.jit
def pool_dots(
    x_ptr, x_bag, x_token, x_inner, query_ptr, q_query, q_inner, grad_ptr, g_bag, g_query, g_inner,
    mask_ptr, m_bag, m_token, cu_ptr, cu_step, scores_ptr, dots_ptr,
    bags, tokens, rows_end, channel_units, queries, scale,
    PACKED: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_MASK: tl.constexpr,
    VEC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores <x, query> * scale and dots <x, grad_out of its bag>, [rows, queries] each, tile by tile of channels.

    For tokens of more channels than one program holds: the other kernels then take both as given.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    channels = channel_units * VEC
    query_blocks = tl.cdiv(queries, BLOCK_K)
    rows = (tl.program_id(0) // query_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    index = tl.program_id(0) % query_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    in_range = rows < rows_end
    bag, inside = bags_of_rows(cu_ptr, cu_step, rows, bags, tokens, PACKED)
    inside = inside & in_range
    token = rows if PACKED else rows - bag * tokens
    keep = kept_tokens(mask_ptr, bag * m_bag, m_token, token, inside, HAS_MASK)
    score = tl.zeros([BLOCK_T, BLOCK_K], ACC)
    dot = tl.zeros([BLOCK_T, BLOCK_K], ACC)
    for tile in range(0, channels, BLOCK_D):
        channel = tile + tl.arange(0, BLOCK_D)
        x = load_tokens(x_ptr, bag * x_bag, x_token, x_inner, token, channel, keep, channels, VEC).to(ACC)
        if HAS_QUERY:
            query = load_vectors(query_ptr, 0, q_query, q_inner, index, channel, queries, channels).to(ACC)
            score += tl.sum(x * query, axis=2)
        if HAS_GRAD:
            base = (bag * g_bag)[:, None, None]
            grad = load_vectors(grad_ptr, base, g_query, g_inner, index, channel, queries, channels)
            dot += tl.sum(tl.where(keep[:, None, None], x * grad, 0.0), axis=2)
    at = (rows * queries)[:, None] + index[None, :]
    stores = in_range[:, None] & (index < queries)[None, :]
    if HAS_QUERY:
        tl.store(scores_ptr + at, tl.where(keep[:, None], score * scale, float("-inf")), mask=stores)
    if HAS_GRAD:
        tl.store(dots_ptr + at, dot, mask=stores)


@triton.jit
def pool_offsets(cu_ptr, cu_step, out_ptr, lse_ptr, bags, tokens, out_count, lse_count, BLOCK: tl.constexpr):
    """NaN for every bag when offsets fall or lie outside of the tokens.

    Reads stay in bounds anyway, but a bag that overlaps others would get a part of its tokens and look right.
    """
    lanes = tl.arange(0, BLOCK)
    wrong = tl.zeros([BLOCK], tl.int32)
    for first in range(0, bags + 1, BLOCK):
        index = tl.cast(first, tl.int64) + lanes
        inside = index <= bags
        value = tl.load(cu_ptr + index * cu_step, mask=inside, other=0).to(tl.int64)
        before = tl.load(cu_ptr + (index - 1) * cu_step, mask=inside & (index > 0), other=0).to(tl.int64)
        wrong = tl.where(inside & ((value < before) | (value > tokens)), 1, wrong)
    if tl.max(wrong) > 0:
        for first in range(0, out_count, BLOCK):
            index = tl.cast(first, tl.int64) + lanes
            tl.store(out_ptr + index, float("nan"), mask=index < out_count)
        for first in range(0, lse_count, BLOCK):
            index = tl.cast(first, tl.int64) + lanes
            tl.store(lse_ptr + index, float("nan"), mask=index < lse_count)
