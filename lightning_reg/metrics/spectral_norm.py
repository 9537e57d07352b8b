"""Spectral norm as a metric. The quantity is `functional.spectral_norm`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_reg.functional.spectral_norm import spectral_norm
from lightning_reg.metrics.base import QuantityMetric


class SpectralNorm(QuantityMetric):
    """Largest singular value of weights, >= 0, in units of the weight.

    The maximum is over all weights of all updates, so over the time since ``reset``. It is exact, from an
    eigen-decomposition of each weight: meant for once an epoch. ``compute`` gives NaN before the first update. A NaN or
    inf in a weight makes the result NaN.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``weight`` (:class:`~torch.Tensor` or :class:`~torch.nn.Module`): a weight (rows, ...), flattened to a matrix, or
      a module: then every parameter of two or more axes named ``weight`` or ``..._weight`` in it, embeddings left out,
      each as its forward uses it (with its parametrization).

    As output of ``forward`` and ``compute`` the metric returns:

    - ``sigma`` (:class:`~torch.Tensor`): a float32 scalar, or (weights,) with ``num_weights``, in the module's order

    Args:
        num_weights: Report one value a weight; every update must bring this many.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = SpectralNorm()
        >>> metric.update(torch.diag(torch.tensor([3.0, 1.0])))
        >>> metric.update(torch.eye(4))
        >>> metric.compute()
        tensor(3.)
    """

    largest: Tensor

    def __init__(self, *, num_weights: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_weights is not None and num_weights < 1:
            raise ValueError(f"`num_weights` must be >= 1 or None for the largest of all, got {num_weights}.")
        self.num_weights = num_weights
        size = () if num_weights is None else (num_weights,)
        self.add_state("largest", torch.full(size, -torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, weight: Tensor | nn.Module) -> None:
        """Take in a weight, or the weights of a module.

        Args:
            weight: Weight of at least two axes, or a module.

        Raises:
            ValueError: If there is no such weight, or not ``num_weights`` of them.
        """
        weights = [weight] if isinstance(weight, Tensor) else list(_weights(weight))
        if not weights:
            raise ValueError(
                f"`weight` must hold weights of two or more axes, got {type(weight).__name__} without one."
            )
        if self.num_weights is not None and len(weights) != self.num_weights:
            raise ValueError(f"`num_weights={self.num_weights}` must be the number of weights, got {len(weights)}.")
        sigma = torch.stack([_sigma(part).to(self.largest) for part in weights])
        self.largest = torch.maximum(self.largest, sigma.amax() if self.num_weights is None else sigma)

    def compute(self) -> Tensor:
        """Largest singular value so far."""
        return torch.where(self.largest < 0, torch.nan, self.largest).float()


def _sigma(weight: Tensor) -> Tensor:
    # LAPACK refuses NaN and inf
    return spectral_norm(weight) if weight.isfinite().all() else weight.new_full((), torch.nan)


def _weights(module: nn.Module) -> Iterator[Tensor]:
    for child in module.modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag, ParametrizationList)):
            continue
        for name in (*child._parameters, *getattr(child, "parametrizations", ())):
            weight = getattr(child, name) if name == "weight" or name.endswith("_weight") else None
            if weight is not None and weight.dim() > 1:
                yield weight
