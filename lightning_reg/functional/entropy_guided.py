r"""Distance of each head's attention entropy from a threshold of its own, where it exceeds a margin.

Formula
    ``E_h`` is the mean over batch and valid queries of the normalised entropy of head h, ``d_h = E_h - theta_h``, and
    the penalty is the mean over heads of ``d_h^2`` where ``|d_h| > margin`` (``band``), ``d_h < -margin`` (``floor``)
    or ``d_h > margin`` (``ceiling``), else 0. ``dP/dE_h = 2 d_h / heads`` outside the margin, ``dP/dtheta_h`` its
    negative.
Source
    Entropy-guided attention (Jha & Reagen 2025, arXiv 2501.03489). Its public code takes the square of every
    query's entropy and sums over batch and queries, gives all layers the thresholds of the first, compares early causal
    rows with the log of the whole length, and hides NaN; none of it is so here.
Input
    ``entropy`` (batch, heads, queries), each row divided by the log of the keys it sees, as
    ``attention_entropy(..., normalize=True)`` gives it; ``threshold`` (heads,) or a scalar, in the same unit.
Unit and range
    Dimensionless, in [0, 1]: 0 when every head is within its margin. It jumps from 0 to ``margin^2`` at the margin.
Default and why
    ``margin=0.2``, the best of the paper; thresholds start at 0.5, the upper end of the 0.2 to 0.5 that it learns. The
    paper's penalty is in nats, ``log(keys)^2`` times this one: its weight 1e-5 at 128 keys would be 2.4e-4 here.
Cost
    A mean over rows that an entropy penalty takes anyway.
When it hurts
    A learned threshold has no gradient but the penalty's, so it drifts to where its head already is, and the penalty
    ends: ``learnable=False`` of the callback holds it. The paper's gains are of small models without LayerNorm, whose
    entropy is too high; the gradient in the scores vanishes on a collapsed head, which this cannot revive:
    in a collapse made on purpose (``experiments/results/collapse.md``) it prevented and lifted the milder one in part,
    and left the harder one as it was.
Not together with
    Another bound on the same entropy, such as ``AttentionEntropyRegularizer``: the two pull at one number.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.functional._tokens import upcast

GuidedObjective = Literal["band", "floor", "ceiling"]
GUIDED_OBJECTIVES = ("band", "floor", "ceiling")


def entropy_guided(
    entropy: Tensor,
    threshold: Tensor | float,
    *,
    margin: float = 0.2,
    objective: GuidedObjective = "band",
    mask: Tensor | None = None,
) -> Tensor:
    """Mean over heads of the squared distance of their entropy from a threshold, where it exceeds a margin.

    Args:
        entropy: Normalised entropy of attention rows, (batch, heads, queries) or with more axes in front; with fewer
            than three axes it is that of one head.
        threshold: (heads,) or a scalar, in [0, 1].
        margin: Distance that costs nothing, in [0, 1].
        objective: Which side of the threshold counts: both (``band``), below (``floor``) or above (``ceiling``).
        mask: Rows to count, True = valid, broadcastable to ``entropy``; a head without any is left out of the mean.

    Returns:
        Scalar in [0, 1], float32 (float64 for float64 input); 0 when no row is valid.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.

    Example:
        >>> entropy_guided(torch.tensor([[[0.9, 0.7], [0.5, 0.5]]]), torch.tensor([0.5, 0.4]))  # (0.3^2 + 0) / 2
        tensor(0.0450)
    """
    check_margin(margin)
    check_guided_objective(objective)
    if not torch.is_floating_point(entropy) or entropy.dim() == 0:
        raise ValueError(
            "`entropy` must be floating point of shape (batch, heads, queries), "
            f"got {tuple(entropy.shape)} {entropy.dtype}."
        )
    heads = head_count(entropy)
    if isinstance(threshold, Tensor) and threshold.shape not in ((), (heads,)):
        raise ValueError(
            f"`threshold` must be a scalar or one number for each of the {heads} heads, got {tuple(threshold.shape)}."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be boolean (True = valid), got {mask.dtype}; use `mask.bool()`.")
    mean, count = _head_means(upcast(entropy), mask)
    distance = mean - threshold
    squares = torch.where(_within(distance, margin, objective), 0.0, distance.square())
    return torch.where(count > 0, squares, 0.0).sum() / (count > 0).sum().clamp_min(1)


def head_count(entropy: Tensor) -> int:
    """Heads of an entropy (batch, heads, queries); 1 where there is no axis for them."""
    return entropy.shape[-2] if entropy.dim() > 2 else 1


def check_margin(margin: Any) -> float:
    """Return ``margin`` or raise a ValueError."""
    return check_share_of_entropy("margin", margin)


def check_share_of_entropy(name: str, share: Any) -> float:
    """Return a number in [0, 1] or raise a ValueError."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], a share of log(visible keys), got {share!r}.")
    return float(share)


def check_guided_objective(objective: Any) -> GuidedObjective:
    """Return ``objective`` or raise a ValueError."""
    if objective not in GUIDED_OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(GUIDED_OBJECTIVES)}, got {objective!r}.")
    return objective


def _head_means(entropy: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean entropy of each head and the rows it is of, both (heads,)."""
    shown = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask.expand(entropy.shape)
    if entropy.dim() < 3:
        entropy, shown = entropy.reshape(1, 1, -1), shown.reshape(1, 1, -1)
    axes = tuple(axis for axis in range(entropy.dim()) if axis != entropy.dim() - 2)
    count = shown.sum(axes)
    return torch.where(shown, entropy, 0.0).sum(axes) / count.clamp_min(1), count


def _within(distance: Tensor, margin: float, objective: str) -> Tensor:
    """Whether a head costs nothing. NaN is never within, so that it stays visible."""
    if objective == "floor":
        return distance >= -margin
    return distance <= margin if objective == "ceiling" else distance.abs() <= margin
