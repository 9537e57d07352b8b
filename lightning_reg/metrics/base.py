"""What all metrics share: how they are drawn and moved."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class QuantityMetric(Metric):
    """A quantity >= 0 that is neither good nor bad in itself, summed exactly.

    ``compute`` gives NaN as long as nothing was counted. States keep their 64 bits when the metric, or the module that
    holds it, is converted: a count in bfloat16 stops growing at 256.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound: float | None = 0.0

    def keep_apart(self, *settings: float) -> None:
        """Add the settings as a state ``settings``.

        A ``MetricCollection`` lets metrics share their states that are equal after the first batch, as counts at two
        thresholds may be by chance: both would then count at one of them.
        """
        self.add_state("settings", torch.tensor(settings, dtype=torch.float64), dist_reduce_fx="max")

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value, or a sequence of values over time.

        Args:
            val: Results of ``forward`` or ``compute``; without it ``compute`` is called.
            ax: Matplotlib axis to draw on.

        Returns:
            Figure and axis.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> "QuantityMetric":
        """Follow ``fn`` to another device, not to another type."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        super()._apply(moved, exclude_state)
        return self
