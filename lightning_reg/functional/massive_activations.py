r"""Massive activations: how far the largest magnitude stands above the typical one.

Formula
    ``max |x| / median |x|`` over the valid elements; of an even number the lower of the two in the middle.
Source
    Sun et al. 2024 (Massive activations in large language models, arXiv 2402.17762), who call an activation massive
    when it is above 100 and about 1000 times the median of its layer.
Input
    Activations ``x`` of any shape (..., width), normally what a transformer block hands on.
Unit and range
    Dimensionless, >= 1: about 6 for a hundred thousand normal numbers, 1e3 to 1e5 in trained language models. 0 when
    all are zero or none is valid, inf when more than half are zero and one is not.
Default and why
    The median rather than the mean, which the few large ones would move.
Cost
    One pass for the largest and one selection; a copy of the magnitudes.
When it hurts
    Massive activations are part of how trained transformers work (attention sinks): they make trouble in low
    precision, and are no sign of divergence by themselves. Growth within some hundred steps is.
Not together with
    Activations with many exact zeros, such as behind a ReLU: their median is 0.
"""

import math

import torch
from torch import Tensor

from lightning_reg.functional._tokens import check_activations, check_token_mask, upcast


def massive_activations(x: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``max |x| / median |x|`` of the valid elements.

    Args:
        x: Activations (..., width).
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.

    Returns:
        Scalar >= 0, float32 (float64 for float64 input), no gradient; NaN when a valid element is.

    Raises:
        ValueError: If ``x`` or ``mask`` does not fit.

    Example:
        >>> massive_activations(torch.tensor([[1.0, -2.0, 3.0], [2.0, 100.0, 2.0]]))
        tensor(50.)
    """
    largest, median = magnitudes(x, mask=mask)
    return massive_ratio(largest, median)


def massive_ratio(largest: Tensor, median: Tensor) -> Tensor:
    """The quantity from its two parts: 0 where both are 0."""
    return torch.where(largest == 0, 0.0, largest / median)


@torch.no_grad()
def magnitudes(x: Tensor, *, mask: Tensor | None = None, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Largest and median magnitude of the valid elements, scalars; 0 and 0 when none is valid.

    Args:
        x: Activations (..., width).
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.
        most: Take the median of about so many elements, evenly spaced, where there are more.
    """
    valid = check_token_mask(mask, check_activations(x))
    size = x.abs()
    largest = (size if valid is None else size.masked_fill(~valid, 0.0)).amax() if size.numel() else size.sum()
    # NaN leaves an element out of the median: selecting the others would wait for the device
    flat = (size if valid is None else size.masked_fill(~valid, torch.nan)).reshape(-1)
    if most is not None and len(flat) > most:
        flat = flat[:: _coprime_stride(len(flat) // most, x.shape[-1])]
    median = flat.nanmedian().nan_to_num(0.0, posinf=torch.inf) if len(flat) else size.sum()
    return upcast(largest), upcast(median)


def _coprime_stride(stride: int, width: int) -> int:
    """At least ``stride``, and such that every neuron is met, not the same few of each token."""
    while math.gcd(stride, width) > 1:
        stride += 1
    return stride
