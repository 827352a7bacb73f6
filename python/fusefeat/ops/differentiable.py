"""A forward operator and its backward operator, made differentiable to any order and under every transform.

Eager mode goes through one thin ``autograd.Function``, torch.func through a pair of them; the registered autograd
formula serves torch.compile and direct calls of the operators. Second derivatives are those of the plain PyTorch
formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks
from .native import without_autocast
from .vmap import loop

VmapRule = Callable[[Callable[..., Any], int, Sequence[Any], Sequence[Any]], Any]


def _tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _kernel(call: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """Call an operator where no derivative is recorded. The formula registered with it is written in Python, and
    merely passing by it takes longer than a small kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return _tuple(call(*args))


def run_when_compiling(function: Callable[[], bool]) -> Callable[[], bool]:
    """torch.compile calls it, for registrations that cannot be traced into.

    ``torch.compiler.assume_constant_result`` does just this, but imports the compiler first, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True, eq=False)
class Operator:
    """One op on one backend.

    The backward operator is called as ``(*grads, *args[:backward_args], *saved outputs, needs)`` and returns one
    gradient per position in ``wrt``; what it was not asked for it returns as an empty tensor.

    Attributes:
        forward, backward: the two operators.
        formula: what they compute, as differentiable PyTorch: ``args[:backward_args]`` to all outputs.
        wrt: positions of the arguments that have gradients.
        backward_args: how many of the forward's arguments the backward takes.
        grads: positions of the outputs that have gradients.
        saved: positions of the outputs that the backward takes.
        optional: position of an output that is empty unless an argument is true, and the position of that argument.
        needs_as_list: whether ``needs`` is one list of flags or a flag an argument.
        first_grad_required: whether the backward wants a tensor for the first gradient even where nothing came in;
            it is then that of the first saved output.
        vmap_rule: batching of the forward; one call per entry when None.
    """

    forward: Any
    backward: Any
    formula: Callable[..., tuple[Tensor, ...]]
    wrt: tuple[int, ...]
    backward_args: int
    grads: tuple[int, ...]
    saved: tuple[int, ...]
    optional: tuple[int, int] | None = None
    needs_as_list: bool = True
    first_grad_required: bool = False
    vmap_rule: VmapRule | None = None

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        transformed = torch._C._are_functorch_transforms_active()
        if torch.compiler.is_compiling():
            # An operator with an autograd formula gives silent zeros below a transform under compile.
            return _tuple(self.formula(*args[: self.backward_args]) if transformed else self.forward(*args))
        if transformed:
            return _tuple(_Forward.apply(self, *args))
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in self.wrt):
            return _tuple(_Eager.apply(self, args, *[args[i] for i in self.wrt]))
        return _kernel(self.forward, args)

    def gradients(self, *args: Any) -> tuple[Any, ...]:
        """The backward operator, itself differentiable."""
        if torch._C._are_functorch_transforms_active() or torch.is_grad_enabled():
            return _tuple(_Backward.apply(self, *args))
        checks.no_forward_mode("fusefeat", *args)
        return _tuple(self.backward(*args)) if torch.compiler.is_compiling() else _kernel(self.backward, args)

    def register(self) -> Operator:
        """Register derivatives and vmap rules with the operators themselves, for compile and direct calls."""

        def setup_forward(ctx: Any, inputs: Any, output: Any) -> None:
            self._save(ctx, inputs, output)

        def backward_of_forward(ctx: Any, *grads: Any) -> Any:
            return self._gradients(ctx, self.backward, grads, ctx.needs_input_grad)

        def setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
            self._save_backward(ctx, inputs)

        def backward_of_backward(ctx: Any, *grads: Any) -> Any:
            return self._second_gradients(ctx, _tuple(grads[0]) if isinstance(grads[0], (tuple, list)) else grads)

        def vmap_forward(info: Any, in_dims: Any, *args: Any) -> Any:
            outputs, dims = self._vmap(self.forward, info.batch_size, in_dims, args)
            return (outputs, dims) if len(outputs) > 1 else (outputs[0], dims[0])

        def vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
            return loop(self.backward, info.batch_size, in_dims, args)

        torch.library.register_autograd(self.forward, backward_of_forward, setup_context=setup_forward)
        torch.library.register_autograd(self.backward, backward_of_backward, setup_context=setup_backward)
        torch.library.register_vmap(self.forward, vmap_forward)
        torch.library.register_vmap(self.backward, vmap_backward)
        return self

    def _vmap(self, call: Callable[..., Any], size: int, dims: Sequence[Any], args: Sequence[Any]) -> Any:
        if self.vmap_rule is not None:
            return self.vmap_rule(call, size, dims, args)
        return loop(lambda *a: _tuple(call(*a)), size, dims, args)

    def _save(self, ctx: Any, args: Sequence[Any], output: Any) -> None:
        outputs = _tuple(output)
        absent = -1 if self.optional is None or args[self.optional[1]] else self.optional[0]
        ctx.mark_non_differentiable(*[o for i, o in enumerate(outputs) if i not in self.grads or i == absent])
        self._keep(ctx, args[: self.backward_args], [outputs[i] for i in self.saved])
        ctx.arg_count = len(args)

    def _keep(self, ctx: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        tensors = [arg if isinstance(arg, Tensor) else None for arg in args]
        ctx.others = [None if tensor is not None else arg for arg, tensor in zip(args, tensors, strict=True)]
        ctx.save_for_backward(*tensors, *outputs)
        ctx.set_materialize_grads(False)

    def _kept(self, ctx: Any) -> tuple[list[Any], tuple[Any, ...]]:
        tensors, others = ctx.saved_tensors, ctx.others
        args = [other if tensor is None else tensor for tensor, other in zip(tensors, others, strict=False)]
        return args, tensors[len(others) :]

    def _gradients(
        self, ctx: Any, backward: Callable[..., Any], grads: Sequence[Any], needs_input_grad: Sequence[bool]
    ) -> tuple[Any, ...]:
        """One gradient per argument of the forward."""
        result: list[Any] = [None] * ctx.arg_count
        needs = [needs_input_grad[i] for i in self.wrt]
        for position, first in zip(self.wrt, self._first_gradients(ctx, backward, grads, needs), strict=True):
            result[position] = first
        return tuple(result)

    def _first_gradients(
        self, ctx: Any, backward: Callable[..., Any], grads: Sequence[Any], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """One gradient per position in ``wrt``."""
        args, outputs = self._kept(ctx)
        picked = [grads[i] for i in self.grads]
        if all(grad is None for grad in picked):
            return [None] * len(needs)
        if self.first_grad_required and picked[0] is None:
            picked[0] = torch.zeros_like(outputs[0])
        firsts = _tuple(backward(*picked, *args, *outputs, *([needs] if self.needs_as_list else needs)))
        return [first if need else None for first, need in zip(firsts, needs, strict=True)]

    def _save_backward(self, ctx: Any, inputs: Sequence[Any]) -> None:
        self._keep(ctx, inputs[: len(self.grads) + self.backward_args], ())
        ctx.arg_count = len(inputs)

    def _second_gradients(self, ctx: Any, incoming: Sequence[Any]) -> tuple[Any, ...]:
        """Gradients of the backward operator for its incoming gradients and for the forward's arguments."""
        saved, _ = self._kept(ctx)
        grads, args = saved[: len(self.grads)], saved[len(self.grads) :]
        given = [i for i, grad in enumerate(grads) if grad is not None]
        variables = [i for i in self.wrt if args[i] is not None]

        def formula(*values: Tensor) -> tuple[Tensor, ...]:
            full = list(args)
            for position, value in zip(variables, values, strict=True):
                full[position] = value
            outputs = self.formula(*full)
            return tuple(outputs[self.grads[i]] for i in given)

        def first_gradients(*values: Tensor) -> tuple[Tensor, ...]:
            count = len(variables)
            pullback: Any = torch.func.vjp(formula, *values[:count])[1]
            return pullback(values[count:])

        result: list[Any] = [None] * ctx.arg_count
        primals = [args[i] for i in variables] + [grads[i] for i in given]
        with without_autocast(primals[0]):
            pair: Any = torch.func.vjp(first_gradients, *primals)
            firsts, pullback = pair
            by_position = dict(zip(self.wrt, incoming, strict=True))
            # A gradient that was not asked for came back empty, and nothing can flow through it.
            cotangents = tuple(
                torch.zeros_like(first)
                if by_position[i] is None or by_position[i].shape != first.shape
                else by_position[i].to(first.dtype)
                for i, first in zip(variables, firsts, strict=True)
            )
            seconds = pullback(cotangents)
        for position, second in zip(variables, seconds, strict=False):
            result[len(self.grads) + position] = second
        for position, second in zip(given, seconds[len(variables) :], strict=True):
            result[position] = second
        return tuple(result)


