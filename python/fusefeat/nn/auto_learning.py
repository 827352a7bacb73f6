"""The published auto-learning layer: it takes steps of its own while the network around it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks, functional
from ..functional._penalty import all_reduce
from ..functional._shared import autocast_enabled
from ._recomputation import Kept, Record, StandIn, copy_before_step, in_backward, inference, must_be_pure
from ._shared import check_rows, deepcopy_sharing_group, positive_number

LocalLoss = Callable[[Tensor, Tensor], Tensor]


class AutoLearningLayer(nn.Module):
    r"""y = relu(scale · net(x)), with a local loss whose gradient steps are taken by the layer itself.

    Published: forward ``relu(hidden_size * net(x))`` and a layer that evaluates a loss L(W, a) of its own parameters
    and activations and adjusts itself by it; ``net`` is undefined, ``torch.max(0, …)`` and ``add_module(layer)`` are no
    valid calls, and no loss is given. Here ``net`` is a ``Linear``, and in training mode each forward

    1. computes y with the weights as they are, and keeps them for the backward of y;
    2. evaluates the local loss on the same weights and the detached input, with a gradient to the layer's own
       parameters only;
    3. takes the SGD step ``parameter -= learning_rate * gradient``, in place.

    The surrounding network sees none of this: y has the gradients it would have without the step, for x and for the
    parameters, which an optimiser may own as well. Two forwards before one backward are fine.

    The local loss is ``loss(weight, activation)``: ``net``'s weight [hidden_size,input_size] and y
    [...,hidden_size], computed from the detached input. The default is the shared objective of the layer's own input
    and activations: penalty + regulariser of :func:`fusefeat.shared_objective` with the layer's inputs as rows X
    [N,input_size] (leading dimensions flattened), no context, ``net``'s weight as the shared features W and its bias,
    at margin 1. Its logits are thus net(x): each input is to have few hidden units of its own, all units are to be
    used alike, and activations beyond scale · 1 are held back.

    The layer takes no step in eval mode, at learning rate 0, in inference mode, below a ``torch.func`` transform, and
    in a forward that runs inside a backward, which is a recomputation (checkpointing, either kind): that one uses the
    weights of the forward it repeats (without a graph, as reentrant checkpointing runs it, the last four
    are known, and of two with the same input the later one is taken first).
    Parameters with ``requires_grad=False``, and computed (parametrised) ones, are not stepped. A step that is not
    finite in every entry is not taken, so a NaN batch shows in y but does not destroy the weights.

    ``torch.compile(fullgraph=True)`` works, but compiled code cannot tell inference mode from ``no_grad`` (use eval
    mode there), and a compiled layer cannot be recomputed: it raises a RuntimeError. In a checkpointed part of a
    compiled model, leave the layer out of compilation: ``torch.compiler.disable(layer)``.

    Args:
        input_size: channels of x.
        hidden_size: channels of y.
        learning_rate: of the local steps, a finite number, not negative; an attribute that may be changed.
        loss: any callable (weight, activation) -> scalar tensor; None: the default above.
        scale: a finite number above 0; ``hidden_size`` when None, as published.
        process_group: ``torch.distributed`` group over which the local gradients are averaged, so that replicas stay
            equal (without it they drift apart under DDP); every rank must call. Copies made by ``copy.deepcopy``
            share it; a module that has one cannot be pickled.
        backend: of the default loss, as in :func:`fusefeat.shared_objective`.
        device, dtype: of the parameters.

    Attributes:
        net: ``Linear(input_size, hidden_size)``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        learning_rate: float,
        *,
        loss: LocalLoss | None = None,
        scale: float | None = None,
        process_group: Any = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("AutoLearningLayer", "input_size", input_size)
        checks.positive_int("AutoLearningLayer", "hidden_size", hidden_size)
        if checks.finite_number("AutoLearningLayer", "learning_rate", learning_rate) < 0:
            raise ValueError(f"AutoLearningLayer: learning_rate must not be negative, got {learning_rate}")
        if loss is not None and not callable(loss):
            raise TypeError(f"AutoLearningLayer: loss must be callable or None, got {checks.describe(loss)}")
        if process_group is not None:
            checks.process_group("AutoLearningLayer", process_group)
        self.net = nn.Linear(input_size, hidden_size, device=device, dtype=dtype)
        self.learning_rate = learning_rate
        self.loss = loss
        self.scale = hidden_size if scale is None else positive_number("AutoLearningLayer", "scale", scale)
        self.process_group = process_group
        self.backend = backend
        self._record = Record()

    def forward(self, x: Tensor) -> Tensor:
        """The activations; in training mode the layer also takes a step.

        Args:
            x: [...,input_size] in the dtype of the parameters (any but float64 under autocast).

        Returns:
            [...,hidden_size], in the dtype ``torch.nn.Linear`` would give.

        Raises:
            TypeError: wrong types or dtypes, also of what ``loss`` returns. ValueError: wrong shapes or devices, or a
            loss that is not a scalar or does not depend on the parameters.
        """
        check_rows("AutoLearningLayer", "x", x, self.net.weight, "input_size", leading=True)
        current = {"weight": self.net.weight}
        if self.net.bias is not None:
            current["bias"] = self.net.bias
        steps = {name: p for name, p in current.items() if p.requires_grad and p.is_leaf}
        if not self.training or not self.learning_rate or not steps or must_be_pure() or inference():
            return self._activation(self._logits(x, current))
        if torch.compiler.is_compiling():
            y = self._activation(self._logits(x, current | {n: copy_before_step(p) for n, p in steps.items()}))
            gradients = self._gradients_by_transform(x.detach(), current, steps)
        elif in_backward():
            found = self._record.find(x.shape[:-1], lambda kept: self._marks(x, current | kept.tensors))
            if found is not None:
                current |= {n: StandIn.apply(current[n], value, found) for n, value in found.tensors.items()}
            return self._activation(self._logits(x, current))
        else:
            kept = Kept({name: p.detach().clone() for name, p in steps.items()})
            stand_ins = {n: StandIn.apply(p, kept.tensors[n], kept) for n, p in steps.items()}
            z = self._logits(x, current | stand_ins)
            y = self._activation(z)
            gradients = self._gradients(x.detach(), current, steps)
            kept.mark = z.detach()[..., 0].clone()
            self._record.add(kept, has_graph=z.requires_grad)
        self._step(steps, gradients)
        return y

    def _logits(self, x: Tensor, parameters: dict[str, Any]) -> Tensor:
        return F.linear(x, parameters["weight"], parameters.get("bias"))

    def _activation(self, z: Tensor) -> Tensor:
        return torch.relu(self.scale * z)

    def _marks(self, x: Tensor, parameters: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return self._logits(x, parameters)[..., 0]

    def _local_loss(self, x: Tensor, parameters: dict[str, Any]) -> Tensor:
        if self.loss is None:
            penalty, reg = functional.shared_objective(
                x.reshape(-1, x.shape[-1]), None, parameters["weight"], parameters.get("bias"), backend=self.backend
            )
            return penalty + reg
        loss = self.loss(parameters["weight"], self._activation(self._logits(x, parameters)))
        checks.tensor("AutoLearningLayer", "the result of loss", loss)
        if not loss.dtype.is_floating_point:
            raise TypeError(
                f"AutoLearningLayer: the result of loss must be floating-point, got {checks.describe(loss)}"
            )
        if loss.dim() != 0:
            raise ValueError(f"AutoLearningLayer: the result of loss must be a scalar, got {checks.describe(loss)}")
        return loss

    def _gradients(self, x: Tensor, current: dict[str, Any], steps: dict[str, Any]) -> list[Tensor]:
        leaves = {name: p.detach().requires_grad_() for name, p in steps.items()}
        others = {name: p.detach() for name, p in current.items()}
        # Hooks on saved tensors, checkpointing's among them, are meant for the surrounding graph.
        own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), own_hooks:
            loss = self._local_loss(x, others | leaves)
            if not loss.requires_grad:
                raise ValueError("AutoLearningLayer: loss must depend on the weight or the activation it is given")
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, steps.values(), strict=True)]

    def _gradients_by_transform(self, x: Tensor, current: dict[str, Any], steps: dict[str, Any]) -> list[Tensor]:
        # The compiler follows torch.func.grad, which torch.autograd.grad it does not.
        others = {name: p.detach() for name, p in current.items()}
        leaves = {name: others[name] for name in steps}
        found = torch.func.grad(lambda values: self._local_loss(x, others | values))(leaves)
        return [found[name].detach() for name in steps]

    def _step(self, steps: dict[str, Any], gradients: list[Tensor]) -> None:
        with torch.no_grad():
            if self.process_group is not None:
                gradients = self._averaged(gradients)
            finite = torch.stack([g.isfinite().all() for g in gradients]).all()
            for parameter, gradient in zip(steps.values(), gradients, strict=True):
                parameter.sub_(torch.where(finite, gradient, 0.0), alpha=self.learning_rate)
        # Casts of the parameters that autocast may hold are those before the step.
        if not torch.compiler.is_compiling() and autocast_enabled(gradients[0].device.type):
            torch.clear_autocast_cache()

    def _averaged(self, gradients: list[Tensor]) -> list[Tensor]:
        # One vector, hence one collective.
        packed = torch.cat([g.reshape(-1) for g in gradients])
        packed = all_reduce(packed, self.process_group) / torch.distributed.get_world_size(self.process_group)
        parts = packed.split([g.numel() for g in gradients])
        return [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy_sharing_group(self, memo)

    def extra_repr(self) -> str:
        return f"learning_rate={self.learning_rate}, scale={self.scale}"
