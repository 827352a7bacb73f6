"""Backward kernels of the shared-logits family: the gradient of a chunk of logits.

The statistics' gradient is dz = P (g_lse - g_entropy (log P + H) + w (g_prob - c)) + g_excess [z > margin], where
c_n = sum_k P_nk g_prob_k, and 0 where P = 0. That of the assignment is P (g - c) with c_n = sum_k P_nk g_nk, that of
the clamped logits g [z > margin]. dz holds these times margin, in the type that the products with it take.
"""

import triton
import triton.language as tl

from fusefeat.triton._shared_penalty_logits import margin_of, program_logits, program_tile, tile_rows, weighted

SIZES = ["context_rows", "first_row", "end_row"]


@triton.jit
def store_dz(dz_ptr, at, dz, mask, TF32: tl.constexpr):
    """TF32 rounds float32 to what tensor cores would cut it to."""
    if TF32:
        bits = dz.to(tl.int32, bitcast=True)
        even = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
        dz = tl.where(tl.abs(dz) < float("inf"), even, dz)
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def shared_row_dots(
    context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
    raw_ptr, margin, context_rows, first_row, end_row, features, channels,
    lse_ptr, grad_prob_ptr, partial_ptr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FROM_RAW: tl.constexpr, STORE_RAW: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum_k P_nk g_prob_k over the features of one tile, to partial [column tile, row]."""
    _, column_tile, rows, present, _, feature, has_feature, z = program_logits(
        context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
        raw_ptr, margin, context_rows, first_row, end_row, features, channels,
        HAS_BIAS, HAS_WEIGHT, FROM_RAW, STORE_RAW, ACC, OPERAND, GROUP, BLOCK_M, BLOCK_F, BLOCK_D,
    )  # fmt: skip
    lse = tl.load(lse_ptr + rows, mask=present, other=0.0)
    grad = tl.load(grad_prob_ptr + feature, mask=has_feature, other=0.0)
    dots = tl.sum(weighted(tl.exp(z - lse[:, None]), grad[None, :]), axis=1)
    tl.store(partial_ptr + column_tile.to(tl.int64) * (end_row - first_row) + (rows - first_row), dots, mask=present)


@triton.jit(do_not_specialize=SIZES)
def shared_grad_logits(
    context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
    raw_ptr, margin, context_rows, first_row, end_row, features, channels,
    lse_ptr, row_entropy_ptr, grad_entropy_ptr, grad_lse_ptr, grad_prob_ptr, dots_ptr, grad_excess_ptr,
    grad_ptr, g_row, g_inner, dz_ptr, grad_bias_ptr,
    HAS_ENTROPY: tl.constexpr, HAS_LSE: tl.constexpr, HAS_PROB: tl.constexpr, HAS_EXCESS: tl.constexpr,
    HAS_MATRIX: tl.constexpr, NEED_DZ: tl.constexpr, NEED_BIAS: tl.constexpr, TF32: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FROM_RAW: tl.constexpr, STORE_RAW: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz of one tile, and its sum over rows to grad_bias [row tile, feature].

    HAS_EXCESS passes g_excess where z > margin, HAS_MATRIX the gradient of the clamped logits.
    """
    row_tile, _, rows, present, weight, feature, has_feature, z = program_logits(
        context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
        raw_ptr, margin, context_rows, first_row, end_row, features, channels,
        HAS_BIAS, HAS_WEIGHT, FROM_RAW, STORE_RAW, ACC, OPERAND, GROUP, BLOCK_M, BLOCK_F, BLOCK_D,
    )  # fmt: skip
    scale = margin_of(margin, ACC)
    dz = tl.zeros([BLOCK_M, BLOCK_F], ACC)
    if HAS_ENTROPY or HAS_LSE or HAS_PROB:
        log_p = z - tl.load(lse_ptr + rows, mask=present, other=0.0)[:, None]
        inner = tl.zeros([BLOCK_M, BLOCK_F], ACC)
        if HAS_ENTROPY:
            entropy = tl.load(row_entropy_ptr + rows, mask=present, other=0.0)
            grad = tl.load(grad_entropy_ptr + rows, mask=present, other=0.0)
            inner -= grad[:, None] * (log_p + entropy[:, None])
        if HAS_LSE:
            inner += tl.load(grad_lse_ptr + rows, mask=present, other=0.0)[:, None]
        if HAS_PROB:
            grad = tl.load(grad_prob_ptr + feature, mask=has_feature, other=0.0)
            dots = tl.load(dots_ptr + (rows - first_row), mask=present, other=0.0)
            inner += weight[:, None] * (grad[None, :] - dots[:, None])
        dz = weighted(tl.exp(log_p), inner)
    if HAS_EXCESS:
        dz += tl.where(z > scale, tl.load(grad_excess_ptr + rows, mask=present, other=0.0)[:, None], 0.0)
    there = present[:, None] & has_feature[None, :]
    if HAS_MATRIX:
        grad = tl.load(grad_ptr + (rows * g_row)[:, None] + (feature * g_inner)[None, :], mask=there, other=0.0)
        dz = tl.where(z > scale, grad.to(ACC), 0.0)
    dz *= scale
    if NEED_DZ:
        store_dz(dz_ptr, (rows - first_row)[:, None] * features + feature[None, :], dz, there, TF32)
    if NEED_BIAS:
        tl.store(grad_bias_ptr + row_tile.to(tl.int64) * features + feature, tl.sum(dz, axis=0), mask=has_feature)


@triton.jit
def assignment_tile(
    grad_ptr, g_row, g_inner, assignment_ptr, a_row, a_inner, first_row, end_row, features,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The program's tile of a given assignment and of its incoming gradient; rows count from first_row."""
    column_tiles = tl.cdiv(features, BLOCK_F)
    row_tile, column_tile = program_tile(tl.num_programs(0) // column_tiles, column_tiles, GROUP)
    rows, present, _ = tile_rows(row_tile, first_row, end_row, 0, BLOCK_M)
    feature = column_tile.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    has_feature = feature < features
    there = present[:, None] & has_feature[None, :]
    p = tl.load(assignment_ptr + (rows * a_row)[:, None] + (feature * a_inner)[None, :], mask=there, other=0.0)
    grad = tl.load(grad_ptr + (rows * g_row)[:, None] + (feature * g_inner)[None, :], mask=there, other=0.0)
    return row_tile, column_tile, rows - first_row, present, feature, has_feature, p.to(ACC), grad.to(ACC)


@triton.jit(do_not_specialize=["first_row", "end_row"])
def shared_assignment_dots(
    grad_ptr, g_row, g_inner, assignment_ptr, a_row, a_inner, first_row, end_row, features, partial_ptr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """sum_k P_nk g_nk over the features of one tile, to partial [column tile, row]."""
    _, column_tile, local, present, _, _, p, grad = assignment_tile(
        grad_ptr, g_row, g_inner, assignment_ptr, a_row, a_inner, first_row, end_row, features,
        GROUP, BLOCK_M, BLOCK_F, partial_ptr.dtype.element_ty,
    )  # fmt: skip
    at = partial_ptr + column_tile.to(tl.int64) * (end_row - first_row) + local
    tl.store(at, tl.sum(weighted(p, grad), axis=1), mask=present)


@triton.jit(do_not_specialize=["first_row", "end_row"])
def shared_grad_assignment(
    grad_ptr, g_row, g_inner, assignment_ptr, a_row, a_inner, first_row, end_row, features,
    margin, dots_ptr, dz_ptr, grad_bias_ptr,
    NEED_DZ: tl.constexpr, NEED_BIAS: tl.constexpr, TF32: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """As shared_grad_logits, of a given assignment and its incoming gradient."""
    ACC: tl.constexpr = dots_ptr.dtype.element_ty
    row_tile, _, local, present, feature, has_feature, p, grad = assignment_tile(
        grad_ptr, g_row, g_inner, assignment_ptr, a_row, a_inner, first_row, end_row, features,
        GROUP, BLOCK_M, BLOCK_F, ACC,
    )  # fmt: skip
    dots = tl.load(dots_ptr + local, mask=present, other=0.0)
    dz = weighted(p, grad - dots[:, None]) * margin_of(margin, ACC)
    if NEED_DZ:
        mask = present[:, None] & has_feature[None, :]
        store_dz(dz_ptr, local[:, None] * features + feature[None, :], dz, mask, TF32)
    if NEED_BIAS:
        tl.store(grad_bias_ptr + row_tile.to(tl.int64) * features + feature, tl.sum(dz, axis=0), mask=has_feature)
