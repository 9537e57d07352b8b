r"""QK-clip: factors that bring the attention logits of a head down to a threshold.

Formula
    With ``S_h`` the largest ``|logit|`` of head h in a step and threshold tau: ``eta = min(1, tau / S)``, then
    ``W_q *= eta^alpha`` and ``W_k *= eta^(1 - alpha)``, biases too, so that every logit of the head is multiplied by
    eta. Query heads that share a key head have one eta, that of the largest ``S`` among them.
Source
    Kimi K2 (arXiv 2507.20534, MuonClip): tau = 100, after the optimizer step. The maximum over a group is what public
    training code for grouped queries does.
Input
    ``max_logits`` (..., heads), >= 0: the largest ``|logit|`` of each query head over the whole batch.
Unit and range
    Factors are dimensionless, in (0, 1]: 1 at or below the threshold, exactly, and tau / S over it, shared between
    query and key.
Where it acts
    On the weights, after the optimizer step; there is no gradient. A head at or below the threshold keeps its bits.
Default and why
    100: Kimi K2's, with which 12.7 % of its heads were clipped in the first 70k steps and none later. Healthy heads
    rarely need more. alpha 0.5 shrinks both sides alike.
Cost
    On a GPU the kernel that computes the attention gives its maximum too, at no pass of its own; elsewhere, and beside
    dropout, the maximum needs the logits once, a matrix product in blocks. The factors are one product over the
    weights. One reduction over processes for all heads together.
When it hurts
    A low threshold flattens heads that must point. Heads that share keys are clipped with their worst neighbour. The
    bound holds for the batch that was measured, before the step of the same gradient. A maximum that is not finite
    clips nothing: the head is lost already. In a collapse made on purpose (``experiments/results/collapse.md``) it
    prevented and rescued, and gave back the most accuracy of all remedies.
Not together with
    QK-norm, sigma-Reparam and weight norm: what is normalised afterwards does not notice the scale. Soft-capping, which
    bounds the logits itself. Latent attention (MLA), whose keys are shared before their projection.
"""

import math

import torch
from torch import Tensor


def qk_clip_factors(
    max_logits: Tensor, threshold: float = 100.0, alpha: float = 0.5, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Factors for the query and key weights of each head.

    Args:
        max_logits: Largest ``|logit|`` of each query head, (..., heads), >= 0.
        threshold: What it may be, > 0; infinite clips nothing.
        alpha: Share of the queries in [0, 1]: 1 leaves the keys alone.
        groups: Query heads that share each key head, neighbours.

    Returns:
        ``(query_factors, key_factors)``, (..., heads) and (..., heads / groups), in (0, 1]; float32, or float64.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> qk_clip_factors(torch.tensor([50.0, 400.0]))
        (tensor([1.0000, 0.5000]), tensor([1.0000, 0.5000]))
    """
    check_threshold(threshold)
    check_alpha(alpha)
    if not max_logits.is_floating_point() or not max_logits.dim():
        raise ValueError(
            f"`max_logits` must be floating point of shape (..., heads), got {tuple(max_logits.shape)} of "
            f"{max_logits.dtype}."
        )
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or max_logits.shape[-1] % groups:
        raise ValueError(
            f"`groups` must be a divisor of the {max_logits.shape[-1]} heads, got {groups!r}: query heads by key head."
        )
    exact = max_logits if max_logits.dtype == torch.float64 else max_logits.float()
    shared = exact.unflatten(-1, (-1, groups)).amax(-1)
    clippable = shared.isfinite() & (shared > threshold)
    eta = torch.where(clippable, threshold / shared, 1.0)
    return eta.pow(alpha).repeat_interleave(groups, dim=-1), eta.pow(1 - alpha)


def check_threshold(threshold: float) -> float:
    """The threshold, checked."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        raise ValueError(f"`threshold` must be a number > 0, got {threshold!r}; `math.inf` clips nothing.")
    return float(threshold)


def check_alpha(alpha: float) -> float:
    """The share of the queries, checked."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1 or math.isnan(alpha):
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha!r}: the share of the factor that the queries take.")
    return float(alpha)
