"""z-loss: the logarithm of the sum of exponentials of each row of logits, and its gradient joined to the loss's."""

from torch import Tensor

from lightning_reg.kernels.vocabulary import LOG_SUM, gradient, row_values


def forward(x: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials (positions,), in float32, of logits (positions, classes)."""
    return row_values(x, LOG_SUM)[0]


def backward(x: Tensor, z: Tensor, grad_z: Tensor, grad: Tensor | None) -> Tensor:
    """``grad + grad_z * softmax(x)``, (positions, classes) in the dtype of ``x``."""
    return gradient(x, z, z, grad_z, grad, LOG_SUM)
