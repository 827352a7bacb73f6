"""Forwards that must not be taken for new ones: recomputations, and functions that have to be pure."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Forwards without a graph whose weights are kept: reentrant checkpointing recomputes such ones later, and nothing
# tells them from any other forward under no_grad.
KEPT_WITHOUT_GRAPH = 4


def in_backward() -> bool:
    """Whether this thread runs a backward: a forward is then a recomputation, as under checkpointing."""
    return torch._C._current_graph_task_id() != -1


def checkpointed_region() -> Any:
    """What the checkpointed function that runs now is known by, the same in its forward and in its recomputation; None
    outside of one, under reentrant checkpointing, and where torch keeps it in another place."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack = None if hooks is None else inspect.unwrap(hooks[0])
    names, cells = getattr(getattr(pack, "__code__", None), "co_freevars", ()), getattr(pack, "__closure__", None) or ()
    for name, cell in zip(names, cells, strict=False):
        if name in ("frame", "target_frame_ref"):
            return cell.cell_contents if name == "frame" else cell.cell_contents()
    return None


def must_be_pure() -> bool:
    """Whether a torch.func transform is running: what it transforms must be free of side effects."""
    return torch._C._are_functorch_transforms_active()


def inference() -> bool:
    """Whether inference mode is on, whose tensors no later graph can use; compiled code cannot tell."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


@torch.library.custom_op("fusefeat::copy_before_step", mutates_args=(), schema="(Tensor parameter) -> Tensor")
def copy_before_step(parameter: Tensor) -> Tensor:
    """A copy, made by compiled code, which cannot ask at run time what it is part of, except here."""
    if in_backward():
        raise RuntimeError(
            "AutoLearningLayer: a compiled layer cannot be recomputed in the backward; leave a checkpointed layer out "
            "of compilation with torch.compiler.disable(layer)"
        )
    return parameter.clone()


@copy_before_step.register_fake
def _(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter)


copy_before_step.register_autograd(lambda ctx, grad: grad)


class Kept:
    """The parameters one forward used, and the first output it gave per row, by which it is told from others."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.mark = torch.empty(0)
        self.region = checkpointed_region()
        self.recomputed_in = -1  # the backward (graph task) that recomputed it last


class StandIn(torch.autograd.Function):
    """An earlier value of a parameter; its gradient goes to the parameter. The node keeps ``kept`` alive."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor, kept: Kept) -> Tensor:
        ctx.kept = kept
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


class Record:
    """The forwards that may yet be recomputed. Those with a graph are kept as long as it lives, the others up to
    ``KEPT_WITHOUT_GRAPH`` of them. A copy of a record, pickled or deep, is an empty one."""

    def __init__(self) -> None:
        self._with_graph: list[weakref.ref[Kept]] = []
        self._without: list[Kept] = []

    def __reduce__(self) -> Any:
        return Record, ()

    def add(self, kept: Kept, has_graph: bool) -> None:
        self._with_graph = [ref for ref in self._with_graph if ref() is not None]
        self._without = [other for other in self._without if other.recomputed_in == -1]
        if has_graph:
            self._with_graph.append(weakref.ref(kept))
        else:
            self._without = [*self._without[1 - KEPT_WITHOUT_GRAPH :], kept]

    def find(self, shape: torch.Size, outputs_of: Callable[[Kept], Tensor]) -> Kept | None:
        """The forward that is being recomputed: ``outputs_of`` gives the mark it should have, of this shape.

        A checkpointed region gives its own, in the order in which it ran. Otherwise the mark decides; a backward
        recomputes the latest forwards first, hence the order where several fit equally well.
        """
        task = torch._C._current_graph_task_id()
        alive = [kept for ref in self._with_graph if (kept := ref()) is not None]
        fitting = [
            kept
            for kept in [*alive[::-1], *self._without[::-1]]
            if kept.mark.shape == shape and kept.recomputed_in != task
        ]
        if not fitting:
            return None
        chosen = fitting[0]
        region = checkpointed_region()
        of_region = [kept for kept in fitting if region is not None and kept.region is region]
        if of_region:
            chosen = of_region[-1]
        elif len(fitting) > 1 and shape.numel():
            chosen = min(fitting, key=lambda kept: _distance(kept.mark, outputs_of(kept)))
        chosen.recomputed_in = task
        return chosen


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.nan_to_num() - other.nan_to_num()).abs().max())
