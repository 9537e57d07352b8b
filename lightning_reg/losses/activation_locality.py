"""Activation locality (BlockFFN) as a loss. The quantity is `functional.activation_locality`."""

from torch import Tensor, nn

from lightning_reg.functional.activation_locality import check_alpha, locality_tap


class ActivationLocalityLoss(nn.Module):
    """How far neighbouring tokens differ in which neurons they switch on, minimised.

    Args:
        alpha: Steepness of the sigmoid, > 0.

    Example:
        >>> import torch
        >>> ActivationLocalityLoss()(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        tensor(50.)
    """

    def __init__(self, alpha: float = 100.0) -> None:
        super().__init__()
        self.alpha = check_alpha(alpha)

    def forward(self, x: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """Penalty of activations ``x`` (..., tokens, width), ``documents`` of shape (..., tokens); a scalar >= 0."""
        return self.tap(x, documents)[1]

    def tap(self, x: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` unchanged, its penalty joined to the same autograd node, and the detached locality."""
        x, locality = locality_tap(x, documents=documents, alpha=self.alpha)
        return x, locality, locality.detach()

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"alpha={self.alpha}"
