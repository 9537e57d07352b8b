"""Activation density as a loss (DEFT). The quantity is `functional.activation_density`."""

from torch import Tensor, nn

from lightning_reg.functional.activation_density import check_epsilon, density_tap


class ActivationDensityLoss(nn.Module):
    """Soft count of non-zero activations, minimised.

    Args:
        epsilon: Softness of the count, > 0.
        relative: Scale ``epsilon`` by the mean square of the activations.

    Example:
        >>> import torch
        >>> ActivationDensityLoss()(torch.tensor([[0.0, 1.0]]))
        tensor(0.5000)
    """

    def __init__(self, epsilon: float = 1e-7, *, relative: bool = False) -> None:
        super().__init__()
        self.epsilon, self.relative = check_epsilon(epsilon), relative

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Penalty of activations ``x`` (..., width), mask True = valid of shape (...); a scalar in [0, 1]."""
        return self.tap(x, mask)[1]

    def tap(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` unchanged, its penalty joined to the same autograd node, and the detached density."""
        x, density = density_tap(x, epsilon=self.epsilon, mask=mask, relative=self.relative)
        return x, density, density.detach()

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"epsilon={self.epsilon}, relative={self.relative}"
