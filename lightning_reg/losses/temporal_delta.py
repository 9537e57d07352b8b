"""Change from token to token (Delta Activation Layer) as a loss. The quantity is `functional.temporal_delta`."""

from torch import Tensor, nn

from lightning_reg.functional.temporal_delta import check_theta, delta_tap


class TemporalDeltaLoss(nn.Module):
    """How much activations change from one token or frame to the next, minimised.

    Args:
        theta: Step to which activations are rounded, > 0; None does not round.
        relative: Divide the activations by their root mean square, held fixed, so that making everything smaller does
            not help.

    Example:
        >>> import torch
        >>> TemporalDeltaLoss(theta=1.0)(torch.tensor([[0.1, 3.0], [0.2, 1.0]]))
        tensor(1.)
    """

    def __init__(self, theta: float | None = None, *, relative: bool = False) -> None:
        super().__init__()
        self.theta, self.relative = check_theta(theta), relative

    def forward(self, x: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """Penalty of activations ``x`` (..., tokens, width), ``documents`` of shape (..., tokens); a scalar >= 0."""
        return self.tap(x, documents)[1]

    def tap(self, x: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` unchanged, its penalty joined to the same autograd node, and the detached change."""
        x, delta = delta_tap(x, documents=documents, theta=self.theta, relative=self.relative)
        return x, delta, delta.detach()

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"theta={self.theta}, relative={self.relative}"
