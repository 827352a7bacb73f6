"""The published regulariser on the logits of shared features."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._shared import SharedFeatures


class ShareableReg(SharedFeatures):
    r"""One-sided hinge on the logits of shared features: what exceeds the margin is penalised.

    Published: ``clamp(relu(cat(context, input) @ (num_features * margin)), min=margin)``, a matrix. An int is no
    matrix and a matrix no regulariser. Here the logits are z = margin (X Wᵀ + b) with a learned weight and rows X =
    cat(context, input), and R = clamp(relu(z), min=margin) is reduced without being stored, see
    :func:`fusefeat.clamped_reg`. The gradient passes where z > margin, strictly.

    Args:
        num_features: how many features F are shared.
        margin: scale of the logits and floor of R, a finite number above 0.
        in_features: columns D of the rows. None: taken from the first input; the parameters are uninitialised until
            then and follow the rules of torch's lazy modules (make a dry run before handing them to an optimiser).
        bias: add a learned bias [F] to the logits before they are scaled.
        reduction: "mean" over rows and features, "sum" over both, "none" the published matrix R.
        backend: as in :func:`fusefeat.clamped_reg`.
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
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, margin, in_features, bias, reduction, backend, device, dtype)

    def forward(self, input: Tensor, context: Tensor | None = None) -> Tensor:
        """The regulariser of context and input rows.

        Args:
            input: [Ni,D] in the dtype of the parameters (any but float64 under autocast).
            context: [Nc,D] rows that come first, likewise, or None.

        Returns:
            A scalar, float64 for float64 inputs and float32 for all others; with reduction "none" R, [Nc+Ni,F], in
            the dtype of ``input``. No rows: 0.

        Raises:
            TypeError: wrong types or dtypes. ValueError: wrong shapes or devices.
        """
        self._check(input, context)
        rows = (input, context, self.weight, self.bias)
        if self.reduction == "none":
            return functional.clamped_activation(*rows, margin=self.margin, backend=self.backend)
        reg = functional.clamped_reg(*rows, margin=self.margin, reduction=self.reduction, backend=self.backend)
        assert isinstance(reg, Tensor)
        return reg
