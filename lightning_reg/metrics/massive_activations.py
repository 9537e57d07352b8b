"""Massive activations as a metric. The quantity is `functional.massive_activations`."""

from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional._tokens import check_activations, check_token_mask, upcast
from lightning_reg.functional.massive_activations import massive_ratio
from lightning_reg.metrics.base import QuantityMetric

PER_OCTAVE = 64
OCTAVES = 64  # to either side of 1


class MassiveActivations(QuantityMetric):
    """Largest magnitude over the median magnitude of all valid elements of all updates, >= 0.

    The median comes from counts in bins of a 64th of an octave and is within 0.6 % of the exact one; the largest is
    exact. ``compute`` gives NaN as long as nothing was valid, 0 when all is zero, inf when more than half is. A NaN
    activation makes the result NaN.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` (:class:`~torch.Tensor`): activations (..., width)
    - ``mask`` (:class:`~torch.Tensor`): valid positions (...), True = valid, optional

    As output of ``forward`` and ``compute`` the metric returns:

    - ``ratio`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = MassiveActivations()
        >>> metric.update(torch.tensor([[1.0, -2.0, 2.0]]))
        >>> metric.update(torch.tensor([[2.0, 2.0, 64.0]]))
        >>> round(metric.compute().item())
        32
    """

    counts: Tensor
    largest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # the first bin holds zeros and what is smaller than all others
        self.add_state("counts", torch.zeros(2 * OCTAVES * PER_OCTAVE + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("largest", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")

    @torch.no_grad()  # torchmetrics' forward enables gradients
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the activations of a batch.

        Args:
            x: Activations (..., width).
            mask: Valid positions, True = valid, shape of ``x`` without its last axis.

        Raises:
            ValueError: If ``x`` or ``mask`` does not fit.
        """
        valid = check_token_mask(mask, check_activations(x))
        size = upcast(x).abs()
        size = size.reshape(-1) if valid is None else size[valid.expand(x.shape)]
        if not size.numel():
            return
        bins = ((size.double().log2() + OCTAVES) * PER_OCTAVE).nan_to_num(0.0, posinf=torch.inf).floor() + 1
        index = bins.clamp(0, len(self.counts) - 1).long()
        self.counts = self.counts + torch.bincount(index, minlength=len(self.counts))
        # `maximum` hands NaN on
        self.largest = torch.maximum(self.largest, size.amax().to(self.largest))

    def compute(self) -> Tensor:
        """Ratio over all activations so far."""
        reached, total = self.counts.cumsum(0), self.counts.sum()
        place = (reached < (total + 1) // 2).sum()
        centre = torch.exp2((place - 0.5) / PER_OCTAVE - OCTAVES).double()
        ratio = massive_ratio(self.largest, torch.where(place == 0, 0.0, centre))
        return torch.where(total > 0, ratio, torch.nan).float()
