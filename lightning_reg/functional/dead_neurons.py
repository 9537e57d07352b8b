r"""Share of neurons that are never active.

Formula
    ``dead = |{j : |x_tj| <= threshold for all valid tokens t}| / width``.
Source
    The dying ReLU; ReLU Strikes Back (Mirzadeh et al. 2023, arXiv 2310.04564) counts what stays inactive over a window
    of tokens as aggregated sparsity.
Input
    Activations ``x`` of any shape (..., width), normally the input of an MLP's down-projection.
Unit and range
    Share of neurons, in [0, 1]: 0 when each is active at some token, 1 when none ever is.
Default and why
    ``threshold=0``: a ReLU's gradient vanishes at exact zeros, so what never leaves them cannot learn.
Cost
    One comparison an element; keeps one count a neuron.
When it hurts
    Few tokens: a neuron that fires once in a thousand looks dead over a hundred. Gather it over an epoch.
Not together with
    GELU and SiLU at threshold 0, which hardly give exact zeros: nothing would ever look dead.
"""

import math

import torch
from torch import Tensor

from lightning_reg.functional._tokens import check_token_mask
from lightning_reg.functional.activation_density import is_active


def dead_neurons(x: Tensor, *, threshold: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Share of neurons with ``|x| <= threshold`` at every valid token.

    Args:
        x: Activations (..., width).
        threshold: Magnitude up to which an element counts as zero, >= 0.
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.

    Returns:
        Scalar in [0, 1], float32, no gradient; 0 when no position is valid. NaN counts as active.

    Raises:
        ValueError: If ``threshold`` is negative or ``mask`` does not fit.

    Example:
        >>> dead_neurons(torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, -3.0]]))
        tensor(0.5000)
    """
    firing, tokens = count_firing(x, threshold=threshold, mask=mask)
    dead = (firing == 0).logical_and_(tokens > 0).sum()
    return dead.float() / max(1, x.shape[-1])


def count_firing(x: Tensor, *, threshold: float = 0.0, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How often each neuron is active (width,), and the number of valid tokens, int64."""
    mask = check_token_mask(mask, x)
    active = is_active(x, threshold=threshold)
    tokens = torch.full((), math.prod(x.shape[:-1]), device=x.device)
    if mask is not None:
        active, tokens = active.logical_and_(mask), mask.sum()
    return active.reshape(math.prod(x.shape[:-1]), x.shape[-1]).sum(0), tokens
