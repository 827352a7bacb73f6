"""Faults in the CUDA kernels of the pools, which run on the CPU here."""

from __future__ import annotations

from .table import rows

FILE = "tests/test_cuda_on_cpu_attention_pool.py"
SMALL = f"{FILE} -k many_small"
LONG = f"{FILE} -k long_bags and packed"
PADDED = f"{FILE} -k single_tokens and padded"
DROPPED = f"{FILE} -k minus_infinity"
STRIDES = f"{FILE} -k test_strides or expanded"

FAULTS = [
    *rows(
        "csrc/cuda/bags.cuh",
        SMALL,
        ("end of a bag", "probe < high && end(probe) <= token", "probe < high && end(probe) < token"),
        ("padded tokens from the first bag", "(token_index - origin) * token;", "token_index * token;", PADDED),
        ("step over empty bags", "bag = next > bag ? next : bag + 1;", "bag = next > bag ? next + 1 : bag + 1;"),
    ),
    *rows(
        "csrc/cuda/attention_pool_forward.cuh",
        LONG,
        ("sum not rescaled", "sum[k][c] *= factor;", "sum[k][c] *= A(1);"),
        ("own total not rescaled", "total[k] = mine * total[k] +", "total[k] = total[k] +"),
        ("absorbed total not rescaled", "total[k] += factor * other_total;", "total[k] += other_total;"),
        ("lse of an empty bag", "args.lse[row0 + k] = neg_inf<double>();", "args.lse[row0 + k] = 0;", SMALL),
        (
            "empty bag written in part",
            "c < begin + Traits::kMaxChannels; c += kWarp) out[c] = 0;",
            "c < begin + kWarp; c += kWarp) out[c] = 0;",
            SMALL,
        ),
        ("stride of the mask", "keep[r] = mask[i * args.mask.layout.token];", "keep[r] = mask[i];", STRIDES),
        ("value of a dropped token touched", "if (s == neg_inf<A>()) continue;", "", DROPPED),
        (
            "barrier before the merge",
            "if (plan.workers == 1) return;\n  __syncthreads();",
            "if (plan.workers == 1) return;",
        ),
        ("head and tail slots exchanged", "inside ? kTail : kHead;", "inside ? kHead : kTail;"),
    ),
    *rows(
        "csrc/cuda/attention_pool_backward.cuh",
        SMALL,
        ("delta left out", "ds = p * (dp - static_cast<const A*>(args.delta)[row]);", "ds = p * dp;"),
        ("scale left out", "dot(r, k) = ds * static_cast<A>(args.scale);", "dot(r, k) = ds;"),
        (
            "tokens of no bag not written",
            "if (args.grad_tokens != nullptr) store_token(first + i, zeros);",
            "",
            f"{FILE} -k no_bag",
        ),
        (
            "barrier before the workers' sum",
            "if (plan.workers == 1) return;\n    __syncthreads();",
            "if (plan.workers == 1) return;",
        ),
        (
            "query stride of grad_weights",
            "i * layout.token + query_of(k) * layout.inner];",
            "i * layout.token + query_of(k)];",
            STRIDES,
        ),
    ),
    *rows(
        "csrc/cuda/attention_pool_steps.cuh",
        SMALL,
        ("parts not rescaled", "const A factor = rescale(stat[0], peak);", "const A factor = A(1);", LONG),
        (
            "barrier before shared memory is used again",
            "  __syncthreads();\n  shared[warp * kWarp + lane] = value;",
            "  shared[warp * kWarp + lane] = value;",
            LONG,
        ),
        (
            "gradient of the weights left out of delta",
            "delta[row] = sum + (weighted == nullptr ? A(0) : weighted[row]);",
            "delta[row] = sum;",
        ),
        (
            "query's gradient not scaled",
            "sum = sum_of_warps(sum, shared) * static_cast<A>(args.scale);",
            "sum = sum_of_warps(sum, shared);",
        ),
        ("weight of a dropped token", "if (score != neg_inf<A>()) weight = weight_of(", "weight = weight_of(", DROPPED),
    ),
    *rows(
        "csrc/cuda/primitives.cuh",
        DROPPED,
        ("exchange memory used twice", "    turn ^= 1;\n", "", FILE),
        (
            "rescale between equal infinities",
            "return from == to ? A(1) : exp_of(from - to);",
            "return exp_of(from - to);",
        ),
    ),
    *rows(
        "csrc/cuda/attention_pool.cu",
        LONG,
        (
            "last block's part of the query's gradient",
            "sums.count = args.plan.blocks;",
            "sums.count = args.plan.blocks - 1;",
        ),
    ),
]
