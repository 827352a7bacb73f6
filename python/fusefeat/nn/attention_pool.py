"""The published attention layer, computed without its hidden sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, checks
from ..functional.attention_pool import _attention_pool
from ..ops import attention_pool as pools
from ..ops.native import without_autocast
from ..reference import attention_pool as reference

_PARAMETERS = ("linear_in.weight", "linear_in.bias", "linear_out.weight", "linear_out.bias")


def _product(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A product of matrices whose backward autocast does not make one of half precision, where there is one."""
    if backends.under_transform():
        plain = backend == "reference" or torch.compiler.is_compiling()
        return torch.mm if plain else pools.transformed_product
    return torch.ops.fusefeat.mm.default if backend == "cpu" else torch.mm


class AttentionPool(nn.Module):
    r"""Attention pooling over tokens: q = linear_in(x), a = softmax_t(linear_out(q)), out = sum_t a_t q_t.

    The layer is linear before and after its softmax, so the [B,T,hidden_size] tensor q is never computed:

    .. math:: u = W_{in}^\top w_{out}, \qquad \text{out} = W_{in} \, \text{pool}(x, u) + b_{in}

    with :func:`fusefeat.attention_pool`; outputs and gradients equal the written-out layer's to rounding. The bias
    of ``linear_out`` shifts all scores of a bag alike and cancels in the softmax: its gradient is exactly 0.

    The layer is the attention pooling of Ilse et al., "Attention-based Deep Multiple Instance Learning" (ICML 2018),
    without the tanh between its two projections, and with the projected tokens pooled.

    The two Linears are read and never called: parametrizations of their weights count, while forward hooks (those of
    ``torch.nn.utils.prune`` among them) and adapters that add to what a Linear returns do not.

    Args:
        input_size: channels D of the tokens.
        hidden_size: channels of the result.
        backend: as in :func:`fusefeat.attention_pool`.
        device, dtype: of the parameters; their dtype must be that of the inputs or its accumulation type.

    Attributes:
        linear_in: ``Linear(input_size, hidden_size)``.
        linear_out: ``Linear(hidden_size, 1)``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("AttentionPool", "input_size", input_size)
        checks.positive_int("AttentionPool", "hidden_size", hidden_size)
        self.linear_in = nn.Linear(input_size, hidden_size, device=device, dtype=dtype)
        self.linear_out = nn.Linear(hidden_size, 1, device=device, dtype=dtype)
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool bags of tokens.

        Args:
            x: [B,T,input_size], or packed [S,input_size] with ``cu_seqlens``.
            mask: [B,T] bool, True = keep.
            cu_seqlens: [B+1] int32 or int64 offsets of packed bags.
            return_weights: also return the attention weights, [B,T] or [S].

        Returns:
            [B,hidden_size] in the dtype of ``x``, 0 for a bag without a kept token; with ``return_weights`` a pair of
            it and the weights in the dtype of ``x``.

        Raises:
            As :func:`fusefeat.attention_pool`; ValueError also for parameters of other shapes than the layer's.
        """
        checks.tokens_and_layout("AttentionPool", "x", x, mask, cu_seqlens)
        first, last = self.linear_in, self.linear_out
        if x.shape[-1] != first.in_features:
            raise ValueError(
                f"AttentionPool: x must have input_size = {first.in_features} channels, got {checks.describe(x)}"
            )
        parameters = (first.weight, first.bias, last.weight, last.bias)
        for name, parameter in zip(_PARAMETERS, parameters, strict=True):
            if parameter is not None and (parameter.dtype != x.dtype or parameter.device != x.device):
                checks.dtype_of_or_acc("AttentionPool", name, parameter, "x", x)
                checks.same_device("AttentionPool", name, parameter, "x", x)
        self._check_shapes(first.weight, last.weight)
        checks.flag("AttentionPool", "return_weights", return_weights)
        with without_autocast(x):
            out, weights = self._pool((x, *parameters, mask, cu_seqlens), return_weights)
        out = out if out.dtype == x.dtype else out.to(x.dtype)
        return (out, weights.to(x.dtype)) if return_weights else out

    def _check_shapes(self, weight_in: Tensor, weight_out: Tensor) -> None:
        """A Linear may have been replaced, or be called with parameters of others."""
        size, hidden = self.linear_in.in_features, self.linear_in.out_features
        for name, weight, shape in (
            ("linear_in.weight", weight_in, (hidden, size)),
            ("linear_out.weight", weight_out, (1, hidden)),
        ):
            if weight.shape != shape:
                raise ValueError(f"AttentionPool: {name} must have shape {list(shape)}, got {checks.describe(weight)}")

    def _pool(self, args: tuple[Any, ...], return_weights: bool) -> tuple[Tensor, Tensor]:
        """The result and the weights in the accumulation type."""
        chosen = backends.choose("attention_pool", self.backend, args[0])
        if chosen != "reference":
            checks.no_forward_mode("AttentionPool", *args)
        if chosen == "reference" or torch.compiler.is_compiling() or backends.under_transform():
            pool = partial(_attention_pool, need_weights=return_weights, backend=chosen)
            layer = partial(reference.attention_layer, pool=pool, product=_product(chosen))
            out, _, _, weights, _ = layer(*args)
        else:
            out, _, _, weights, _ = pools.layer(chosen)(*args, return_weights)
        return out, weights

    def extra_repr(self) -> str:
        return f"input_size={self.linear_in.in_features}, hidden_size={self.linear_in.out_features}"


Attention = AttentionPool
