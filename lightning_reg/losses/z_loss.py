"""z-loss as a loss. The quantity is `functional.z_loss`."""

from torch import Tensor, nn

from lightning_reg.functional.z_loss import labelled, z_loss_tap


class ZLoss(nn.Module):
    """Squared logarithm of the softmax's normaliser, minimised.

    Args:
        ignore_index: Label of the positions that do not count.
        shift: The labels given to ``forward`` are compared with the logits of the token before, as Hugging Face does.

    Example:
        >>> import torch
        >>> ZLoss()(torch.zeros(3, 4), labels=torch.tensor([0, -100, 2]))
        tensor(1.9218)
    """

    def __init__(self, *, ignore_index: int = -100, shift: bool = False) -> None:
        super().__init__()
        self.ignore_index, self.shift = ignore_index, shift

    def forward(self, logits: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Penalty of ``logits`` (..., classes), labels and mask (True = valid) of shape (...); a scalar >= 0."""
        if labels is not None:
            counted = labelled(labels, ignore_index=self.ignore_index, shift=self.shift)
            mask = counted if mask is None else counted & mask.bool()
        return self.tap(logits, mask)[1]

    def tap(self, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``logits`` unchanged, their penalty joined to the same autograd node, and the detached mean of z squared."""
        logits, penalty = z_loss_tap(logits, mask=mask)
        return logits, penalty, penalty.detach()

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"ignore_index={self.ignore_index}, shift={self.shift}"
