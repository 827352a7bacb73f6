"""Both pools as operators: fake kernels, first and second derivatives, vmap.

A pool is called as ``(x, other, mask, cu_seqlens, *extra, need_weights)``, where ``other`` is the query
(attention_pool, with ``extra = (scale,)``) or the scores (softmax_pool, no extra). It returns out, lse and
weights in the accumulation type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import attention_pool as reference
from ..reference.attention_pool import acc_dtype
from .vmap import fold, loop, unfold


@dataclass(frozen=True)
class Pool:
    """One pool on one backend: its two operators and the plain PyTorch formula they compute."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]
    formula: Callable[..., tuple[Tensor, Tensor, Tensor]]
    other_is_per_token: bool

    def __call__(
        self, x: Tensor, other: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *extra: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The differentiable call; ``extra`` ends with need_weights."""
        if torch.compiler.is_compiling():
            # An operator with an autograd formula gives silent zeros below a transform under compile.
            if torch._C._are_functorch_transforms_active():
                return self.formula(x, other, mask, cu_seqlens, *extra[:-1])
            return self.forward(x, other, mask, cu_seqlens, *extra)
        if torch._C._are_functorch_transforms_active() or (
            torch.is_grad_enabled() and (x.requires_grad or other.requires_grad)
        ):
            return _Forward.apply(self, x, other, mask, cu_seqlens, extra)
        return self.forward(x, other, mask, cu_seqlens, *extra)

    def gradients(self, grad_out: Tensor, grad_weights: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        """The backward operator, itself differentiable."""
        if torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
            return _Backward.apply(self, grad_out, grad_weights, *rest)
        return self.backward(grad_out, grad_weights, *rest)

    def second_gradients(
        self,
        grads: tuple[Tensor | None, Tensor | None],
        grad_out: Tensor,
        grad_weights: Tensor | None,
        x: Tensor,
        other: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        extra: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of (grad_x, grad_other) for grad_out, grad_weights, x and other, as plain PyTorch."""

        def formula(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
            out, _, weights = self.formula(x, other, mask, cu_seqlens, *extra)
            return (out,) if grad_weights is None else (out, weights)

        def first_gradients(x: Tensor, other: Tensor, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.vjp(formula, x, other)[1](cotangents)

        cotangents = (grad_out,) if grad_weights is None else (grad_out, grad_weights)
        pullback: Any = torch.func.vjp(first_gradients, x, other, *cotangents)
        firsts, pull = pullback
        filled = tuple(
            torch.zeros_like(first) if grad is None or grad.shape != first.shape else grad
            for grad, first in zip(grads, firsts, strict=True)
        )
        grad_x, grad_other, *grad_cotangents = pull(filled)
        return grad_cotangents[0], grad_cotangents[1] if grad_weights is not None else None, grad_x, grad_other


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(pool: Pool, x: Tensor, other: Tensor, mask: Any, cu_seqlens: Any, extra: tuple[Any, ...]) -> Any:
        return pool.forward(x, other, mask, cu_seqlens, *extra)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.pool, x, other, mask, cu_seqlens, ctx.extra = inputs
        _remember(ctx, x, other, mask, cu_seqlens, output, ctx.extra[-1])

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: Any, grad_weights: Any) -> Any:
        need_x, need_other = ctx.needs_input_grad[1:3]
        grad_x, grad_other = _first_gradients(
            ctx, ctx.pool.gradients, ctx.extra[:-1], grad_out, grad_weights, need_x, need_other
        )
        return None, grad_x, grad_other, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, pool: Pool, *args: Any) -> Any:
        *tensors, extra = args
        return _vmap_forward(pool, pool.other_is_per_token, info.batch_size, in_dims[1:5], tensors, extra)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(pool: Pool, *args: Any) -> Any:
        return pool.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.pool = inputs[0]
        _remember_backward(ctx, inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *_second_gradients(ctx, ctx.pool, grads)

    @staticmethod
    def vmap(info: Any, in_dims: Any, pool: Pool, *args: Any) -> Any:
        return loop(pool.gradients, info.batch_size, in_dims[1:], args)


def _remember(ctx: Any, x: Tensor, other: Tensor, mask: Any, cu_seqlens: Any, output: Any, need_weights: bool) -> None:
    out, lse, weights = output
    ctx.mark_non_differentiable(*((lse,) if need_weights else (lse, weights)))
    ctx.save_for_backward(x, other, mask, cu_seqlens, out, lse, weights)
    ctx.set_materialize_grads(False)


def _first_gradients(
    ctx: Any,
    backward: Callable[..., tuple[Tensor, Tensor]],
    extra: tuple[Any, ...],
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    need_x: bool,
    need_other: bool,
) -> tuple[Tensor | None, Tensor | None]:
    x, other, mask, cu_seqlens, out, lse, weights = ctx.saved_tensors
    if grad_out is None:
        if grad_weights is None:
            return None, None
        grad_out = torch.zeros_like(out)
    grad_x, grad_other = backward(
        grad_out, grad_weights, x, other, mask, cu_seqlens, *extra, out, lse, weights, need_x, need_other
    )
    return grad_x if need_x else None, grad_other if need_other else None


def _remember_backward(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """inputs: grad_out, grad_weights, x, other, mask, cu_seqlens, *extra, out, lse, weights, need_x, need_other."""
    ctx.save_for_backward(*inputs[:6])
    ctx.formula_extra = inputs[6:-5]
    ctx.input_count = len(inputs)
    ctx.set_materialize_grads(False)


def _second_gradients(ctx: Any, pool: Pool, grads: Any) -> tuple[Any, ...]:
    grad_out, grad_weights, x, other, mask, cu_seqlens = ctx.saved_tensors
    seconds = pool.second_gradients(grads, grad_out, grad_weights, x, other, mask, cu_seqlens, ctx.formula_extra)
    return *seconds, *([None] * (ctx.input_count - 4))


def _vmap_forward(
    pool: Callable[..., Any], other_is_per_token: bool, size: int, dims: Any, tensors: Any, extra: tuple[Any, ...]
) -> Any:
    x_dim, other_dim, mask_dim, cu_dim = dims
    x, other, mask, cu_seqlens = tensors
    if cu_dim is None and (other_is_per_token or other_dim is None):
        # The mapped axis becomes more bags of one call.
        x = fold(x, x_dim, size)
        mask = None if mask is None else fold(mask, mask_dim, size)
        other = fold(other, other_dim, size) if other_is_per_token else other
        if cu_seqlens is not None:
            tokens = x.shape[0] // size
            starts = torch.arange(size, device=cu_seqlens.device)[:, None] * tokens + cu_seqlens[:-1]
            cu_seqlens = torch.cat([starts.flatten(), starts.new_full((1,), x.shape[0])])
        out, lse, weights = pool(x, other, mask, cu_seqlens, *extra)
        weights = unfold(weights, size) if extra[-1] else weights.expand(size, 0)
        return (unfold(out, size), unfold(lse, size), weights), (0, 0, 0)
    if x_dim is None and mask_dim is None and cu_dim is None and not other_is_per_token:
        # Only the queries are mapped: they all read x in one call.
        queries = other.movedim(other_dim, 0)
        out, lse, weights = pool(x, queries.reshape(-1, x.shape[-1]), mask, cu_seqlens, *extra)
        axes = queries.shape[:-1]
        weights = weights.unflatten(-1, axes) if extra[-1] else weights.expand(size, 0)
        return (out.unflatten(1, axes), lse.unflatten(1, axes), weights), (1, 1, -queries.dim() + 1 if extra[-1] else 0)
    return loop(pool, size, (*dims, *[None] * len(extra)), (*tensors, *extra))


def _fake_forward(x: Tensor, cu_seqlens: Tensor | None, queries: tuple[Any, ...], need_weights: bool) -> Any:
    acc = acc_dtype(x.dtype)
    bags = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        x.new_empty((bags, *queries, x.shape[-1]), dtype=acc),
        x.new_empty((bags, *queries), dtype=acc),
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


def _pool(forward: Any, backward: Any, formula: Callable[..., Any], other_is_per_token: bool) -> Pool:
    """The operator pair with its derivatives and vmap rules registered."""
    pool = Pool(forward, backward, formula, other_is_per_token)

    def setup_forward(ctx: Any, inputs: Any, output: Any) -> None:
        x, other, mask, cu_seqlens, *extra, need_weights = inputs
        ctx.extra = tuple(extra)
        _remember(ctx, x, other, mask, cu_seqlens, output, need_weights)

    def backward_of_forward(ctx: Any, grad_out: Any, grad_lse: Any, grad_weights: Any) -> Any:
        needs = ctx.needs_input_grad
        firsts = _first_gradients(ctx, backward, ctx.extra, grad_out, grad_weights, *needs[:2])
        return *firsts, *([None] * (len(needs) - 2))

    def setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
        _remember_backward(ctx, inputs)

    def backward_of_backward(ctx: Any, *grads: Any) -> Any:
        return _second_gradients(ctx, pool, grads)

    def vmap_forward(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_forward(forward, other_is_per_token, info.batch_size, in_dims[:4], args[:4], args[4:])

    def vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop(backward, info.batch_size, in_dims, args)

    torch.library.register_autograd(forward, backward_of_forward, setup_context=setup_forward)
    torch.library.register_autograd(backward, backward_of_backward, setup_context=setup_backward)
    torch.library.register_vmap(forward, vmap_forward)
    torch.library.register_vmap(backward, vmap_backward)
    return pool


def _native() -> dict[str, Pool]:
    """The C++ operators; CPU and CUDA kernels sit behind the same names."""
    ops = torch.ops.fusefeat
    torch.library.register_fake("fusefeat::attention_pool", _fake_attention_pool)
    torch.library.register_fake("fusefeat::softmax_pool", _fake_softmax_pool)
    torch.library.register_fake("fusefeat::attention_pool_backward", _fake_backward)
    torch.library.register_fake("fusefeat::softmax_pool_backward", _fake_backward)
    return {
        "attention_pool": _pool(
            ops.attention_pool.default, ops.attention_pool_backward.default, reference.attention_pool, False
        ),
        "softmax_pool": _pool(
            ops.softmax_pool.default, ops.softmax_pool_backward.default, reference.softmax_pool, True
        ),
    }


@functools.cache
def _triton() -> dict[str, Pool]:
    from ..triton import attention_pool as kernels  # imports triton, which is optional

    return {
        "attention_pool": _pool(
            kernels.attention_pool, kernels.attention_pool_backward, reference.attention_pool, False
        ),
        "softmax_pool": _pool(kernels.softmax_pool, kernels.softmax_pool_backward, reference.softmax_pool, True),
    }


_NATIVE = _native() if _library.STATE.cpu_loaded else {}


def pool(name: str, backend: str) -> Pool:
    """The pool ``name`` on a compiled backend ("cpu", "cuda" or "triton")."""
    return (_triton() if backend == "triton" else _NATIVE)[name]
