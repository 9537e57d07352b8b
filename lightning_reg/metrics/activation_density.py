"""Activation density as a metric. The quantity is `functional.exact_density`."""

from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional.activation_density import check_relative, check_threshold, count_active
from lightning_reg.metrics.base import QuantityMetric


class ActivationDensity(QuantityMetric):
    """Share of activations with ``|x| > threshold``, in [0, 1]; with threshold 0 the share of exact non-zeros.

    The share is over all valid elements of all updates. GELU and SiLU hardly give exact zeros: choose a threshold for
    them, or ``relative=0.01`` for the share above a hundredth of each token's largest magnitude. ``compute`` gives NaN
    as long as nothing was valid. A NaN activation counts as non-zero, with ``relative`` all of its token does.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` (:class:`~torch.Tensor`): activations (..., width)
    - ``mask`` (:class:`~torch.Tensor`): valid positions (...), True = valid, optional

    As output of ``forward`` and ``compute`` the metric returns:

    - ``density`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        threshold: Magnitude up to which an element counts as zero, >= 0.
        relative: In place of ``threshold``: a share of the largest magnitude of the element's token, in (0, 1).
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ActivationDensity()
        >>> metric.update(torch.tensor([[0.0, 2.0, 0.0, -3.0]]))
        >>> metric.update(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), mask=torch.tensor([True, False]))
        >>> metric.compute()
        tensor(0.6667)
    """

    plot_upper_bound = 1.0

    active: Tensor
    valid: Tensor
    settings: Tensor

    def __init__(self, *, threshold: float = 0.0, relative: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold, self.relative = check_threshold(threshold), check_relative(relative, threshold)
        self.keep_apart(threshold, relative or 0.0)
        self.add_state("active", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("valid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the activations of a batch.

        Args:
            x: Activations (..., width).
            mask: Valid positions, True = valid, shape of ``x`` without its last axis.

        Raises:
            ValueError: If ``mask`` does not fit.
        """
        active, valid = count_active(x, threshold=self.threshold, relative=self.relative, mask=mask)
        self.active = self.active + active
        self.valid = self.valid + valid

    def compute(self) -> Tensor:
        """Density of all activations so far."""
        return (self.active.double() / self.valid).float()
