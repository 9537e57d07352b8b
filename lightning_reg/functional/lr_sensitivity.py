r"""Sensitivity to the learning rate: what a badly chosen one costs, on average over a grid of them.

Formula
    ``mean over the grid of [min(loss, initial) - best]``, ``best = min over the grid of min(loss, initial)``. A loss
    that is NaN or infinite counts as the initial one: a diverged run has learnt nothing.
Source
    Wortsman et al. 2023 (Small-scale proxies for large-scale transformer training instabilities, arXiv 2309.14322,
    section 2.2). Their best loss is not bounded by the initial one, which makes a difference only where no learning
    rate learns anything.
Input
    Final losses of one training at each learning rate of a grid, and the loss before the first step, on the same data.
    The paper's grid is ``LR_GRID``: half decades from 3e-4 to 3e-1, each the peak of warm-up and cosine decay.
Unit and range
    That of the loss, nats for cross-entropy; from 0, where every learning rate does as well as the best, to
    ``initial - best``. Lower is less sensitive.
Default and why
    Bounded by the initial loss, so that a run that explodes weighs as much as one that learns nothing.
Cost
    None; the runs cost.
When it hurts
    0 for a model that stays at chance, whatever happens. It ignores where the best learning rate lies: a method that
    moves it out of the grid looks sensitive, one that makes every run equally bad looks robust. Always draw the curves.
Not together with
    Methods that change what a learning rate means, unless the curves stand beside it: a weight whose scale does not
    matter (sigma-Reparam) turns by an angle that its norm decides, so its curve is shifted and stretched.
"""

import torch
from torch import Tensor

from lightning_reg.functional._tokens import upcast

LR_GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def lr_sensitivity(losses: Tensor, initial_loss: float | Tensor, *, dim: int = -1) -> Tensor:
    """Mean over the grid of ``min(loss, initial)``, less the smallest of them.

    Args:
        losses: Final losses (..., learning rates); NaN and infinity mean diverged.
        initial_loss: Loss before the first step: a number, or the shape of ``losses`` without ``dim``.
        dim: Axis of the learning rates.

    Returns:
        Shape of ``losses`` without ``dim``, >= 0, float32 (float64 for float64 input), no gradient.

    Raises:
        ValueError: If ``losses`` has no learning rate or is not floating point, ``initial_loss`` is not finite, or the
            two do not fit.

    Example:
        >>> lr_sensitivity(torch.tensor([2.0, 1.0, 1.5, float("nan")]), 2.5)
        tensor(0.7500)
    """
    if not losses.is_floating_point() or losses.dim() == 0 or losses.shape[dim] == 0:
        raise ValueError(
            f"`losses` must be floating point with a learning rate or more on axis {dim}, got {tuple(losses.shape)} "
            f"{losses.dtype}."
        )
    return mean_above_best(bounded_losses(losses, _beside(initial_loss, losses, dim)), dim)


def mean_above_best(losses: Tensor, dim: int) -> Tensor:
    """Mean over ``dim`` of what the losses exceed the smallest by; NaN where one is NaN."""
    return (losses - losses.amin(dim, keepdim=True)).mean(dim)


def bounded_losses(losses: Tensor, initial_loss: Tensor) -> Tensor:
    """``min(loss, initial)``, where NaN and infinity count as initial; detached, float32 or float64.

    Raises:
        ValueError: If an initial loss is not finite.
    """
    losses, initial = upcast(losses.detach()), initial_loss.detach()
    if not bool(initial.isfinite().all()):
        raise ValueError(
            f"`initial_loss` must be finite, got {initial[~initial.isfinite()].flatten()[0].item()}: measure it before "
            "the first step."
        )
    initial = initial.to(losses)
    return torch.where(losses.isfinite(), torch.minimum(losses, initial), initial)


def _beside(initial_loss: float | Tensor, losses: Tensor, dim: int) -> Tensor:
    """The initial loss with an axis for the learning rates."""
    initial = torch.as_tensor(initial_loss, dtype=torch.float64 if isinstance(initial_loss, float) else None)
    wanted = losses.select(dim, 0).shape
    if initial.dim() == 0:
        return initial
    if initial.shape != wanted:
        raise ValueError(
            f"`initial_loss` must be a number or have the shape of `losses` without axis {dim}, {tuple(wanted)}, got "
            f"{tuple(initial.shape)}."
        )
    return initial.unsqueeze(dim)
