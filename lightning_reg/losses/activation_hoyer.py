"""Hoyer-square of activations as a loss. The quantity is `functional.activation_hoyer`."""

from torch import Tensor, nn

from lightning_reg.functional.activation_hoyer import hoyer_tap
from lightning_reg.functional.activation_l1 import check_floor


class ActivationHoyerLoss(nn.Module):
    """Hoyer-square of each token, minimised.

    Args:
        floor: Measure how far the activations stand above this, instead of their magnitude.

    Example:
        >>> import torch
        >>> ActivationHoyerLoss()(torch.tensor([[0.0, 1.0]]))
        tensor(0.5000)
    """

    def __init__(self, *, floor: float | None = None) -> None:
        super().__init__()
        self.floor = check_floor(floor)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Penalty of activations ``x`` (..., width), mask True = valid of shape (...); a scalar in [0, 1]."""
        return self.tap(x, mask)[1]

    def tap(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` unchanged, its penalty joined to the same autograd node, and the detached Hoyer-square."""
        x, hoyer = hoyer_tap(x, mask=mask, floor=self.floor)
        return x, hoyer, hoyer.detach()

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"floor={self.floor}"
