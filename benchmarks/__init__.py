"""Speed and memory of fusefeat beside what people use now: `python -m benchmarks`."""

FAMILIES = ("attention_pool", "shared_penalty", "clamped_reg", "shared_objective")
