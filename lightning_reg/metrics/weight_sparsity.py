"""Weight sparsity as a metric. The quantity is `functional.weight_sparsity`."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_reg.functional.weight_sparsity import count_zeros
from lightning_reg.metrics.base import QuantityMetric
from lightning_reg.metrics.spectral_norm import _weights


class WeightSparsity(QuantityMetric):
    """Share of exact zeros among weights, in [0, 1].

    The share is over all elements of all updates. ``compute`` gives NaN before the first update. A NaN in a weight
    counts as non-zero.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``weight`` (:class:`~torch.Tensor` or :class:`~torch.nn.Module`): a weight of any shape, or a module: then every
      parameter of two or more axes named ``weight`` or ``..._weight`` in it, embeddings left out, a tied one once,
      each as its forward uses it (with its parametrization).

    As output of ``forward`` and ``compute`` the metric returns:

    - ``sparsity`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = WeightSparsity()
        >>> metric.update(torch.tensor([[0.0, 2.0], [0.0, 1.0]]))
        >>> metric.update(torch.ones(1, 4))
        >>> metric.compute()
        tensor(0.2500)
    """

    plot_upper_bound = 1.0

    zeros: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("zeros", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, weight: Tensor | nn.Module) -> None:
        """Add a weight, or the weights of a module.

        Args:
            weight: Weight, or a module.

        Raises:
            ValueError: If a module has no such weight.
        """
        weights = [weight] if isinstance(weight, Tensor) else list(_weights(weight))
        if not weights:
            raise ValueError(
                f"`weight` must hold weights of two or more axes, got {type(weight).__name__} without one."
            )
        for part in {id(part): part for part in weights}.values():
            self.zeros = self.zeros + count_zeros(part).to(self.zeros.device)
            self.total = self.total + part.numel()

    def compute(self) -> Tensor:
        """Sparsity of all weights so far."""
        return (self.zeros.double() / self.total).float()
