r"""How many keys an attention row really uses: its support, its effective count, its largest weight.

Formula
    ``k90 = min {k : the k largest of p sum to >= 0.9 sum(p)}``; ``effective = exp(H)`` with the entropy H in nats;
    ``largest = max_j p_j``.
Source
    Ramsauer et al. 2021 (Hopfield networks is all you need, arXiv 2008.02217), who sort heads by the smallest k whose
    softmax values sum to 0.90: small k is one stored pattern, large k an average over all. exp(H) is the Hill number
    of order 1 (Hill 1973), which language models know as perplexity.
Input
    Probabilities with the keys on ``dim``, before dropout; for ``effective_keys`` an entropy in nats.
Unit and range
    Keys. The support of a row is 1 when one key holds 90 % and ``ceil(0.9 n)`` when n keys are equal; the effective
    count goes from 1 to n. The largest weight goes from 1 / n to 1. A row without weight has support 0.
Default and why
    ``mass=0.9``: at 0.5 a long tail does not count, at 0.99 little else does. It is reached within 1e-6 of the row's
    sum, so that ten equal keys have support 9 in every precision.
Cost
    One sort of the row; as many numbers as there are probabilities. Meant for sampled rows.
When it hurts
    The support is a count: it has no gradient. A row of few visible keys has a small support whatever it does: read it
    beside the number of visible keys.
Not together with
    Products that are not distributions, such as Nystrom attention: what they sum to means nothing.
"""

import torch
from torch import Tensor

from lightning_reg.functional._tokens import upcast

SLACK = 1e-6  # of the row's sum: rounding of float32 probabilities


def attention_support(probs: Tensor, *, mass: float = 0.9, dim: int = -1) -> Tensor:
    """Smallest number of keys whose weights sum to at least ``mass`` of the row's.

    Args:
        probs: Probabilities, or any weights >= 0, any shape.
        mass: Share of the weight, in (0, 1].
        dim: Axis of the keys.

    Returns:
        Shape of ``probs`` without ``dim``, float32 (float64 for float64 input), no gradient; 0 for a row without
        weight, NaN for one that holds a NaN.

    Raises:
        ValueError: If ``mass`` is outside (0, 1] or ``probs`` has no axis or is not floating point.

    Example:
        >>> attention_support(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.95, 0.05, 0.0, 0.0]]))
        tensor([3., 1.])
    """
    weights = upcast(_check_probs(probs).detach())
    reached = weights.sort(dim, descending=True).values.cumsum(dim)
    total = reached.narrow(dim, -1, 1) if reached.shape[dim] else reached.sum(dim, keepdim=True)
    keys = (reached < total * (check_mass(mass) * (1 - SLACK))).sum(dim) + (total.squeeze(dim) > 0)
    return torch.where(total.squeeze(dim).isnan(), torch.nan, keys.to(weights.dtype))


def effective_keys(entropy: Tensor) -> Tensor:
    """``exp(entropy)``: the number of equal keys that would have this entropy.

    Args:
        entropy: Entropy of rows in nats, any shape; see ``attention_entropy``.

    Returns:
        Like ``entropy``, >= 1.

    Example:
        >>> effective_keys(torch.tensor([0.0, 1.3863]))
        tensor([1.0000, 4.0000])
    """
    return entropy.exp()


def largest_weight(probs: Tensor, *, dim: int = -1) -> Tensor:
    """Largest probability of each row.

    Args:
        probs: Probabilities, any shape.
        dim: Axis of the keys, at least one of them.

    Returns:
        Shape of ``probs`` without ``dim``, float32 (float64 for float64 input), in [0, 1].

    Example:
        >>> largest_weight(torch.tensor([[0.5, 0.3, 0.2]]))
        tensor([0.5000])
    """
    return upcast(_check_probs(probs).amax(dim))


def check_mass(mass: float) -> float:
    """Return ``mass`` or raise a ValueError."""
    if not 0 < mass <= 1:
        raise ValueError(f"`mass` must be in (0, 1], got {mass}. 0.9 asks how many keys hold 90 % of the weight.")
    return mass


def _check_probs(probs: Tensor) -> Tensor:
    if not torch.is_floating_point(probs) or probs.dim() == 0:
        raise ValueError(
            f"`probs` must be floating point with at least one axis, got {tuple(probs.shape)} {probs.dtype}."
        )
    return probs
