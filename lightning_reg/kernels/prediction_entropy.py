"""Entropy of the prediction of each row of logits, and its gradient joined to the loss's."""

from torch import Tensor

from lightning_reg.kernels.vocabulary import SIGMOIDS, SOFTMAX, gradient, row_values


def forward(x: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Entropies (positions,), in float32, of logits (positions, classes), and what normalizes their softmax."""
    return row_values(x, SIGMOIDS if multi_label else SOFTMAX)


def backward(
    x: Tensor, entropy: Tensor, normalizer: Tensor, grad_entropy: Tensor, grad: Tensor | None, multi_label: bool
) -> Tensor:
    """``grad`` and the gradient of the entropies, (positions, classes) in the dtype of ``x``."""
    if not multi_label and not len(normalizer):  # the forward ran in torch
        normalizer = row_values(x, SOFTMAX)[1]
    return gradient(x, entropy, normalizer, grad_entropy, grad, SIGMOIDS if multi_label else SOFTMAX)
