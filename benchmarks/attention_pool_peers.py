"""The pool as it is written without fusefeat: x [B,T,D] or [S,D], query [D] or [K,D], no scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import Bound, Contender, Inputs, Skip
from .peers import compiled, optional

Function = Callable[..., Tensor]


def matmul_pool(x: Tensor, query: Tensor) -> Tensor:
    if query.dim() == 1:
        weights = torch.softmax(x @ query, 1)
        return (weights.unsqueeze(1) @ x).squeeze(1)
    return torch.softmax(x @ query.T, 1).transpose(1, 2) @ x


def product_pool(x: Tensor, query: Tensor) -> Tensor:
    """Products and sums, which torch.compile can fuse where it leaves matrix products alone."""
    weights = torch.softmax((x * query).sum(-1), 1)
    return (weights.unsqueeze(-1) * x).sum(1)


def scored_pool(x: Tensor, scores: Tensor) -> Tensor:
    return (torch.softmax(scores, 1).unsqueeze(1) @ x).squeeze(1)


def scored_product_pool(x: Tensor, scores: Tensor) -> Tensor:
    return (torch.softmax(scores, 1).unsqueeze(-1) * x).sum(1)


def attention_pool(x: Tensor, query: Tensor) -> Tensor:
    queries = query.reshape(1, 1, -1, x.shape[2]).expand(x.shape[0], -1, -1, -1)
    tokens = x.unsqueeze(1)
    out = F.scaled_dot_product_attention(queries, tokens, tokens, scale=1.0).squeeze(1)
    return out.squeeze(1) if query.dim() == 1 else out


def segment_pool(x: Tensor, query: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Softmax per segment with scatter operations; sums in float32 at least, or half types would lose long bags."""
    acc = torch.promote_types(x.dtype, torch.float32)
    scores = (x @ query).to(acc)
    peak = scores.new_full((bags,), float("-inf")).scatter_reduce(0, bag, scores.detach(), "amax")
    weights = (scores - peak[bag]).exp()
    weights = weights / weights.new_zeros(bags).index_add(0, bag, weights)[bag]
    out = x.new_zeros((bags, x.shape[1]), dtype=acc).index_add(0, bag, weights.unsqueeze(1) * x)
    return out.to(x.dtype)


