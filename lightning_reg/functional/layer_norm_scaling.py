r"""Output of a pre-norm layer's normalisation, divided by the square root of the layer's number.

Formula
    ``y = norm(x) / sqrt(l)`` in layer l, counted from 1. The gradient is divided by the same number.
Source
    LayerNorm Scaling (Sun et al. 2025, The Curse of Depth in Large Language Models, arXiv 2502.05795).
Input
    Output of every normalisation before a sub-layer of the block (attention and MLP alike), any shape; the final
    normalisation of the model is none of them.
Unit and range
    That of the input; the factor is 1 in the first layer and falls to 0.29 in the twelfth.
Default and why
    No parameter: the paper has none. The variance that a pre-norm stack gathers in its residual then grows much more
    slowly with depth, so that deep layers are not close to the identity.
Cost
    One multiplication for each normalisation; none after folding it into weight and bias.
When it hurts
    On a pretrained model: its function changes at once. It is for training from scratch.
Not together with
    Scaled initialisation of the residual projections (GPT-2's ``1/sqrt(2 layers)``): the authors find that it weakens
    the effect and advise against it. Post-norm blocks, where it would scale the residual itself.
"""

import math
from typing import Any

from torch import Tensor


def layer_norm_scaling(x: Tensor, layer: int) -> Tensor:
    """``x / sqrt(layer)``.

    Args:
        x: Output of a normalisation in the layer, any shape.
        layer: Number of the layer, counted from 1.

    Returns:
        Of the shape and dtype of ``x``.

    Raises:
        ValueError: If ``layer`` is no integer >= 1.

    Example:
        >>> import torch
        >>> layer_norm_scaling(torch.tensor([2.0, -2.0]), 4)
        tensor([ 1., -1.])
    """
    return x * layer_scale(layer)


def layer_scale(layer: Any) -> float:
    """``1 / sqrt(layer)``, or a ValueError."""
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
        raise ValueError(f"`layer` must be an integer >= 1, counted from 1, got {layer!r}.")
    return 1 / math.sqrt(layer)
