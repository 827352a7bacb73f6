"""Faults in the reference, the public functions, their checks and derivatives."""

from __future__ import annotations

from .table import rows

# Where the reference is held to something else than itself.
POOLS = "tests/test_attention_pool.py -k reference and (textbook or packed_equals)"
SHARED = "tests/test_shared_penalty.py -k reference and not objective and not regulariser and not gradcheck"
BAD_POOLS, BAD_SHARED = "tests/test_pool_bad_input.py", "tests/test_shared_bad_input.py"

FAULTS = [
    *rows(
        "python/fusefeat/reference/attention_pool.py",
        POOLS,
        (
            "lse without the peak",
            "peak.double() + safe_total.double().log())",
            "safe_total.double().log())",
            "tests/test_cpu_kernels.py -k {isa} and other_sizes",
        ),
        ("token on a border", "position, right=True)", "position, right=False)"),
        ("weights not normalised", "weight = weight / safe_total[:, None]", "weight = weight / 1.0"),
        (
            "a score of -inf counts when there is a mask",
            "keep = keep if mask is None else keep & mask\n        # Scored",
            "keep = keep if mask is None else mask\n        # Scored",
            "tests/test_attention_pool.py -k cpu and beside and mask",
        ),
    ),
    *rows(
        "python/fusefeat/reference/shared_penalty.py",
        SHARED,
        ("sign of the entropy", "entropy = total.log().squeeze(1) - ", "entropy = total.log().squeeze(1) + "),
        ("switched-off features count", "e = torch.where(off, 0.0, d.exp())", "e = d.exp()"),
        (
            "bias outside of the margin",
            "return margin * (z if bias is None else z + bias.to(acc))",
            "return margin * z if bias is None else margin * z + bias.to(acc)",
        ),
        ("a tie fires", "fired, broken = z > margin, z.isnan()", "fired, broken = z >= margin, z.isnan()"),
        ("rows of weight 0 read", "rows = torch.where((row_weight != 0)[:, None], rows, 0.0)", "rows = rows * 1"),
    ),
    *rows(
        "python/fusefeat/reference/clamped_reg.py",
        SHARED,
        ("gradient at a tie", "torch.where(z > margin, z, torch", "torch.where(z >= margin, z, torch"),
    ),
    *rows(
        "python/fusefeat/functional/clamped_reg.py",
        SHARED,
        ("floor once per row", "reg = excess + floor * features * total", "reg = excess + floor * total"),
        ("mean over rows only", "reg = excess / (safe_total * max(features, 1))", "reg = excess / safe_total"),
        (
            "share of all rows",
            "used_rows = (logits.row_weight != 0).sum()",
            "used_rows = (logits.row_weight >= 0).sum()",
        ),
    ),
    *rows(
        "python/fusefeat/functional/_penalty.py",
        SHARED,
        ("prior left out", "mean_probs * (log_probs - log_prior), 0.0)", "mean_probs * log_probs, 0.0)"),
        (
            "prob_sum not divided",
            "conditional, mean_probs = entropy_sum / total, prob_sum / total",
            "conditional, mean_probs = entropy_sum / total, prob_sum",
        ),
        ("logarithm of an unused feature", "used = ~(mean_probs <= 0)", "used = ~(mean_probs < 0)"),
        (
            "weights of the two terms exchanged",
            "entropy_weight * conditional + balance_weight * divergence",
            "balance_weight * conditional + entropy_weight * divergence",
        ),
        (
            "row weights left out",
            "ordered_sum(row_weight * row_entropy), ordered_sum(row_weight)",
            "ordered_sum(row_entropy), ordered_sum(row_weight)",
        ),
    ),
    *rows(
        "python/fusefeat/checks.py",
        BAD_POOLS,
        (
            "equal offsets refused",
            "if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):",
            "if bool((cu_seqlens[1:] <= cu_seqlens[:-1]).any()):",
            "tests/test_pool_bad_input.py -k many_offsets",
        ),
        ("few offsets in any order", "values == sorted(values):", "values:"),
        ("any end of the offsets", "if first != 0 or last != tokens:", "if first != 0:"),
        ("mask of any length", "if mask.shape != x.shape[:2]:", "if mask.shape[:1] != x.shape[:1]:"),
        ("infinite scale", "if not -math.inf < number < math.inf:", "if not -math.inf <= number <= math.inf:"),
        ("negative row_weight", "bool((value < 0).any()):", "bool((value < -1e30).any()):", BAD_SHARED),
        (
            "width of the weight",
            "if value.shape[1] != like.shape[1]:",
            "if value.shape[1] < like.shape[1]:",
            BAD_SHARED,
        ),
    ),
    *rows(
        "python/fusefeat/functional/_shared.py",
        BAD_SHARED,
        (
            "margin of 0",
            "isinstance(margin, torch.SymFloat) and margin <= 0:",
            "isinstance(margin, torch.SymFloat) and margin < 0:",
        ),
        (
            "rows lost in a long sum",
            "(count + length - 1) // length",
            "max(count // length, 1)",
            "tests/test_shared_penalty.py -k sum_of_many",
        ),
    ),
    *rows(
        "python/fusefeat/ops/attention_pool.py",
        "tests/test_pool_operators.py -k vmap",
        ("offsets of mapped bags", "[:, None] * tokens + cu_seqlens[:-1]", "[:, None] * tokens + cu_seqlens[1:]"),
    ),
    *rows(
        "python/fusefeat/ops/differentiable.py",
        "tests/test_pool_operators.py",
        (
            "gradient where none came in",
            "picked[0] = torch.zeros_like(outputs[0])",
            "picked[0] = torch.ones_like(outputs[0])",
            "tests/test_pool_semantics.py -k cpu",
        ),
        (
            "second gradients of nothing",
            "torch.zeros_like(first)\n",
            "torch.ones_like(first)\n",
            "tests/test_attention_pool.py -k gradcheck and cpu",
        ),
    ),
    *rows(
        "python/fusefeat/ops/attention_pool.py",
        "tests/test_nn_attention_pool.py -k not compile",
        ("bias of an empty bag", "masked_fill_((lse == reference.NEG_INF)", "masked_fill_((lse != lse)"),
        ("gradient of the score bias", "torch.zeros_like(bias_out)", "torch.ones_like(bias_out)"),
    ),
    *rows(
        "python/fusefeat/reference/attention_pool.py",
        "tests/test_nn_attention_pool.py -k composition",
        ("bias of an empty bag", "torch.where((lse != NEG_INF)[:, None],", "torch.where((lse == lse)[:, None],"),
        (
            "score bias in the scores",
            "never = torch.zeros((), dtype=torch.bool",
            "never = torch.ones((), dtype=torch.bool",
        ),
    ),
]
