r"""The least entropy an attention row can have, given the norm of its logits.

Formula
    With T visible keys and ``sigma = ||s - mean(s)||_2`` of the row's logits over them, ``beta = exp(-sigma
    sqrt(T / (T - 1)))``: ``H >= log(1 + (T - 1) beta) + sigma sqrt(T (T - 1)) beta / (1 + (T - 1) beta)``. Tight: it is
    the entropy of the row with one raised logit.
Source
    sigma-Reparam (Zhai et al. 2023, arXiv 2303.06296, Theorem 3.1), which bounds sigma for the whole layer by the
    spectral norms of its weights and inputs. The measured norm of each row is smaller, so the floor here is higher and
    holds all the same. The theorem has no ``1 / sqrt(d)``: the logits here are those that enter the softmax.
Input
    ``norm`` of the centred logits and ``keys`` visible, of any shape; or scores before softmax with the keys on
    ``dim``. A causal row counts the keys it sees.
Unit and range
    Nats, from 0 (sigma large: the row may collapse) to log(T) (sigma 0: it must be uniform). About
    ``T sigma exp(-sigma)`` for large sigma and T. 0 where fewer than two keys are visible.
Default and why
    The mean is taken out, because softmax does not see it; with it the norm would be larger and the floor lower.
Cost
    One pass over the scores, a few numbers for each row.
When it hurts
    It bounds what can happen, not what does: a low floor is no collapse, and one outlier among the logits lowers it.
    A high floor rules collapse out.
Not together with
    Nothing known; under QK-norm the floor is bounded by the gains.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.functional._tokens import upcast
from lightning_reg.functional.attention_entropy import MASKED_BIAS


def entropy_floor(norm: Tensor, keys: Tensor | int) -> Tensor:
    """Least entropy of rows of ``keys`` logits with this norm around their mean.

    Args:
        norm: l2 norm of each row's logits minus their mean over the visible keys, >= 0, any shape.
        keys: Number of visible keys, broadcastable to ``norm``.

    Returns:
        Nats in [0, log(keys)], float32 (float64 for float64 input).

    Raises:
        ValueError: If ``norm`` is not floating point.

    Example:
        >>> entropy_floor(torch.tensor([1.0, 5.0], dtype=torch.float64), torch.tensor([8, 64]))
        tensor([1.9797, 1.8026], dtype=torch.float64)
    """
    if not torch.is_floating_point(norm):
        raise ValueError(f"`norm` must be floating point, got {norm.dtype}; use `norm.float()`.")
    norm = upcast(norm)
    count = torch.as_tensor(keys, device=norm.device).to(norm.dtype)
    others = (count - 1).clamp_min(1.0)
    gap = norm * ((others + 1) / others).sqrt()  # of the one raised logit to the others
    low = others.log() - gap  # log odds of the others
    # an infinite gap leaves nothing, not inf * 0
    floor = F.softplus(low) + torch.where(gap.isinf(), 0.0, gap * low.sigmoid())
    return torch.where(count > 1, floor, 0.0)


def entropy_floor_from_scores(scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
    """Least entropy of rows whose logits lie as far from their mean as these.

    Args:
        scores: Attention scores before softmax, any shape; values at or below ``MASKED_BIAS`` count as masked.
        mask: Visible keys, True = visible, broadcastable to ``scores``.
        dim: Axis of the keys.

    Returns:
        Shape of ``scores`` without ``dim``, nats, never above the entropy of the row but for rounding.

    Raises:
        ValueError: If ``scores`` is not floating point or ``mask`` is not boolean.

    Example:
        >>> entropy_floor_from_scores(torch.tensor([[5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 0.0, 0.0]]))
        tensor([1.3863, 0.0037])
    """
    if not torch.is_floating_point(scores):
        raise ValueError(f"`scores` must be floating point, got {scores.dtype}; use `scores.float()`.")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be boolean (True = visible), got {mask.dtype}; use `mask.bool()`.")
    hidden = scores <= MASKED_BIAS
    hidden = hidden if mask is None else hidden | ~mask
    keys = scores.shape[dim] - hidden.sum(dim)
    shown = upcast(scores).masked_fill(hidden, 0.0)
    mean = shown.sum(dim, keepdim=True) / keys.clamp_min(1).unsqueeze(dim)
    return entropy_floor((shown - mean).masked_fill(hidden, 0.0).norm(dim=dim), keys)
