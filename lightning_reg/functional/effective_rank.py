r"""Effective rank of a weight: how many directions it uses, weighted by their singular values.

Formula
    With the singular values s and ``p = s / sum(s)``: ``effective rank = exp(-sum_i p_i log p_i)``.
Source
    Roy and Vetterli 2007 (The effective rank, EUSIPCO): the singular values themselves, not their
    squares, which other work also calls effective rank and which is smaller.
Input
    A weight of two or more axes, those after the first flattened, or matrices (parts, rows, columns).
Unit and range
    Directions, from 1 (rank one) to min(rows, columns) (all singular values equal); 0 for a weight of zeros. The scale
    of the weight does not matter.
Default and why
    From the eigenvalues of the Gram matrix of the smaller side, in float64: singular values below 1e-8 of the largest
    are lost, which changes nothing, while in float32 their rounding would count as hundreds of directions.
Cost
    One product with its own transpose and one eigenvalue decomposition of the smaller side, cubic in it: some 50 ms
    for 768 on a CPU. A monitor takes weights in turn.
When it hurts
    A random matrix has about 0.8 of full rank, not all of it: compare with the start of the same training.
Not together with
    Nothing known; sigma-Reparam, QK-clip and weight decay scale a weight and leave it as it is.
"""

import torch
from torch import Tensor


def effective_rank(weight: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values.

    Args:
        weight: At least two axes; axes after the first are flattened.

    Returns:
        Scalar in [0, min(rows, columns)], float32 (float64 for float64 input), no gradient; NaN where ``weight`` is not
        finite.

    Raises:
        ValueError: If ``weight`` has fewer than two axes.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0])))
        tensor(2.)
    """
    if weight.dim() < 2:
        raise ValueError(f"`weight` must have at least two axes, got shape {tuple(weight.shape)}.")
    rank = rank_of(singular_values(weight.detach().flatten(1)))
    return rank if weight.dtype == torch.float64 else rank.float()


def rank_of(values: Tensor) -> Tensor:
    """Effective rank of singular values (..., directions), float64 as they are."""
    total = values.sum(-1, keepdim=True)
    share = values / torch.where(total == 0, 1.0, total)
    # p log p is 0 at p = 0; `entr` knows
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(total.squeeze(-1) == 0, 0.0, rank)


@torch.no_grad()
def singular_values(matrices: Tensor) -> Tensor:
    """Singular values of matrices (..., rows, columns) in ascending order, float64; NaN where one is not finite."""
    exact = matrices.double()
    finite = exact.isfinite().all(-1).all(-1)
    # LAPACK refuses NaN and inf, and asking whether there is one would wait for the device
    exact = torch.where(finite[..., None, None], exact, 0.0)
    gram = exact @ exact.mT if exact.shape[-2] <= exact.shape[-1] else exact.mT @ exact
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    return torch.where(finite[..., None], values, torch.nan)
