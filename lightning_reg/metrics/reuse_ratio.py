"""Reuse ratio as a metric. The quantity is `functional.reuse_ratio`."""

from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional.activation_density import check_threshold
from lightning_reg.functional.reuse_ratio import count_reuse
from lightning_reg.metrics.base import QuantityMetric


class ReuseRatio(QuantityMetric):
    """Share of active neurons that were active at the token before, in [0, 1], over neighbours of one document.

    Numbers are summed over all updates and divided once. Neurons that fire independently give the density, so read the
    two together. ``compute`` gives NaN as long as nothing active had a token before it. A NaN activation counts as
    active.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` (:class:`~torch.Tensor`): activations (..., tokens, width), tokens in order
    - ``documents`` (:class:`~torch.Tensor`): (..., tokens), True = valid, or an integer for each document, 0 = padding;
      optional

    As output of ``forward`` and ``compute`` the metric returns:

    - ``reuse`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        threshold: Magnitude up to which an element counts as zero, >= 0.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ReuseRatio()
        >>> metric.update(torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 3.0, 0.0]]))
        >>> metric.compute()
        tensor(0.6667)
    """

    plot_upper_bound = 1.0

    kept: Tensor
    active: Tensor
    settings: Tensor

    def __init__(self, *, threshold: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = check_threshold(threshold)
        self.keep_apart(threshold)
        self.add_state("kept", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("active", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, documents: Tensor | None = None) -> None:
        """Add the activations of a batch.

        Args:
            x: Activations (..., tokens, width).
            documents: Shape of ``x`` without its last axis. Boolean: True = valid, one document a row. Integers: 0 =
                padding, equal neighbours belong to the same document.

        Raises:
            ValueError: If ``documents`` does not fit.
        """
        kept, active = count_reuse(x, threshold=self.threshold, documents=documents)
        self.kept = self.kept + kept
        self.active = self.active + active

    def compute(self) -> Tensor:
        """Ratio over all neighbours so far."""
        return (self.kept.double() / self.active).float()
