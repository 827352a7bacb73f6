"""Products of a chunk's dz [rows, features] with the weight and with the rows, for half types: summed in float32.

Rows are cut into tiles as in _shared_penalty_logits. Long sums are split; the parts are added by shared_sum.
"""

import triton
import triton.language as tl

from fusefeat.triton._shared_penalty_logits import program_tile, row_origin, tile_rows, used_rows

SIZES = ["context_rows", "first_row", "end_row"]


@triton.jit(do_not_specialize=SIZES)
def shared_grad_rows(
    dz_ptr, weight_ptr, w_row, w_inner, row_weight_ptr, grad_context_ptr, grad_input_ptr, partial_ptr,
    context_rows, first_row, end_row, features, channels, split_features,
    NEED_CONTEXT: tl.constexpr, NEED_INPUT: tl.constexpr, HAS_WEIGHT: tl.constexpr, SPLIT: tl.constexpr,
    OPERAND: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dz . weight of one tile of rows and channels, to the gradients or, one split of the features each, to partial."""
    channel_tiles = tl.cdiv(channels, BLOCK_D)
    row_tile, channel_tile = program_tile(tl.num_programs(0) // channel_tiles, channel_tiles, GROUP)
    split = tl.program_id(1).to(tl.int64)
    rows, present, in_context = tile_rows(row_tile, first_row, end_row, context_rows, BLOCK_M)
    if (in_context and NEED_CONTEXT) or ((not in_context) and NEED_INPUT):
        _, used = used_rows(row_weight_ptr, rows, present, HAS_WEIGHT)
        channel = channel_tile.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        feature = split * split_features + tl.arange(0, BLOCK_F)
        end = tl.minimum((split + 1) * split_features, features)
        dz_at = dz_ptr + (rows - first_row)[:, None] * features + feature[None, :]
        w_at = weight_ptr + (feature * w_row)[:, None] + (channel * w_inner)[None, :]
        w_step = tl.full([], BLOCK_F, tl.int64) * w_row
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(split * split_features, end, BLOCK_F):
            inside = tl.arange(0, BLOCK_F) < end - start
            dz = tl.load(dz_at, mask=present[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None] & (channel < channels)[None, :], other=0.0)
            total = tl.dot(dz.to(OPERAND), w.to(OPERAND), total, input_precision="tf32")
            dz_at += BLOCK_F
            w_at += w_step
        # A weight that is not finite must not reach a row that is not used.
        total = tl.where(used[:, None], total, 0.0)
        mask = present[:, None] & (channel < channels)[None, :]
        if SPLIT:
            at = ((end_row - first_row) * split + (rows - first_row)) * channels
            tl.store(partial_ptr + at[:, None] + channel[None, :], total, mask=mask)
        else:
            base = tl.where(in_context, grad_context_ptr, grad_input_ptr)
            at = (rows - tl.where(in_context, 0, context_rows)) * channels
            tl.store(base + at[:, None] + channel[None, :], total.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def shared_grad_weight(
    dz_ptr, context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, row_weight_ptr, total_ptr,
    context_rows, first_row, end_row, features, channels, row_tiles, split_tiles,
    HAS_WEIGHT: tl.constexpr, ADD: tl.constexpr,
    OPERAND: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dz^T . rows over one split of the row tiles, to total [split, features, channels], or added to it."""
    channel_tiles = tl.cdiv(channels, BLOCK_D)
    feature_tile, channel_tile = program_tile(tl.num_programs(0) // channel_tiles, channel_tiles, GROUP)
    split = tl.program_id(1).to(tl.int64)
    feature = feature_tile.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    channel = channel_tile.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    has_feature = feature < features
    has_channel = channel < channels
    total = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    for tile in range(split * split_tiles, tl.minimum((split + 1) * split_tiles, row_tiles)):
        rows, present, in_context = tile_rows(tile, first_row, end_row, context_rows, BLOCK_M)
        _, used = used_rows(row_weight_ptr, rows, present, HAS_WEIGHT)
        base, step, inner, origin = row_origin(
            context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, context_rows, in_context
        )
        dz_at = dz_ptr + (rows - first_row)[None, :] * features + feature[:, None]
        dz = tl.load(dz_at, mask=present[None, :] & has_feature[:, None], other=0.0)
        x_at = base + ((rows - origin) * step)[:, None] + (channel * inner)[None, :]
        x = tl.load(x_at, mask=used[:, None] & has_channel[None, :], other=0.0)
        total = tl.dot(dz.to(OPERAND), x.to(OPERAND), total, input_precision="tf32")
    at = total_ptr + ((split * features + feature) * channels)[:, None] + channel[None, :]
    mask = has_feature[:, None] & has_channel[None, :]
    if ADD:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total.to(total_ptr.dtype.element_ty), mask=mask)
