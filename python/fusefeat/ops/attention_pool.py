"""Both pools as operators: fake kernels, derivatives, vmap.

A pool is called as ``(x, other, mask, cu_seqlens, *scale, need_weights)``, where ``other`` is the query
(attention_pool, which has a scale) or the scores (softmax_pool, which has none). It returns out and weights in the
accumulation type and lse in float64.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import attention_pool as reference
from ..reference.attention_pool import acc_dtype
from .differentiable import Operator, run_when_compiling
from .native import NativeOperators, without_autocast
from .vmap import fold, loop, unfold


def _vmap(
    other_is_per_token: bool, call: Callable[..., Any], size: int, dims: Sequence[Any], args: Sequence[Any]
) -> Any:
    x_dim, other_dim, mask_dim, cu_dim = dims[:4]
    x, other, mask, cu_seqlens, *extra = args
    need_weights = extra[-1]
    if x_dim is None and mask_dim is None and cu_dim is None:
        # Only the queries or scores are mapped: they all read x in one call.
        axis = x.dim() - 1 if other_is_per_token else 0
        queries = other.movedim(other_dim, axis)
        axes = queries.shape[axis:] if other_is_per_token else queries.shape[:-1]
        flat = queries.flatten(axis) if other_is_per_token else queries.flatten(0, -2)
        out, lse, weights = call(x, flat, mask, cu_seqlens, *extra)
        weights = weights.unflatten(-1, axes) if need_weights else weights.expand(size, 0)
        return (out.unflatten(1, axes), lse.unflatten(1, axes), weights), (1, 1, x.dim() - 1 if need_weights else 0)
    if cu_dim is None and (other_is_per_token or other_dim is None):
        # The mapped axis becomes more bags of one call.
        x = fold(x, x_dim, size)
        mask = None if mask is None else fold(mask, mask_dim, size)
        other = fold(other, other_dim, size) if other_is_per_token else other
        if cu_seqlens is not None:
            tokens = x.shape[0] // size
            starts = torch.arange(size, device=cu_seqlens.device)[:, None] * tokens + cu_seqlens[:-1]
            cu_seqlens = torch.cat([starts.flatten(), starts.new_full((1,), x.shape[0])])
        out, lse, weights = call(x, other, mask, cu_seqlens, *extra)
        weights = unfold(weights, size) if need_weights else weights.expand(size, 0)
        return (unfold(out, size), unfold(lse, size), weights), (0, 0, 0)
    return loop(call, size, dims, args)


def _pool(
    forward: Any, backward: Any, formula: Callable[..., Any], arguments: int, other_is_per_token: bool
) -> Operator:
    return Operator(
        forward,
        backward,
        formula,
        wrt=(0, 1),
        backward_args=arguments,
        grads=(0, 2),
        saved=(0, 1, 2),
        optional=(2, arguments),
        needs_as_list=False,
        first_grad_required=True,
        vmap_rule=functools.partial(_vmap, other_is_per_token),
    ).register()


def _pools(ops: Any) -> dict[str, Operator]:
    return {
        "attention_pool": _pool(
            ops.attention_pool, ops.attention_pool_backward, reference.attention_pool, 5, other_is_per_token=False
        ),
        "softmax_pool": _pool(
            ops.softmax_pool, ops.softmax_pool_backward, reference.softmax_pool, 4, other_is_per_token=True
        ),
    }


def _fake_forward(x: Tensor, cu_seqlens: Tensor | None, queries: tuple[Any, ...], need_weights: bool) -> Any:
    acc = acc_dtype(x.dtype)
    bags = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        x.new_empty((bags, *queries, x.shape[-1]), dtype=acc),
        x.new_empty((bags, *queries), dtype=torch.float64),
        x.new_empty((*x.shape[:-1], *queries) if need_weights else (0,), dtype=acc),
    )


def _fake_attention_pool(
    x: Tensor, query: Tensor, mask: Any, cu_seqlens: Tensor | None, scale: float, need_weights: bool
) -> Any:
    return _fake_forward(x, cu_seqlens, tuple(query.shape[:-1]), need_weights)


def _fake_softmax_pool(values: Tensor, scores: Tensor, mask: Any, cu_seqlens: Tensor | None, need_weights: bool) -> Any:
    return _fake_forward(values, cu_seqlens, tuple(scores.shape[values.dim() - 1 :]), need_weights)


def _fake_backward(grad_out: Tensor, grad_weights: Any, x: Tensor, other: Tensor, *rest: Any) -> Any:
    need_x, need_other = rest[-2:]
    return x.new_empty(x.shape if need_x else (0,)), other.new_empty(other.shape if need_other else (0,))


def _fake_mm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _save_mm(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    mm = torch.ops.fusefeat.mm.default  # neither autocast nor the number of threads changes it
    return mm(grad, b.t()), mm(a.t(), grad)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a):
            return torch.mm(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return transformed_product(grad, b.t()), transformed_product(a.t(), grad)


def transformed_product(a: Tensor, b: Tensor) -> Tensor:
    """a b under the transforms of ``torch.func``, in derivatives too without autocast."""
    return _Product.apply(a, b)


def _native() -> dict[str, Operator]:
    torch.library.register_fake("fusefeat::mm", _fake_mm)
    torch.library.register_autograd("fusefeat::mm", _mm_backward, setup_context=_save_mm)
    torch.library.register_fake("fusefeat::attention_pool", _fake_attention_pool)
    torch.library.register_fake("fusefeat::softmax_pool", _fake_softmax_pool)
    torch.library.register_fake("fusefeat::attention_pool_backward", _fake_backward)
    torch.library.register_fake("fusefeat::softmax_pool_backward", _fake_backward)
    return _pools(NativeOperators())


_NATIVE = _native() if _library.STATE.cpu_loaded else {}
_LOADED = {"cpu": _NATIVE, "cuda": _NATIVE}
_LOCK = threading.Lock()


@run_when_compiling
def _load_triton() -> bool:
    with _LOCK:
        if "triton" in _LOADED:
            return True
        from ..triton import attention_pool as kernels  # imports triton, which is optional

        _LOADED["triton"] = _pools(kernels)
    return True


@functools.cache
def layer(backend: str) -> Operator:
    """nn.AttentionPool in eager mode as one step of autograd: see there for what it computes.

    Called as ``(x, weight_in, bias_in, weight_out, bias_out, mask, cu_seqlens, need_weights)``; returns out, pooled,
    lse, weights and the query.
    """
    operator = pool("attention_pool", backend)
    mm = torch.ops.fusefeat.mm.default if backend == "cpu" else torch.mm

    def forward(
        x: Tensor, weight_in: Tensor, bias_in: Any, weight_out: Tensor, bias_out: Any, mask: Any, cu: Any, need: bool
    ) -> tuple[Tensor, ...]:
        acc = acc_dtype(x.dtype)
        with without_autocast(x):
            weight_in = weight_in.to(acc)
            query = mm(weight_out.to(acc), weight_in).squeeze(0)
            pooled, lse, weights = operator.forward(x, query, mask, cu, 1.0, need)
            out = mm(pooled, weight_in.t())
            if bias_in is not None:
                out.add_(bias_in)
            out.masked_fill_((lse == reference.NEG_INF).unsqueeze(1), 0.0)
        return out, pooled, lse, weights, query

    def backward(
        grad: Tensor,
        grad_weights: Any,
        x: Tensor,
        weight_in: Tensor,
        bias_in: Any,
        weight_out: Tensor,
        bias_out: Any,
        mask: Any,
        cu: Any,
        out: Tensor,
        pooled: Tensor,
        lse: Tensor,
        weights: Tensor,
        query: Tensor,
        needs: list[bool],
    ) -> tuple[Tensor | None, ...]:
        acc = acc_dtype(x.dtype)
        grads: list[Tensor | None] = [None] * 5
        with without_autocast(x):
            inner = weight_in.to(acc)
            need_query = needs[1] or needs[3]
            grads[0], grad_query = operator.backward(
                mm(grad, inner), grad_weights, x, query, mask, cu, 1.0, pooled, lse, weights, needs[0], need_query
            )
            # What comes in for an empty bag, NaN for one, goes nowhere.
            kept = torch.where((lse != reference.NEG_INF).unsqueeze(1), grad, 0.0) if needs[1] or needs[2] else grad
            if needs[1]:
                # In place, unless the second term alone may carry the axis of batched gradients.
                add = Tensor.addcmul if torch._C._functorch.is_legacy_batchedtensor(grad_query) else Tensor.addcmul_
                grads[1] = add(mm(kept.t(), pooled), weight_out.to(acc).t(), grad_query.unsqueeze(0))
            if needs[2]:
                grads[2] = mm(kept.new_ones(1, kept.shape[0]), kept).squeeze(0)
            if needs[3]:
                grads[3] = mm(grad_query.unsqueeze(0), inner.t())
            if needs[4]:
                grads[4] = torch.zeros_like(bias_out)
        parameters = (x, weight_in, bias_in, weight_out, bias_out)
        return tuple(
            like.new_empty(0)
            if found is None and like is not None
            else found
            if found is None
            else found.to(like.dtype)
            for found, like in zip(grads, parameters, strict=True)
        )

    return Operator(
        forward,
        backward,
        reference.attention_layer,
        wrt=(0, 1, 2, 3, 4),
        backward_args=7,
        grads=(0, 3),
        saved=(0, 1, 2, 3, 4),
        optional=(3, 7),
        first_grad_required=True,
    )


def pool(name: str, backend: str) -> Operator:
    """The pool ``name`` on a compiled backend ("cpu", "cuda" or "triton")."""
    if backend == "triton":
        _load_triton()
    return _LOADED[backend][name]
