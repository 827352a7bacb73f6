"""Faults in the CUDA kernels of the shared-penalty family, which run on the CPU here."""

from __future__ import annotations

from .table import rows

FILE = "tests/test_cuda_on_cpu_shared_penalty.py"
STATISTICS = f"{FILE} -k statistics_and and float64"  # in the most chunks
VECTORS = f"{FILE} -k statistics_and and bfloat16"  # rows of whole vectors
UNREAD = f"{FILE} -k weight_zero and float64"
TIES = f"{FILE} -k ties_give"
MATRICES = f"{FILE} -k matrices and float64"
KEPT = f"{FILE} -k kept and float32"

PRODUCTS = [
    *rows(
        "csrc/cuda/gemm.cuh",
        STATISTICS,
        ("barrier between tiles", "__syncthreads();\n    const bool more", "const bool more"),
        ("one buffer for both tiles", "turn ^= 1;", "turn ^= 0;"),
        ("first part of the depth every time", "begin = part * args.parts.depth;", "begin = 0 * part;"),
    ),
    *rows(
        "csrc/cuda/gemm_tiles.cuh",
        STATISTICS,
        (
            "rows of weight 0 read",
            "return row < matrix.rows && is_used<A>(matrix.row_weight, matrix.first + row);",
            "return row < matrix.rows;",
            UNREAD,
        ),
        (
            "row weights of the first chunk",
            "is_used<A>(matrix.row_weight, matrix.first + row)",
            "is_used<A>(matrix.row_weight, row)",
        ),
        ("rows of the first chunk", "row += matrix.first;", ""),
        (
            "first row of the input",
            "if (row < matrix.split) return matrix.head;",
            "if (row <= matrix.split) return matrix.head;",
        ),
        ("a channel too many", "read && col + i < matrix.cols ?", "read && col + i <= matrix.cols ?"),
        (
            "second half of a pair from the wrong column",
            "= (one[i] & 0xffffu) | two[i] << 16;",
            "= (one[i] & 0xffffu) | (two[i] & 0xffff0000u);",
            VECTORS,
        ),
        (
            "operands not rounded to float16",
            "if (matrix.operand != 0) {",
            "if (matrix.operand == 1) {",
            f"{FILE} -k rounded and float32",
        ),
    ),
    *rows(
        "csrc/cuda/shared_products.cu",
        STATISTICS,
        ("last part of the depth lost", "ceil_div(depth, parts.depth));", "depth / parts.depth);"),
    ),
]

ROWS = rows(
    "csrc/cuda/shared_rows.cuh",
    STATISTICS,
    ("segments' sums not rescaled", "sum += scale * segment.sum;", "sum += segment.sum;"),
    ("entropy not shifted", "(segment.dot + segment.sum * shift)", "segment.dot"),
    (
        "barrier of the peak",
        "exchange[team.lane / kWarp] = peak;\n  __syncthreads();",
        "exchange[team.lane / kWarp] = peak;",
    ),
    (
        "end of the last segment",
        "end(begin + plan.length < chunk.features ? begin + plan.length : chunk.features)",
        "end(begin + plan.length)",
        f"{FILE} -k many and features and float32",
    ),
    ("margin not subtracted", "A(0) : value - args.margin;", "A(0) : value;"),
    (
        "row weight of the chunk's first rows",
        "A(1) : args.row_weight[to]) / sum;",
        "A(1) : args.row_weight[row]) / sum;",
    ),
    ("sign of the entropy in dz", "- entropy_grad * value(args.entropy, 0)", "+ entropy_grad * value(args.entropy, 0)"),
    ("centring left out", " - terms.prob_scale * dot;", ";"),
    ("row weight left out of dz", "args.margin * value(args.row_weight, 1);", "args.margin;"),
    ("gradient of a weight of 0", "row, used ? dot : A(0));", "row, dot);", UNREAD),
)

COLUMNS = rows(
    "csrc/cuda/shared_columns.cuh",
    STATISTICS,
    (
        "rows of weight 0 fire",
        "if (!inside || !is_used<A>(args.row_weight, args.chunk.begin + row)) continue;",
        "if (!inside) continue;",
    ),
    ("a tie fires", "count += z > args.margin;", "count += z >= args.margin;", TIES),
    (
        "gradient at a tie",
        "if (args.with_excess && z > args.margin)",
        "if (args.with_excess && z >= args.margin)",
        TIES,
    ),
    (
        "clamped gradient without its margin",
        "args.margin * load_element<A>(args.grad,",
        "load_element<A>(args.grad,",
        MATRICES,
    ),
    ("fired of the last chunk only", "fired[feature] += count;", "fired[feature] = count;"),
    (
        "fired of the first range only",
        "for (int64_t range = 0; range < ranges; ++range)",
        "for (int64_t range = 0; range < 1; ++range)",
    ),
    ("no term of log P", "(terms.log_scale * log_p + terms.offset)", "terms.offset"),
    ("barrier of the column sums", "shared[threadIdx.x] = value;\n  __syncthreads();", "shared[threadIdx.x] = value;"),
    ("columns behind the last not cleared", "if (at.feature >= args.dz_stride) break;", "if (!inside) break;", VECTORS),
)

OUTPUTS = rows(
    "csrc/cuda/shared_outputs.cuh",
    STATISTICS,
    (
        "bias outside of the margin",
        "margin * (bias == nullptr ? sum : sum + bias[feature]);",
        "bias == nullptr ? margin * sum : margin * sum + bias[feature];",
    ),
    ("bias of the run's first feature", "logit(feature + i, sums[i]);", "logit(feature, sums[i]);"),
    ("clamped at 0", "value <= margin ? margin : value);", "value <= A(0) ? A(0) : value);", MATRICES),
    ("gradient of the input's first row", "if (row < context_rows) {", "if (row <= context_rows) {"),
    (
        "an unused row meets an infinite weight",
        "is_used<A>(row_weight, row) ? sum : A(0);",
        "sum;",
        f"{FILE} -k infinite_weights and float32",
    ),
    ("first chunk overwritten", "if (!sum.first) value += static_cast<const A*>(sum.sum)[at];", ""),
    (
        "first part only",
        "for (int64_t part = 0; part < parts.count; ++part)",
        "for (int64_t part = 0; part < 1; ++part)",
    ),
)

HOST = [
    *rows(
        "csrc/cuda/shared_problem.cu",
        f"{FILE} -k test_strides and float32",
        (
            "stride of a vector",
            "scalar_of(tensor->scalar_type()), tensor->stride(0), count,",
            "scalar_of(tensor->scalar_type()), 1, count,",
        ),
    ),
    *rows(
        "csrc/cuda/shared_problem.cu",
        KEPT,
        (
            "chunk over the end of what is kept",
            "end = begin < kept_rows ? kept_rows : sizes.rows();",
            "end = sizes.rows();",
        ),
    ),
    *rows(
        "csrc/cuda/shared_backward.cu",
        KEPT,
        (
            "kept logits of the first chunk",
            "(wishes_.kept->const_data_ptr()) + chunk.begin * chunk.features;",
            "(wishes_.kept->const_data_ptr());",
        ),
    ),
]

FAULTS = [*PRODUCTS, *ROWS, *COLUMNS, *OUTPUTS, *HOST]
