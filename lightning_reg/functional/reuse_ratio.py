r"""Share of a token's active neurons that the token before it had active too.

Formula
    ``reuse = sum_t |A_t and A_(t+1)| / sum_t |A_(t+1)|`` over neighbours t, t+1 of one document,
    ``A_t = {j : |x_tj| > threshold}``.
Source
    Activation locality, as in BlockFFN (Song et al. 2025, arXiv 2507.08771); neurons kept from token to token need not
    be loaded again.
Input
    Activations ``x`` of shape (..., tokens, width), tokens in order.
Unit and range
    Share of active neurons, in [0, 1]: 0 when neighbours share none, 1 when all of a token's are kept from the one
    before. Neurons that fire independently at rate r give r, so read it beside the density.
Default and why
    Sums over all pairs, then one quotient: a token with few active neurons weighs by them.
Cost
    Two comparisons an element; keeps two counts.
When it hurts
    Always-active neurons raise it without any locality; shuffled or packed sequences without ``documents`` lower it.
Not together with
    A threshold of 0 on GELU or SiLU: everything is active and the ratio is 1.
"""

import torch
from torch import Tensor

from lightning_reg.functional._tokens import check_documents, check_tokens, neighbours, split
from lightning_reg.functional.activation_density import is_active


def reuse_ratio(x: Tensor, *, threshold: float = 0.0, documents: Tensor | None = None) -> Tensor:
    """Share of active neurons that were active at the token before, over neighbours of one document.

    Args:
        x: Activations (..., tokens, width).
        threshold: Magnitude up to which an element counts as zero, >= 0.
        documents: Shape of ``x`` without its last axis. Boolean: True = valid, one document a row. Integers: 0 =
            padding, equal neighbours belong to the same document.

    Returns:
        Scalar in [0, 1], float32, no gradient; 0 when nothing has a token before it. NaN counts as active.

    Raises:
        ValueError: If ``threshold`` is negative or ``documents`` does not fit.

    Example:
        >>> reuse_ratio(torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 3.0, 0.0]]))
        tensor(0.6667)
    """
    kept, active = count_reuse(x, threshold=threshold, documents=documents)
    return kept.float() / active.clamp_min(1)


def count_reuse(x: Tensor, *, threshold: float = 0.0, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Numbers of active neurons that were active before, and of all with a token before, int64 scalars."""
    pairs = neighbours(check_documents(documents, check_tokens(x)))
    before, following = split(is_active(x, threshold=threshold))
    following = following if pairs is None else following & pairs
    return torch.logical_and(before, following).sum(), following.sum()
