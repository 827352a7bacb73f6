"""Speed and memory of fusefeat beside what people use now: `python -m benchmarks`."""

FAMILIES = ("attention_pool",)
