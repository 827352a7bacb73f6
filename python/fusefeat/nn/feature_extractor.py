"""The published feature extractor, with its objective against a queue of earlier inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, functional
from ._recomputation import in_backward, inference, must_be_pure
from ._shared import check_rows, positive_number


class AutoFeatureExtractor(nn.Module):
    r"""Features shared among samples, learned without labels: P(x) = softmax(margin (W x + b)).

    Published: ``clamp(softmax(linear(x) + margin), margin)``, trained by a ``softmax_loss`` and a ``clamp_reg`` that
    are nowhere defined, with a float for the layer's size. Adding a constant cancels in a softmax, and clamping
    probabilities at the default margin of 1 makes the output constant. Here ``margin`` is the inverse temperature;
    the floor is an argument of its own (``floor=margin`` gives the published clamp); and :meth:`objective` is the
    shared penalty and the clamped regulariser on the same logits, see :func:`fusefeat.shared_objective`.

    The objective compares the batch with context rows: a first-in-first-out queue of the last ``context_size``
    inputs, as it stood before this batch joined it. A batch joins in training mode only; it is detached, cast to the
    parameters' dtype, and the buffer is replaced rather than written to, so that no graph sees it change. Slots never
    filled have weight 0. A batch that joined with NaN in it spoils the objective until it has left the queue. The
    module holds on to the batch, and to the graph that computed it, until the next forward.

    A recomputation in the backward (checkpointing), a ``torch.func`` transform and inference mode leave the queue as
    it is, the first two also the objective; compiled code can tell neither a recomputation nor inference mode.
    ``DistributedDataParallel`` gives all ranks the queue of rank 0, as it does with any buffer
    (``broadcast_buffers=False``: each its own); the objective is then ``ddp.module.objective()``.

    Args:
        input_dim: columns D of the inputs.
        num_features: how many features F are shared.
        margin: inverse temperature, a finite number above 0; also where the regulariser sets in.
        context_size: rows in the queue; 0: none.
        floor: the features are at least this, without a gradient where they would be less or equal. None: no floor.
        backend: as in :func:`fusefeat.shared_objective`.
        device, dtype: of the parameters and the queue.

    Attributes:
        linear: ``Linear(input_dim, num_features)``.
        queue: [context_size,D] buffer, latest last; None without a context, as is ``filled``.
        filled: [context_size] bool buffer, which slots of the queue hold an input.
    """

    queue: Tensor | None
    filled: Tensor | None

    def __init__(
        self,
        input_dim: int,
        num_features: int,
        margin: float = 1.0,
        *,
        context_size: int = 0,
        floor: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("AutoFeatureExtractor", "input_dim", input_dim)
        checks.positive_int("AutoFeatureExtractor", "num_features", num_features)
        positive_number("AutoFeatureExtractor", "margin", margin)
        if isinstance(context_size, bool) or not isinstance(context_size, int):
            raise TypeError(f"AutoFeatureExtractor: context_size must be an int, got {checks.describe(context_size)}")
        if context_size < 0:
            raise ValueError(f"AutoFeatureExtractor: context_size must not be negative, got {context_size}")
        if floor is not None and checks.finite_number("AutoFeatureExtractor", "floor", floor) < 0:
            raise ValueError(f"AutoFeatureExtractor: floor must not be negative, got {floor}")
        self.margin = margin
        self.context_size = context_size
        self.floor = floor
        self.backend = backend
        self.linear = nn.Linear(input_dim, num_features, device=device, dtype=dtype)
        queue = filled = None
        if context_size:
            queue = torch.zeros(context_size, input_dim, device=device, dtype=dtype)
            filled = torch.zeros(context_size, device=device, dtype=torch.bool)
        self.register_buffer("queue", queue)
        self.register_buffer("filled", filled)
        # Input, queue and filled of the last forward.
        self._last: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The shared features of a batch.

        Args:
            x: [B,D] in the dtype of the parameters (any but float64 under autocast).

        Returns:
            P(x), [B,F], in the dtype of ``x``; rows sum to 1 unless there is a floor.

        Raises:
            TypeError: wrong types or dtypes. ValueError: wrong shapes or devices.
        """
        check_rows("AutoFeatureExtractor", "x", x, self.linear.weight, "input_dim")
        linear = self.linear
        features = functional.shared_assignment(
            x, None, linear.weight, linear.bias, margin=self.margin, backend=self.backend
        )
        if self.floor is not None:
            features = torch.where(features <= self.floor, self.floor, features)  # a NaN stays
        if not must_be_pure() and (torch.compiler.is_compiling() or not in_backward()):
            self._last = (x, self.queue, self.filled)
            if self.training and not inference():
                self._join(x.detach())
        return features

    def _join(self, x: Tensor) -> None:
        if self.queue is None or self.filled is None:
            return
        joining = x.shape[0]
        if joining < self.context_size:
            filled = self.filled.new_ones(joining)
            self.queue = torch.cat([self.queue[joining:], x.to(self.queue.dtype)])
            self.filled = torch.cat([self.filled[joining:], filled])
        else:
            # A copy: what is in the queue must not change with x, nor keep more of it alive.
            self.queue = x[joining - self.context_size :].to(self.queue.dtype, copy=True)
            self.filled = torch.ones_like(self.filled)

    def objective(
        self,
        *,
        entropy_weight: float = 1.0,
        balance_weight: float = 1.0,
        reg_weight: float = 1.0,
        process_group: Any = None,
    ) -> Tensor:
        """Penalty + reg_weight · regulariser of the last forward's inputs against the queue as it stood then.

        It takes the parameters as they are now, and reaches what computed the inputs through their graph. It may be
        asked for more than once; copies of the module (deep or pickled) have none until their own first forward.

        Args:
            entropy_weight, balance_weight, process_group: as in :func:`fusefeat.shared_penalty`.
            reg_weight: factor of the regulariser.

        Returns:
            A scalar, float64 for float64 inputs and float32 for all others.

        Raises:
            RuntimeError: no forward yet.
        """
        if self._last is None:
            raise RuntimeError(
                "AutoFeatureExtractor: objective() is that of the last forward, and there was none since the module "
                "was made or copied"
            )
        checks.finite_number("AutoFeatureExtractor", "reg_weight", reg_weight)
        x, queue, filled = self._last
        row_weight = None
        if filled is not None:
            row_weight = torch.cat([filled, filled.new_ones(x.shape[0])]).to(torch.float32)
        penalty, reg = functional.shared_objective(
            x,
            queue,
            self.linear.weight,
            self.linear.bias,
            margin=self.margin,
            row_weight=row_weight,
            entropy_weight=entropy_weight,
            balance_weight=balance_weight,
            process_group=process_group,
            backend=self.backend,
        )
        return penalty + reg_weight * reg

    def __getstate__(self) -> dict[str, Any]:
        # Tensors inside a graph can be neither copied nor pickled.
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        return f"margin={self.margin}, context_size={self.context_size}, floor={self.floor}"
