"""Effective rank as a metric. The quantity is `functional.effective_rank`."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.functional.effective_rank import effective_rank
from lightning_reg.metrics.base import QuantityMetric
from lightning_reg.metrics.spectral_norm import _weights


class EffectiveRank(QuantityMetric):
    """Mean effective rank of weights, in directions, >= 0.

    The mean is over all weights of all updates. It is exact, from an eigenvalue decomposition of each weight: meant for
    once an epoch. ``compute`` gives NaN before the first update. A NaN or inf in a weight makes the result NaN.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``weight`` (:class:`~torch.Tensor` or :class:`~torch.nn.Module`): a weight (rows, ...), flattened to a matrix, or
      a module: then every parameter of two or more axes named ``weight`` or ``..._weight`` in it, embeddings left out,
      each as its forward uses it (with its parametrization).

    As output of ``forward`` and ``compute`` the metric returns:

    - ``rank`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = EffectiveRank()
        >>> metric.update(torch.diag(torch.tensor([3.0, 3.0, 0.0])))
        >>> metric.update(torch.eye(4))
        >>> metric.compute()
        tensor(3.)
    """

    total: Tensor
    weights: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weights", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, weight: Tensor | nn.Module) -> None:
        """Take in a weight, or the weights of a module.

        Args:
            weight: Weight of at least two axes, or a module.

        Raises:
            ValueError: If there is no such weight.
        """
        weights = [weight] if isinstance(weight, Tensor) else list(_weights(weight))
        if not weights:
            raise ValueError(
                f"`weight` must hold weights of two or more axes, got {type(weight).__name__} without one."
            )
        for part in weights:
            self.total = self.total + effective_rank(part).to(self.total)
            self.weights = self.weights + 1

    def compute(self) -> Tensor:
        """Mean over all weights so far."""
        return (self.total / self.weights).float()
