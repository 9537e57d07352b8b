r"""Cumulative error of tail truncation (CETT): what an MLP's output loses when its small contributions are left out.

Formula
    ``n_i = x_i W[:, i]``, ``D = {i : ||n_i|| < threshold}`` with ``||n_i|| = |x_i| ||W[:, i]||``;
    ``CETT = mean over tokens of ||sum over D of n_i|| / ||W x||``.
Source
    Sparsing Law (Luo et al. 2024, arXiv 2411.02335), section 3. Its public search takes ``thresholds[left - 1]`` with
    ``left = 0``, the largest threshold exactly where the target is tightest; here that is 0.
Input
    Input ``x`` (..., width) of a down-projection and its weight (out, width), without the bias. GPT-2's ``Conv1D``
    keeps the transpose.
Unit and range
    Relative error, >= 0: 0 when only zeros are dropped, 1 when everything is. Between them contributions may cancel, so
    it need not rise with the threshold and can exceed 1.
Where it acts
    A threshold on ``||n_i||`` is one of ``threshold / ||W[:, i]||`` on ``|x_i|``, so it respects what a neuron does.
Default and why
    A token whose output is 0 has no relative error and is left out: as an error of 0 it would loosen the others.
Cost
    One product with the weight for each threshold, in float32; keeps nothing.
When it hurts
    Layers compensate or amplify each other's errors: equal CETT is no equal harm. See ``calibration`` for perplexity.
Not together with
    A mask that keeps padding: tokens of one kind weigh like all others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_reg.functional._tokens import check_activations, check_token_mask


class Tail(NamedTuple):
    """Sums over valid tokens: relative errors (float64) and elements kept (int64) by threshold; tokens, elements."""

    error: Tensor
    kept: Tensor
    tokens: Tensor
    elements: Tensor


def cett(x: Tensor, weight: Tensor, threshold: float | Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean relative error of the output without the contributions below ``threshold``.

    Args:
        x: Input of the down-projection (..., width).
        weight: Its weight (out, width).
        threshold: Norm below which a contribution is dropped, >= 0; a number, or a tensor of them.
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.

    Returns:
        Scalar, or the shape of ``threshold``, >= 0, float32 (float64 for float64 input), no gradient; 0 when no valid
        token has an output. A NaN in a valid token stays visible.

    Raises:
        ValueError: If a threshold is negative or ``x``, ``weight`` or ``mask`` does not fit.

    Example:
        >>> x, weight = torch.tensor([[3.0, 4.0, 0.0]]), torch.eye(3)
        >>> cett(x, weight, torch.tensor([1.0, 3.5, 9.0]))
        tensor([0.0000, 0.6000, 1.0000])
    """
    threshold = check_tail_thresholds(threshold)
    tail = count_tail(x, weight, threshold.flatten(), mask=mask)
    error = (tail.error / tail.tokens.clamp_min(1)).reshape(threshold.shape)
    return error.to(_exact_dtype(x, weight))


def cett_threshold(
    x: Tensor,
    weight: Tensor,
    target: float,
    *,
    mask: Tensor | None = None,
    candidates: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Largest threshold whose CETT is at most ``target``, by bisection; 0 when no candidate's is.

    Where CETT does not rise with the threshold, the result still meets the target and the next candidate does not; a
    larger one may exist.

    Args:
        x: Input of the down-projection (..., width).
        weight: Its weight (out, width).
        target: CETT to stay within, in [0, 1). The Sparsing Law uses 0.2 for models with ReLU.
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.
        candidates: Thresholds to choose from, >= 0; all norms that occur when left out, which is exact.

    Returns:
        Scalar threshold, float32 (float64 for float64 input).

    Raises:
        ValueError: If ``target`` is not in (0, 1), a candidate is negative, or an input does not fit.

    Example:
        >>> cett_threshold(torch.tensor([[3.0, 4.0, 0.0]]), torch.eye(3), 0.7)
        tensor(4.)
    """
    check_cett_target(target)
    if candidates is None:
        norms = contributions(x, weight)
        valid = check_token_mask(mask, x)
        norms = (norms if valid is None else norms.masked_fill(~valid, 0.0)).unique()
        norms = norms[norms > 0]
    else:
        norms = check_tail_thresholds(candidates).flatten().unique().to(contributions(x, weight))
    # the invariant: norms[low] meets the target, norms[high] does not; -1 stands for 0, which drops nothing
    low, high = -1, len(norms)
    while high - low > 1:
        middle = (low + high) // 2
        meets = bool(cett(x, weight, norms[middle], mask=mask) <= target)
        low, high = (middle, high) if meets else (low, middle)
    return norms[low] if low >= 0 else norms.new_zeros(())


@torch.no_grad()
def count_tail(x: Tensor, weight: Tensor, thresholds: Tensor, *, mask: Tensor | None = None) -> Tail:
    """Sums that make CETT and density at each of ``thresholds`` (number,). Arguments as ``cett``.

    Kept is what is neither below the threshold nor 0, so at threshold 0 the density is that of non-zero contributions.
    """
    norms, valid = contributions(x, weight), check_token_mask(mask, x)
    x, weight = x.to(norms.dtype), weight.to(norms.dtype)
    elements = torch.full((), x.numel(), device=x.device)
    if valid is not None:
        # a padded token becomes one without output, which is left out
        x, norms = x.masked_fill(~valid, 0.0), norms.masked_fill(~valid, 0.0)
        elements = valid.sum() * x.shape[-1]
    whole = _norm(x @ weight.mT)
    counted = whole != 0
    errors, kept = [], []
    for threshold in thresholds.to(norms).unbind():
        below = norms < threshold
        error = _norm(x.masked_fill(~below, 0.0) @ weight.mT) / whole
        errors.append(torch.where(counted, error, 0.0).sum())
        kept.append((below | (norms == 0)).logical_not_().sum())
    none = torch.zeros(0, device=x.device)
    return Tail(
        torch.stack(errors) if errors else none.double(),
        torch.stack(kept) if kept else none.long(),
        counted.sum(),
        elements,
    )


def contributions(x: Tensor, weight: Tensor) -> Tensor:
    """``|x_i| ||W[:, i]||``, the norm of what each element adds to the output; float32, or float64 if either is."""
    if weight.dim() != 2 or check_activations(x).shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`weight` must be (out, width) for `x` (..., width) = {tuple(x.shape)}, got {tuple(weight.shape)}; give "
            "`weight.mT` for GPT-2's Conv1D, which keeps the transpose."
        )
    dtype = _exact_dtype(x, weight)
    return x.detach().to(dtype).abs() * _norm(weight.detach().to(dtype), 0).to(dtype)


def _exact_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


def _norm(vectors: Tensor, dim: int = -1) -> Tensor:
    """In float64: squares of small float32 numbers underflow."""
    return torch.linalg.vector_norm(vectors, dim=dim, dtype=torch.float64)


def check_tail_thresholds(threshold: float | Sequence[float] | Tensor) -> Tensor:
    """``threshold`` as a float64 tensor, or raise a ValueError."""
    thresholds = torch.as_tensor(threshold, dtype=torch.float64)
    if not bool((thresholds >= 0).all()):
        raise ValueError(f"thresholds must be >= 0, got {thresholds.min().item():g} as the smallest.")
    return thresholds


def check_cett_target(target: float) -> float:
    """Return ``target`` or raise a ValueError."""
    if not 0 <= target < 1:
        raise ValueError(
            f"`target` must be in [0, 1), got {target}: CETT is 0 when nothing is dropped and 1 when everything is."
        )
    return target
