"""What any implementation of a pool must move and compute: who computes scores or weights anew does more than that."""

from __future__ import annotations

from .case import Work
from .floor import NEW_COPY, READ


def _with_both(forward: Work, backward: Work) -> dict[str, Work]:
    both = Work(forward.bytes + backward.bytes, forward.flops + backward.flops, forward.floors + backward.floors)
    return {"forward": forward, "backward": backward, "both": both}


def pool(tokens: int, channels: int, queries: int, bags: int, item: int, grad_x: bool) -> dict[str, Work]:
    """Reads tokens and query, writes the result; reads the result's gradient and writes those of both inputs. Products:
    scores and weighted sum; backward <x, grad out>, the gradient of the query and two terms of that of x."""
    x, query, out = tokens * channels, queries * channels, bags * queries * channels
    product = 2 * tokens * channels * queries
    forward = Work((x + query + out) * item, 2 * product, ((READ,),))
    backward = Work(
        ((2 if grad_x else 1) * x + 2 * query + out) * item,
        (4 if grad_x else 2) * product,
        (NEW_COPY,) if grad_x else ((READ,),),
    )
    return _with_both(forward, backward)


def scored(tokens: int, channels: int, bags: int, item: int) -> dict[str, Work]:
    """Scores are read, not computed: one product forward, <x, grad out> and weight times grad out backward."""
    x, out, product = tokens * channels, bags * channels, 2 * tokens * channels
    forward = Work((x + tokens + out) * item, product, ((READ,),))
    return _with_both(forward, Work((2 * x + 2 * tokens + out) * item, 2 * product, (NEW_COPY,)))


def layer(tokens: int, channels: int, hidden: int, bags: int, item: int) -> dict[str, Work]:
    """A pool with weight_in^T weight_out for a query, then weight_in times each bag's result, and both
    gradients. weight_in is read by each pass, biases and weight_out are vectors of ``hidden``."""
    inner = pool(tokens, channels, 1, bags, item, grad_x=True)
    x, weight, out = tokens * channels, hidden * channels, bags * hidden
    product = 2 * weight * (bags + 1)
    forward, backward = inner["forward"], inner["backward"]
    return _with_both(
        Work((x + weight + 2 * hidden + out) * item, forward.flops + product, forward.floors),
        Work((2 * x + 2 * weight + 3 * hidden + out) * item, backward.flops + 2 * product, backward.floors),
    )
