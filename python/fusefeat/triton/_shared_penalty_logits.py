"""Tiles of the shared logits, z = margin * (row . weight^T + bias), as every kernel of the family computes them.

Rows are those of context, then those of input. A kernel works on rows [first_row, end_row) and cuts them into tiles
that hold rows of context or of input, never both. What is not there - rows behind the end or of weight 0, features
behind the last - is not read and has z = -inf, which counts for nothing in any sum.
"""

import triton
import triton.language as tl


@triton.jit
def program_tile(row_tiles, column_tiles, GROUP: tl.constexpr):
    """The program's tile; GROUP row tiles go through the columns together, so that caches serve both operands."""
    index = tl.program_id(0)
    per_group = GROUP * column_tiles
    first = index // per_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = index % per_group
    return first + within % size, within // size


@triton.jit
def tile_rows(tile, first_row, end_row, context_rows, BLOCK: tl.constexpr):
    """Rows of one tile (int64), which of them are there, and whether they are of the context."""
    first_row = first_row.to(tl.int64)
    border = tl.minimum(tl.maximum(context_rows, first_row), end_row)
    context_tiles = tl.cdiv(border - first_row, BLOCK)
    in_context = tile < context_tiles
    begin = tl.where(in_context, first_row, border - context_tiles * BLOCK) + tile * BLOCK
    rows = begin + tl.arange(0, BLOCK)
    return rows, rows < tl.where(in_context, border, end_row), in_context


@triton.jit
def used_rows(row_weight_ptr, rows, present, HAS_WEIGHT: tl.constexpr):
    """Their weights, and which rows take part."""
    if HAS_WEIGHT:
        weight = tl.load(row_weight_ptr + rows, mask=present, other=0.0)
        used = present & (weight != 0.0)
    else:
        weight = tl.where(present, 1.0, 0.0)
        used = present
    return weight, used


@triton.jit
def row_origin(context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, context_rows, in_context):
    """Where the rows of a tile lie: base, row stride, channel stride, and the number of the row at the base."""
    base = tl.where(in_context, context_ptr, input_ptr)
    step = tl.where(in_context, c_row, x_row).to(tl.int64)
    inner = tl.where(in_context, c_inner, x_inner).to(tl.int64)
    return base, step, inner, tl.where(in_context, 0, context_rows)


@triton.jit
def margin_of(margin, ACC: tl.constexpr):
    """A kernel's scalars are float32: for float64 the margin comes in a tensor."""
    if ACC == tl.float64:  # noqa: SIM300 - neither is a literal
        value = tl.load(margin)
    else:
        value = margin
    return value


@triton.jit
def program_logits(
    context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
    raw_ptr, margin, context_rows, first_row, end_row, features, channels,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FROM_RAW: tl.constexpr, STORE_RAW: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The program's tile, its rows and features, and z there.

    The products row . weight^T are read from raw [end_row - first_row, features], or computed (and left there).
    """
    column_tiles = tl.cdiv(features, BLOCK_F)
    row_tile, column_tile = program_tile(tl.num_programs(0) // column_tiles, column_tiles, GROUP)
    rows, present, in_context = tile_rows(row_tile, first_row, end_row, context_rows, BLOCK_M)
    weight, used = used_rows(row_weight_ptr, rows, present, HAS_WEIGHT)
    feature = column_tile.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    has_feature = feature < features
    there = used[:, None] & has_feature[None, :]
    at = (rows - first_row)[:, None] * features + feature[None, :]
    if FROM_RAW:
        raw = tl.load(raw_ptr + at, mask=there, other=0.0)
    else:
        base, step, inner, origin = row_origin(
            context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, context_rows, in_context
        )
        channel = tl.arange(0, BLOCK_D).to(tl.int64)
        x_at = base + ((rows - origin) * step)[:, None] + (channel * inner)[None, :]
        w_at = weight_ptr + (feature * w_row)[None, :] + (channel * w_inner)[:, None]
        w_step = tl.full([], BLOCK_D, tl.int64) * w_inner
        raw = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
        for start in range(0, channels, BLOCK_D):
            inside = channel < channels - start
            x = tl.load(x_at, mask=used[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None] & has_feature[None, :], other=0.0)
            raw = tl.dot(x.to(OPERAND), w.to(OPERAND), raw)
            x_at += BLOCK_D * inner
            w_at += w_step
        if STORE_RAW:
            tl.store(raw_ptr + at, raw, mask=there)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + feature, mask=has_feature, other=0.0)[None, :]
    z = tl.where(there, raw * margin_of(margin, ACC), float("-inf"))
    return row_tile, column_tile, rows, present, weight, feature, has_feature, z


@triton.jit
def finite_peak(peak):
    """A peak to subtract: where every logit is -inf there is none."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def weighted(p, value):
    """p * value, where p = 0 counts for nothing whatever the value."""
    return tl.where(p == 0.0, 0.0, p * value)
