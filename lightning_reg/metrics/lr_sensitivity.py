"""Sensitivity to the learning rate as a metric. The quantity is `functional.lr_sensitivity`."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional.lr_sensitivity import LR_GRID, bounded_losses, mean_above_best
from lightning_reg.metrics.base import QuantityMetric

SAME = 1e-5  # relative: a learning rate that went through float32 is still of the grid


class LRSensitivity(QuantityMetric):
    """What a badly chosen learning rate costs: mean over a grid of the loss above the best, in nats, >= 0.

    A loss counts at most as much as its run's initial one, a NaN or infinite one as much. Where a learning rate has
    several runs (seeds), their mean stands for it. ``compute`` gives NaN as long as a learning rate of the grid has no
    run. 0 for a model that stays at chance: look at ``curve`` too.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``learning_rate`` (:class:`~torch.Tensor` or float): peak learning rates (...), each of the grid
    - ``final_loss`` (:class:`~torch.Tensor` or float): losses of these runs (...); NaN = diverged
    - ``initial_loss`` (:class:`~torch.Tensor` or float): losses before the first step, (...) or one number

    As output of ``forward`` and ``compute`` the metric returns:

    - ``sensitivity`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        grid: Learning rates, > 0, all different; that of Wortsman et al. when left out.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = LRSensitivity([1e-3, 1e-2, 1e-1])
        >>> for rate, loss in [(1e-3, 1.5), (1e-2, 1.0), (1e-1, float("nan"))]:
        ...     metric.update(rate, loss, 2.5)
        >>> metric.compute()
        tensor(0.6667)
        >>> metric.curve()
        tensor([1.5000, 1.0000, 2.5000])
    """

    losses: Tensor
    runs: Tensor
    settings: Tensor

    def __init__(self, grid: Sequence[float] = LR_GRID, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.grid = _check_grid(grid)
        self.keep_apart(*self.grid)
        self.add_state("losses", torch.zeros(len(self.grid), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("runs", torch.zeros(len(self.grid), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, learning_rate: float | Tensor, final_loss: float | Tensor, initial_loss: float | Tensor) -> None:
        """Add one run, or several.

        Args:
            learning_rate: Peak learning rates (...), each of the grid.
            final_loss: Losses of these runs (...); NaN = diverged.
            initial_loss: Losses before the first step, (...) or one number.

        Raises:
            ValueError: If a learning rate is not of the grid, an initial loss is not finite, or shapes differ.
        """
        rates, losses, initial = (
            torch.as_tensor(x, dtype=torch.float64, device=self.device).detach()
            for x in (learning_rate, final_loss, initial_loss)
        )
        if rates.shape != losses.shape or initial.shape not in (rates.shape, ()):
            raise ValueError(
                f"`learning_rate` and `final_loss` must have one shape, and `initial_loss` it or none, got "
                f"{tuple(rates.shape)}, {tuple(losses.shape)} and {tuple(initial.shape)}."
            )
        place = self._place(rates.flatten())
        bounded = bounded_losses(losses, initial).flatten()
        self.losses = self.losses.index_add(0, place, bounded)
        self.runs = self.runs.index_add(0, place, torch.ones_like(place))

    def compute(self) -> Tensor:
        """Sensitivity over the grid so far."""
        return mean_above_best(self.losses / self.runs, -1).float()

    def curve(self) -> Tensor:
        """Mean of ``min(loss, initial)`` at each learning rate (grid,), of this process; NaN without a run."""
        return (self.losses / self.runs).float()

    def _place(self, rates: Tensor) -> Tensor:
        grid = torch.tensor(self.grid, dtype=torch.float64, device=rates.device)
        distance = (rates[:, None] / grid - 1).abs()
        outside = ~(distance <= SAME).any(-1)
        if bool(outside.any()):
            raise ValueError(
                f"`learning_rate` must be one of {', '.join(f'{rate:g}' for rate in self.grid)}, got "
                f"{rates[outside][0].item():g}; give another `grid=`."
            )
        return distance.argmin(-1)


def _check_grid(grid: Sequence[float]) -> tuple[float, ...]:
    rates = tuple(float(rate) for rate in grid)
    ordered = sorted(rates)
    apart = all(high > low * (1 + 2 * SAME) for low, high in pairwise(ordered))
    if not rates or not all(0 < rate < math.inf for rate in rates) or not apart:
        raise ValueError(f"`grid` must hold one learning rate or more, > 0 and all different, got {list(grid)}.")
    return rates
