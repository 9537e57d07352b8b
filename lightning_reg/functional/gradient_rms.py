r"""Root mean square of a gradient, for all of a model or for each layer.

Formula
    ``sqrt(sum_i g_i^2 / n)`` over the n elements of a group's gradients.
Source
    Wortsman et al. 2024 (Small-scale proxies, arXiv 2309.14322): with size and learning rate it falls
    towards Adam's epsilon, 1e-8, where updates shrink and training stalls. Its rise over all layers precedes spikes.
Input
    Gradients of any shapes, after loss scaling is taken out and before clipping.
Unit and range
    Loss per unit of parameter, >= 0; 0 when there is no gradient. Unlike the norm it does not grow with the number of
    parameters, so layers can be compared.
Default and why
    Mean over elements, not over tensors: a bias of 64 numbers does not count as much as a matrix.
Cost
    One pass over the gradients, in one fused call where torch has one.
When it hurts
    A model whose loss is summed rather than averaged has gradients in units of its batch.
Not together with
    Nothing known; under gradient accumulation it is that of the accumulated gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gradient_rms(gradients: Sequence[Tensor], groups: Sequence[int] | None = None) -> Tensor:
    """Root mean square of gradients, over all of them or by group.

    Args:
        gradients: Gradients of any shapes on one device.
        groups: Number of the group, from 0, of each gradient; one group when left out.

    Returns:
        Scalar, or (groups,); float32 (float64 if one of the gradients is). Scalar 0 when there is no gradient.

    Raises:
        ValueError: If ``groups`` does not have an entry for each gradient.

    Example:
        >>> gradient_rms([torch.tensor([3.0, -3.0]), torch.tensor([[0.0], [0.0]])])
        tensor(2.1213)
        >>> gradient_rms([torch.tensor([3.0, -3.0]), torch.tensor([[0.0], [0.0]])], [0, 1])
        tensor([3.0000, 0.0000])
    """
    if groups is not None and len(groups) != len(gradients):
        raise ValueError(f"`groups` must have an entry for each of {len(gradients)} gradients, got {len(groups)}.")
    if not gradients:
        return torch.zeros(())
    if groups is None:
        return gradient_rms(gradients, [0] * len(gradients))[0]
    double = any(gradient.dtype == torch.float64 for gradient in gradients)
    # norms in half precision would overflow at 65504
    norms = torch._foreach_norm(list(gradients), 2, torch.float64 if double else torch.float32)
    squares, sizes = torch.stack(norms).square(), [0] * (max(groups) + 1)
    for group, gradient in zip(groups, gradients, strict=True):
        sizes[group] += gradient.numel()
    index = torch.tensor(groups, device=squares.device)
    sums = squares.new_zeros(len(sizes)).index_add_(0, index, squares)
    return (sums / torch.tensor(sizes, device=sums.device).clamp_min(1)).sqrt()
