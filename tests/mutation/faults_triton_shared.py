"""Faults in the Triton kernels of the shared-penalty family, which run in the interpreter here."""

from __future__ import annotations

from .table import rows

FILE = "tests/test_triton_shared_penalty.py"
CASES = f"{FILE} -k objective and (odd or tails) and bfloat16"
GIVEN = f"{FILE} -k regulariser and odd and float32"
CHUNKS = f"{FILE} -k many_chunks"
TIES = f"{FILE} -k ties"
UNUSED = f"{FILE} -k unused or (objective and garbage)"
MANY_TILES = f"{FILE} -k many_tiles"
KEPT = f"{FILE} -k kept_rows"

FORWARD = rows(
    "python/fusefeat/triton/_shared_penalty_forward.py",
    CASES,
    ("tiles' sums not rescaled", "total + tl.sum(factor * totals, axis=0)", "total + tl.sum(totals, axis=0)"),
    ("entropy not shifted", "tl.sum(factor * (dots + totals * shift), axis=0)", "tl.sum(factor * dots, axis=0)"),
    ("earlier tiles not rescaled", "total = own_factor * total +", "total = total +", MANY_TILES),
    ("earlier tiles' entropy not shifted", "(dot + total * own_shift)", "dot", MANY_TILES),
    ("sign of the entropy", "log_total - dot / total", "log_total + dot / total"),
    ("row weight left out of prob_sum", "weight / total + broken", "1.0 / total + broken", UNUSED),
    ("margin not subtracted", "tl.where(z <= floor, 0.0, z - floor)", "tl.where(z <= floor, 0.0, z)"),
    ("a tie fires", "tl.sum((z > floor).to(tl.int32), axis=0)", "tl.sum((z >= floor).to(tl.int32), axis=0)", TIES),
    ("clamped at 0", "tl.where(z <= floor, floor, z)", "tl.where(z <= 0.0, 0.0, z)", GIVEN),
    (
        "first parts only",
        "for start in range(0, count, BLOCK_S):",
        "for start in range(0, BLOCK_S, BLOCK_S):",
        MANY_TILES,
    ),
)

LOGITS = rows(
    "python/fusefeat/triton/_shared_penalty_logits.py",
    CASES,
    ("bias left out", "raw += tl.load(bias_ptr + feature,", "raw += 0.0 * tl.load(bias_ptr + feature,"),
    ("rows of weight 0 take part", "used = present & (weight != 0.0)", "used = present", UNUSED),
    ("a channel too many", "inside = channel < channels - start", "inside = channel <= channels - start"),
    ("last tile of the context lost", "tl.cdiv(border - first_row, BLOCK)", "(border - first_row) // BLOCK"),
    ("groups of tiles all of one size", "size = tl.minimum(row_tiles - first, GROUP)", "size = GROUP"),
    (
        "channel stride of the context",
        "tl.where(in_context, c_inner, x_inner)",
        "tl.where(in_context, x_inner, x_inner)",
        f"{FILE} -k objective and strided and bfloat16",
    ),
)

BACKWARD = rows(
    "python/fusefeat/triton/_shared_penalty_backward.py",
    CASES,
    ("sign of the entropy in dz", "(log_p + entropy[:, None])", "(log_p - entropy[:, None])"),
    ("centring left out", "(grad[None, :] - dots[:, None])", "grad[None, :]"),
    ("row weight left out of dz", "inner += weight[:, None] * (grad", "inner += (grad", UNUSED),
    ("gradient at a tie", "dz += tl.where(z > scale,", "dz += tl.where(z >= scale,", TIES),
    ("gradient of the clamped logits at a tie", "dz = tl.where(z > scale,", "dz = tl.where(z >= scale,", TIES),
    ("margin left out", "    dz *= scale\n", ""),
    ("centring of the assignment left out", "weighted(p, grad - dots[:, None])", "weighted(p, grad)", GIVEN),
    (
        "stride of the assignment",
        "assignment_ptr + (rows * a_row)[:, None] + (feature * a_inner)[None, :]",
        "assignment_ptr + (rows * a_row)[:, None] + feature[None, :]",
        f"{FILE} -k strided_matrices",
    ),
)

PRODUCTS = rows(
    "python/fusefeat/triton/_shared_penalty_products.py",
    CHUNKS,
    ("features of later splits too", "end = tl.minimum((split + 1) * split_features, features)", "end = features"),
    ("first chunk overwritten", "total += tl.load(at, mask=mask, other=0.0)", "total += 0.0"),
    ("an unused row meets a NaN", "total = tl.where(used[:, None], total, 0.0)", "total = total * 1.0", UNUSED),
    (
        "unused rows read",
        "mask=used[:, None] & has_channel[None, :]",
        "mask=present[:, None] & has_channel[None, :]",
        UNUSED,
    ),
)

HOST = [
    *rows(
        "python/fusefeat/triton/_shared_penalty_statistics.py",
        CHUNKS,
        (
            "fired of the last chunk only",
            "sum_parts(fired, self.fired, add=chunk.begin > 0)",
            "sum_parts(fired, self.fired)",
        ),
        (
            "prob_sum of the last chunk only",
            "sum_parts(parts, self.prob_sum, add=chunk.begin > 0)",
            "sum_parts(parts, self.prob_sum)",
            KEPT,
        ),
    ),
    *rows(
        "python/fusefeat/triton/_shared_penalty_sums.py",
        CHUNKS,
        (
            "bias gradient of the last chunk only",
            "sum_parts(bias_parts, self.bias, add=begin > 0)",
            "sum_parts(bias_parts, self.bias)",
        ),
        ("weight gradient of the last rows only", "if begin + local.start == 0:", "if local.start == 0:"),
        (
            "rows of weight 0 reach the weight",
            "x = x if unused is None else x.masked_fill(unused, 0.0)",
            "pass",
            UNUSED,
        ),
        ("gradient of rows of weight 0", "grad.masked_fill_(unused, 0.0)", "pass", UNUSED),
    ),
    *rows(
        "python/fusefeat/triton/_shared_penalty_problem.py",
        CHUNKS,
        (
            "input's rows from the first on in every chunk",
            "slice(border - self.context_rows, end - self.context_rows)",
            "slice(0, end - border)",
        ),
    ),
    *rows(
        "python/fusefeat/triton/_shared_penalty_gradients.py",
        KEPT,
        ("kept logits overwritten", "problem.operand is None and not chunk.kept:", "problem.operand is None:"),
    ),
    *rows(
        "python/fusefeat/triton/shared_penalty.py",
        CASES,
        ("gradient of the excess left out", "        excess=in_acc(grad_row_excess, acc),\n", ""),
    ),
    *rows(
        "python/fusefeat/triton/clamped_reg.py",
        CASES.replace("objective", "regulariser"),
        ("gradient of the clamped matrix left out", "LogitGradients(problem, matrix=grad)", "LogitGradients(problem)"),
    ),
]

FAULTS = [*FORWARD, *LOGITS, *BACKWARD, *PRODUCTS, *HOST]
