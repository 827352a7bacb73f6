"""The published shared loss, as a scalar that has something to teach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks, functional
from ..functional._penalty import all_reduce
from ._shared import SharedFeatures, deepcopy_sharing_group


class ShareableLoss(SharedFeatures):
    r"""Penalty on features shared among samples: no row ambiguous, no feature unused.

    Published: the softmax over features of ``cat(context, input) @ (num_features * margin)``, returned as the "loss".
    Two defects: an int is no matrix, and a softmax matrix is no loss; its mean is 1/num_features whatever the
    weights are, so nothing can be learned from it. Here the matrix is a learned weight and ``margin`` an inverse
    temperature that scales the logits,

    .. math:: P = \text{softmax}(\text{margin} \cdot (X W^\top + b)), \qquad
        \text{penalty} = \frac{1}{N} \sum_n H(P_n) + \mathrm{KL}(\bar p \,\|\, \text{uniform}), \qquad X = [C; I],

    in [0, log num_features]: the information-maximisation loss, see :func:`fusefeat.shared_penalty`. The logits are
    never stored.

    Args:
        num_features: how many features F are shared.
        margin: inverse temperature, a finite number above 0.
        in_features: columns D of the rows. None: taken from the first input; the parameters are uninitialised until
            then and follow the rules of torch's lazy modules (make a dry run before handing them to an optimiser).
        bias: add a learned bias [F] to the logits before they are scaled.
        reduction: "mean" the penalty, "sum" N times it, "none" the published matrix P.
        process_group: ``torch.distributed`` group over whose rows "mean" and "sum" are taken; every rank must call.
            Copies made by ``copy.deepcopy`` share it; a module that has one cannot be pickled.
        backend: as in :func:`fusefeat.shared_penalty`.
        device, dtype: of the parameters.

    Attributes:
        weight: [F,D], drawn from U(-1/sqrt(D), 1/sqrt(D)) as ``torch.nn.Linear`` does.
        bias: [F] or None, likewise.
    """

    def __init__(
        self,
        num_features: int,
        margin: float = 1.0,
        in_features: int | None = None,
        bias: bool = False,
        reduction: str = "mean",
        *,
        process_group: Any = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if process_group is not None:
            checks.process_group("ShareableLoss", process_group)
        super().__init__(num_features, margin, in_features, bias, reduction, backend, device, dtype)
        self.process_group = process_group

    def forward(self, input: Tensor, context: Tensor | None = None) -> Tensor:
        """The penalty of context and input rows.

        Args:
            input: [Ni,D] in the dtype of the parameters (any but float64 under autocast).
            context: [Nc,D] rows that come first, likewise, or None.

        Returns:
            A scalar, float64 for float64 inputs and float32 for all others; with reduction "none" P, [Nc+Ni,F], in
            the dtype of ``input``. No rows: 0.

        Raises:
            TypeError: wrong types or dtypes. ValueError: wrong shapes or devices.
        """
        self._check(input, context)
        rows = (input, context, self.weight, self.bias)
        if self.reduction == "none":
            return functional.shared_assignment(*rows, margin=self.margin, backend=self.backend)
        penalty = functional.shared_penalty(
            *rows, margin=self.margin, process_group=self.process_group, backend=self.backend
        )
        assert isinstance(penalty, Tensor)
        if self.reduction == "mean":
            return penalty
        count: Any = input.shape[0] + (0 if context is None else context.shape[0])
        if self.process_group is not None:
            local = torch.full((), count, dtype=penalty.dtype, device=penalty.device)
            count = all_reduce(local, self.process_group)
        return penalty * count

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy_sharing_group(self, memo)