def loop_pool(x: Tensor, query: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.stack([torch.softmax(bag @ query, 0) @ bag for bag in x.split(list(lengths))])


def padded_pool(x: Tensor, query: Tensor, mask: Tensor) -> Tensor:
    """Packed to padded, then one masked attention; the padding is part of the price."""
    padded = x.new_zeros((*mask.shape, x.shape[1])).masked_scatter(mask.unsqueeze(-1), x).unsqueeze(1)
    queries = query.expand(mask.shape[0], 1, 1, -1)
    out = F.scaled_dot_product_attention(queries, padded, padded, attn_mask=mask[:, None, None, :], scale=1.0)
    return out[:, 0, 0]


def nested_pool(x: Tensor, query: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    bags = cu_seqlens.shape[0] - 1
    tokens = torch.nested.nested_tensor_from_jagged(x, cu_seqlens, min_seqlen=0, max_seqlen=longest)
    if not x.is_cuda:
        weights = torch.softmax((tokens * query).sum(-1, keepdim=True), 1)
        return (weights * tokens).sum(1)
    one_each = torch.arange(bags + 1, device=x.device)
    queries = torch.nested.nested_tensor_from_jagged(query.expand(bags, -1), one_each, min_seqlen=1, max_seqlen=1)
    heads = tokens.unsqueeze(-2).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries.unsqueeze(-2).transpose(1, 2), heads, heads, scale=1.0)
    return out.transpose(1, 2).values().squeeze(1)


def nested_padded_pool(x: Tensor, query: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Nested tensors' own way of padding, which has a backward where their sum over tokens has none."""
    tokens = torch.nested.nested_tensor_from_jagged(x, cu_seqlens, min_seqlen=0, max_seqlen=longest)
    scores = (tokens @ query.unsqueeze(1)).to_padded_tensor(float("-inf"))
    return (torch.softmax(scores, 1).transpose(1, 2) @ tokens.to_padded_tensor(0.0)).squeeze(1)


def geometric_pool(x: Tensor, query: Tensor, bag: Tensor, bags: int) -> Tensor:
    utils = optional("torch_geometric.utils", "torch_geometric")
    weights = utils.softmax(x @ query, bag, num_nodes=bags)
    return utils.scatter(weights.unsqueeze(1) * x, bag, dim=0, dim_size=bags, reduce="sum")


def published_layer(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> Tensor:
    hidden = F.linear(x, weight_in, bias_in)
    weights = torch.softmax(F.linear(hidden, weight_out, bias_out), 1)
    return (weights * hidden).sum(1)


def attention_layer(x: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor) -> Tensor:
    """The score bias cancels in the softmax; it takes part with factor 0, so that it has a gradient."""
    hidden = F.linear(x, weight_in, bias_in).unsqueeze(1)
    queries = weight_out.expand(x.shape[0], 1, 1, -1)
    out = F.scaled_dot_product_attention(queries, hidden, hidden, scale=1.0)[:, 0, 0]
    return out + 0.0 * bias_out


def _bind(function: Function, names: Sequence[str], inputs: Inputs) -> Bound:
    arguments = [inputs[name] for name in names]
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    return Bound(lambda: function(*arguments), leaves)


def _plain(name: str, peer: str, function: Function, names: Sequence[str]) -> Contender:
    return Contender(name, peer, partial(_bind, function, names))


def _compiled(name: str, function: Function, names: Sequence[str], device: torch.device) -> Contender:
    return Contender(name, "compile", lambda inputs: _bind(compiled(function, device), names, inputs))


def padded(device: torch.device, one_query: bool) -> list[Contender]:
    names = ("x", "query")
    found = [_plain("eager", "eager", matmul_pool, names)]
    if one_query:
        found.append(_plain("eager products", "eager", product_pool, names))
    found.append(_compiled("compile", matmul_pool, names, device))
    if one_query:
        found.append(_compiled("compile products", product_pool, names, device))
    found.append(_plain("sdpa", "sdpa", attention_pool, names))
    return found


def scored(device: torch.device) -> list[Contender]:
    names = ("x", "scores")
    return [
        _plain("eager", "eager", scored_pool, names),
        _plain("eager products", "eager", scored_product_pool, names),
        _compiled("compile", scored_pool, names, device),
        _compiled("compile products", scored_product_pool, names, device),
    ]


def packed(lengths: Sequence[int], device: torch.device) -> list[Contender]:
    bags, longest, tokens = len(lengths), max(lengths), sum(lengths)
    names = ("x", "query")

    def bag_of_token() -> Tensor:
        # Graph libraries hold this vector anyway, so it is not part of anybody's time.
        sizes = torch.tensor(lengths, device=device)
        return torch.repeat_interleave(torch.arange(bags, device=device), sizes)

    def bind_segment(inputs: Inputs, compile: bool) -> Bound:
        bag = bag_of_token()

        def pool(x: Tensor, query: Tensor) -> Tensor:
            return segment_pool(x, query, bag, bags)

        return _bind(compiled(pool, device) if compile else pool, names, inputs)

    def bind_nested(inputs: Inputs) -> Bound:
        return _bind(partial(nested_pool, longest=longest), ("x", "query", "cu_seqlens"), inputs)

    def bind_geometric(inputs: Inputs) -> Bound:
        optional("torch_geometric", "torch_geometric")
        return _bind(partial(geometric_pool, bag=bag_of_token(), bags=bags), names, inputs)

    def bind_loop(inputs: Inputs) -> Bound:
        if bags > 256:
            raise Skip(f"one call per bag is not a choice for {bags} bags")
        return _bind(partial(loop_pool, lengths=lengths), names, inputs)

    def check_padding() -> None:
        if bags * longest > 4 * tokens:
            raise Skip(f"padding to {longest} would take {bags * longest / tokens:.1f} times the tokens' memory")

    def bind_nested_padded(inputs: Inputs) -> Bound:
        check_padding()
        return _bind(partial(nested_padded_pool, longest=longest), ("x", "query", "cu_seqlens"), inputs)

    def bind_padded(inputs: Inputs) -> Bound:
        check_padding()
        mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        return _bind(partial(padded_pool, mask=mask), names, inputs)

    return [
        Contender("eager", "eager", partial(bind_segment, compile=False)),
        Contender("compile", "compile", partial(bind_segment, compile=True)),
        Contender("loop over bags", "loop", bind_loop),
        Contender("padded sdpa", "padded", bind_padded),
        Contender("nested", "nested", bind_nested),
        Contender("nested, padded", "nested", bind_nested_padded),
        Contender("torch_geometric", "pyg", bind_geometric),
    ]


def _bind_timm(inputs: Inputs) -> Bound:
    """One head, no projections but that of keys and values, which are one another: the published layer."""
    pools = optional("timm.layers", "timm")
    hidden, channels = inputs["weight_in"].shape
    if hidden != channels:
        raise Skip(f"timm's layer has as many channels behind its projection as before, not {channels} -> {hidden}")
    x = inputs["x"]
    try:
        pool = pools.AttentionPoolLatent(channels, out_features=0, num_heads=1, q_proj=False).to(x)
    except (AttributeError, TypeError) as error:
        raise Skip(f"this timm has no AttentionPoolLatent without a query's projection ({error})") from error

    def forward() -> Tensor:
        parameters = {
            "latent": (inputs["weight_out"] * channels**0.5).unsqueeze(0),
            "kv.weight": torch.cat([inputs["weight_in"]] * 2),
            "kv.bias": torch.cat([inputs["bias_in"]] * 2),
        }
        # The score bias cancels; it takes part with factor 0, so that it has a gradient.
        return torch.func.functional_call(pool, parameters, (x,)) + 0.0 * inputs["bias_out"]

    return Bound(forward, {name: tensor for name, tensor in inputs.items() if tensor.requires_grad})


def layer(device: torch.device) -> list[Contender]:
    names = ("x", "weight_in", "bias_in", "weight_out", "bias_out")
    return [
        _plain("eager", "eager", published_layer, names),
        _compiled("compile", published_layer, names, device),
        _plain("sdpa", "sdpa", attention_layer, names),
        Contender("timm", "timm", _bind_timm),
    ]
