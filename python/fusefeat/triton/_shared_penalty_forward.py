"""Forward kernels of the shared-logits family: statistics per tile of logits, and their sums in a fixed order."""

import triton
import triton.language as tl

from fusefeat.triton._shared_penalty_logits import finite_peak, margin_of, program_logits, used_rows

SIZES = ["context_rows", "first_row", "end_row"]


@triton.jit(do_not_specialize=SIZES)
def shared_row_statistics(
    context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
    raw_ptr, margin, context_rows, first_row, end_row, features, channels,
    statistics_ptr, fired_ptr,
    SOFTMAX: tl.constexpr, CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FROM_RAW: tl.constexpr, STORE_RAW: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per row of one tile, relative to its peak: peak, sum of e^d, sum of e^d d; then sum of max(z - margin, 0).

    Each goes to statistics [kind, column tile, row]. How many rows have z > margin goes to fired [row tile, feature].
    """
    row_tile, column_tile, rows, present, _, feature, has_feature, z = program_logits(
        context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
        raw_ptr, margin, context_rows, first_row, end_row, features, channels,
        HAS_BIAS, HAS_WEIGHT, FROM_RAW, STORE_RAW, ACC, OPERAND, GROUP, BLOCK_M, BLOCK_F, BLOCK_D,
    )  # fmt: skip
    span = (end_row - first_row).to(tl.int64)
    at = statistics_ptr + column_tile * span + (rows - first_row)
    kind = tl.cdiv(features, BLOCK_F) * span
    if SOFTMAX:
        peak = tl.max(z, axis=1)
        d = z - finite_peak(peak)[:, None]
        e = tl.exp(d)
        tl.store(at, peak, mask=present)
        tl.store(at + kind, tl.sum(e, axis=1), mask=present)
        tl.store(at + 2 * kind, tl.sum(tl.where(z == float("-inf"), 0.0, e * d), axis=1), mask=present)
        at += 3 * kind
    if CLAMP:
        floor = margin_of(margin, ACC)
        # A NaN is not below the margin: it stays, though it has not fired.
        tl.store(at, tl.sum(tl.where(z <= floor, 0.0, z - floor), axis=1), mask=present)
        fired = tl.sum((z > floor).to(tl.int32), axis=0)
        tl.store(fired_ptr + row_tile.to(tl.int64) * features + feature, fired, mask=has_feature)


@triton.jit(do_not_specialize=["first_row", "end_row", "column_tiles"])
def shared_combine_rows(
    statistics_ptr, row_weight_ptr, row_entropy_ptr, lse_ptr, peak_ptr, scale_ptr,
    first_row, end_row, column_tiles,
    HAS_WEIGHT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Entropy and lse of rows from their tiles; peak and scale such that row_weight * P = exp(z - peak) * scale."""
    ACC: tl.constexpr = statistics_ptr.dtype.element_ty
    span = (end_row - first_row).to(tl.int64)
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = local < span
    rows = first_row + local
    kind = column_tiles * span
    peak = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    dot = tl.zeros([BLOCK_M], ACC)
    for start in range(0, column_tiles, BLOCK_S):
        tile = start + tl.arange(0, BLOCK_S)
        at = statistics_ptr + (tile * span)[:, None] + local[None, :]
        mask = (tile < column_tiles)[:, None] & present[None, :]
        peaks = tl.load(at, mask=mask, other=float("-inf"))
        totals = tl.load(at + kind, mask=mask, other=0.0)
        dots = tl.load(at + 2 * kind, mask=mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(peaks, axis=0))
        shift = tl.where(peaks == float("-inf"), 0.0, peaks - new_peak[None, :])
        factor = tl.exp(shift)
        own_shift = tl.where(peak == float("-inf"), 0.0, peak - new_peak)
        own_factor = tl.exp(own_shift)
        dot = own_factor * (dot + total * own_shift) + tl.sum(factor * (dots + totals * shift), axis=0)
        total = own_factor * total + tl.sum(factor * totals, axis=0)
        peak = new_peak
    weight, used = used_rows(row_weight_ptr, rows, present, HAS_WEIGHT)
    # 0, or NaN of an infinite peak: a row of nothing but -inf has no softmax.
    broken = peak - peak
    log_total = tl.log(total.to(tl.float64)).to(ACC) + broken
    tl.store(row_entropy_ptr + rows, tl.where(used, log_total - dot / total, 0.0), mask=present)
    tl.store(lse_ptr + rows, tl.where(used, peak + log_total, 0.0), mask=present)
    tl.store(peak_ptr + local, tl.where(used, peak, 0.0), mask=present)
    tl.store(scale_ptr + local, tl.where(used, weight / total + broken, 0.0), mask=present)


@triton.jit(do_not_specialize=SIZES)
def shared_column_sums(
    context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
    raw_ptr, margin, context_rows, first_row, end_row, features, channels,
    peak_ptr, scale_ptr, partial_ptr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FROM_RAW: tl.constexpr, STORE_RAW: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum_n row_weight_n P_n over the rows of one tile, to partial [row tile, feature]."""
    row_tile, _, rows, present, _, feature, has_feature, z = program_logits(
        context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
        raw_ptr, margin, context_rows, first_row, end_row, features, channels,
        HAS_BIAS, HAS_WEIGHT, FROM_RAW, STORE_RAW, ACC, OPERAND, GROUP, BLOCK_M, BLOCK_F, BLOCK_D,
    )  # fmt: skip
    peak = tl.load(peak_ptr + (rows - first_row), mask=present, other=0.0)
    scale = tl.load(scale_ptr + (rows - first_row), mask=present, other=0.0)
    share = tl.exp(z - peak[:, None]) * scale[:, None]
    tl.store(partial_ptr + row_tile.to(tl.int64) * features + feature, tl.sum(share, axis=0), mask=has_feature)


@triton.jit(do_not_specialize=SIZES)
def shared_matrix(
    context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
    raw_ptr, margin, context_rows, first_row, end_row, features, channels,
    peak_ptr, scale_ptr, matrix_ptr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, FROM_RAW: tl.constexpr, STORE_RAW: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the assignment P (SOFTMAX) or of the clamped logits max(z, margin)."""
    _, _, rows, present, _, feature, has_feature, z = program_logits(
        context_ptr, c_row, c_inner, input_ptr, x_row, x_inner, weight_ptr, w_row, w_inner, bias_ptr, row_weight_ptr,
        raw_ptr, margin, context_rows, first_row, end_row, features, channels,
        HAS_BIAS, HAS_WEIGHT, FROM_RAW, STORE_RAW, ACC, OPERAND, GROUP, BLOCK_M, BLOCK_F, BLOCK_D,
    )  # fmt: skip
    if SOFTMAX:
        peak = tl.load(peak_ptr + (rows - first_row), mask=present, other=0.0)
        scale = tl.load(scale_ptr + (rows - first_row), mask=present, other=0.0)
        value = tl.exp(z - peak[:, None]) * scale[:, None]
    else:
        floor = margin_of(margin, ACC)
        value = tl.where(z <= floor, floor, z)
    at = matrix_ptr + rows[:, None] * features + feature[None, :]
    tl.store(at, value.to(matrix_ptr.dtype.element_ty), mask=present[:, None] & has_feature[None, :])


@triton.jit(do_not_specialize=["count"])
def shared_sum(
    partial_ptr, step, total_ptr, count, width,
    ADD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums partial [count, width], whose rows are `step` apart, over its first axis in a fixed order; ADD to total."""
    KIND: tl.constexpr = total_ptr.dtype.element_ty
    SUM: tl.constexpr = tl.int64 if KIND == tl.int64 else partial_ptr.dtype.element_ty  # noqa: SIM300
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = column < width
    sums = tl.zeros([BLOCK_S, BLOCK_N], SUM)
    for start in range(0, count, BLOCK_S):
        index = start + tl.arange(0, BLOCK_S)
        at = partial_ptr + (index.to(tl.int64) * step)[:, None] + column[None, :]
        sums += tl.load(at, mask=(index < count)[:, None] & mask[None, :], other=0).to(SUM)
    total = tl.sum(sums, axis=0)
    if ADD:
        total += tl.load(total_ptr + column, mask=mask, other=0).to(SUM)
    tl.store(total_ptr + column, total.to(KIND), mask=mask)
