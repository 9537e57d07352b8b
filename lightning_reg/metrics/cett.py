"""CETT as a metric: error and density over a table of thresholds. The quantity is `functional.cett`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional.cett import check_cett_target, check_tail_thresholds, count_tail
from lightning_reg.metrics.base import QuantityMetric


class CETT(QuantityMetric):
    """Cumulative error of tail truncation of a down-projection, and its density, at each of a table of thresholds.

    One pass over data gives the whole trade of error against sparsity. The error is the mean over valid tokens with an
    output, the density the share of valid elements kept, exact zeros never being kept. ``compute`` gives NaN as long as
    nothing was counted. A NaN in a valid token stays visible in the error until ``reset``.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` (:class:`~torch.Tensor`): input of the down-projection (..., width)
    - ``weight`` (:class:`~torch.Tensor`): its weight (out, width); transpose that of GPT-2's ``Conv1D``
    - ``mask`` (:class:`~torch.Tensor`): valid positions (...), True = valid, optional

    As output of ``forward`` and ``compute`` the metric returns:

    - ``table`` (:class:`~torch.Tensor`): (2, thresholds), float32: the errors, and the densities, in the order of the
      attribute ``thresholds``

    Args:
        thresholds: Norms below which a contribution is dropped, >= 0; sorted, with 0 in front.
        grid: Instead of them ``(smallest, largest, number)``, in equal ratios.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = CETT([1.0, 3.5, 9.0])
        >>> metric.update(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.eye(4))
        >>> metric.compute()
        tensor([[0.0000, 0.0000, 0.6000, 1.0000],
                [0.5000, 0.5000, 0.2500, 0.0000]])
        >>> metric.lookup(0.7)
        (3.5, 0.25)
    """

    error: Tensor
    kept: Tensor
    tokens: Tensor
    elements: Tensor
    settings: Tensor
    thresholds: Tensor

    def __init__(
        self,
        thresholds: Sequence[float] | Tensor | None = None,
        *,
        grid: tuple[float, float, int] = (1e-6, 1e2, 65),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        table = _spaced(*grid) if thresholds is None else check_tail_thresholds(thresholds).flatten()
        table = torch.cat([table.new_zeros(1), table]).unique()
        self.register_buffer("thresholds", table, persistent=False)
        self.keep_apart(*table.tolist())
        for name, size, dtype in (
            ("error", table.shape, torch.float64),
            ("kept", table.shape, torch.int64),
            ("tokens", (), torch.int64),
            ("elements", (), torch.int64),
        ):
            self.add_state(name, torch.zeros(size, dtype=dtype), dist_reduce_fx="sum")

    @torch.no_grad()  # torchmetrics' forward enables gradients
    def update(self, x: Tensor, weight: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of a batch.

        Args:
            x: Input of the down-projection (..., width).
            weight: Its weight (out, width).
            mask: Valid positions, True = valid, shape of ``x`` without its last axis.

        Raises:
            ValueError: If ``weight`` or ``mask`` does not fit.
        """
        tail = count_tail(x, weight, self.thresholds, mask=mask)
        self.error = self.error + tail.error
        self.kept = self.kept + tail.kept
        self.tokens = self.tokens + tail.tokens
        self.elements = self.elements + tail.elements

    def compute(self) -> Tensor:
        """Errors and densities of all tokens so far, (2, thresholds)."""
        return torch.stack([self.error / self.tokens, self.kept.double() / self.elements]).float()

    def lookup(self, target: float) -> tuple[float, float]:
        """The largest threshold of the table whose CETT is at most ``target``, and its density; never in between.

        Args:
            target: CETT to stay within, in [0, 1); 0 asks for what costs nothing.

        Raises:
            ValueError: If ``target`` is not in [0, 1).
        """
        check_cett_target(target)
        error, density = self.compute()
        meets = (error <= target).nonzero()
        place = int(meets.max()) if len(meets) else 0  # NaN meets nothing
        return float(self.thresholds[place]), float(density[place])

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot the density against the error, a curve for each table.

        Args:
            val: Results of ``forward`` or ``compute``; without it ``compute`` is called.
            ax: Matplotlib axis to draw on.

        Returns:
            Figure and axis.
        """
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots() if ax is None else (None, ax)
        value = self.compute() if val is None else val
        for table in [value] if isinstance(value, Tensor) else value:
            ax.plot(*table.detach().cpu(), marker=".")
        ax.set(xlabel="CETT", ylabel="density", ylim=(-0.05, 1.05))
        return figure, ax


def _spaced(smallest: float, largest: float, number: int) -> Tensor:
    if not (0 < smallest < largest < math.inf and number >= 2):
        raise ValueError(
            f"`grid` must be (smallest, largest, number) with 0 < smallest < largest and number >= 2, got "
            f"{(smallest, largest, number)}."
        )
    return torch.logspace(math.log10(smallest), math.log10(largest), number, dtype=torch.float64)
