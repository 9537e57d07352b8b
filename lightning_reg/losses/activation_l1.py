"""Mean magnitude of activations (ProSparse, D2DMoE) as a loss. The quantity is `functional.activation_l1`."""

from torch import Tensor, nn

from lightning_reg.functional.activation_l1 import check_floor, l1_tap


class ActivationL1Loss(nn.Module):
    """Mean magnitude of activations, minimised.

    Args:
        relative: Divide by the root mean square of the activations, held fixed, so that making everything smaller does
            not help.
        floor: Measure how far the activations stand above this, instead of their magnitude.

    Example:
        >>> import torch
        >>> ActivationL1Loss()(torch.tensor([[0.0, 1.0]]))
        tensor(0.5000)
    """

    def __init__(self, *, relative: bool = False, floor: float | None = None) -> None:
        super().__init__()
        self.relative, self.floor = relative, check_floor(floor)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Penalty of activations ``x`` (..., width), mask True = valid of shape (...); a scalar >= 0."""
        return self.tap(x, mask)[1]

    def tap(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` unchanged, its penalty joined to the same autograd node, and the detached L1."""
        x, l1 = l1_tap(x, mask=mask, relative=self.relative, floor=self.floor)
        return x, l1, l1.detach()

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"relative={self.relative}, floor={self.floor}"