class _Eager(torch.autograd.Function):
    """Without ``setup_context``, which torch.func needs and whose arguments torch binds by their names, slowly. All
    arguments come as one, and those with gradients once more: each costs time of its own.
    """

    @staticmethod
    def forward(ctx: Any, op: Operator, args: tuple[Any, ...], *variables: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _tuple(op.forward(*args))
        ctx.op = op
        op._save(ctx, args, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        op, needs = ctx.op, list(ctx.needs_input_grad[2:])
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return None, None, *op._first_gradients(ctx, op.gradients, grads, needs)
        with torch._C._AutoDispatchBelowAutograd():
            return None, None, *op._first_gradients(ctx, op.backward, grads, needs)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(op: Operator, *args: Any) -> Any:
        return op.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op, *args = inputs
        ctx.op._save(ctx, args, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *ctx.op._gradients(ctx, ctx.op.gradients, grads, ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise checks.forward_mode_error("fusefeat")

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Operator, *args: Any) -> Any:
        return op._vmap(op, info.batch_size, in_dims[1:], args)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(op: Operator, *args: Any) -> Any:
        return op.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op, *args = inputs
        ctx.op._save_backward(ctx, args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *ctx.op._second_gradients(ctx, grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise checks.forward_mode_error("fusefeat")

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Operator, *args: Any) -> Any:
        return loop(op.gradients, info.batch_size, [None if isinstance(d, list) else d for d in in_dims[1:]], args)
