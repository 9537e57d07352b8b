"""Dead neurons as a metric. The quantity is `functional.dead_neurons`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_reg.functional.activation_density import check_threshold
from lightning_reg.functional.dead_neurons import count_firing
from lightning_reg.metrics.base import QuantityMetric


class DeadNeurons(QuantityMetric):
    """Share of neurons never active since ``reset``, in [0, 1]; ``active_rates`` says how often each is.

    The width is that of the first update; a process without one takes part all the same. ``compute`` gives NaN as long
    as no token was valid. A NaN activation counts as active.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` (:class:`~torch.Tensor`): activations (..., width)
    - ``mask`` (:class:`~torch.Tensor`): valid positions (...), True = valid, optional

    As output of ``forward`` and ``compute`` the metric returns:

    - ``dead`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        threshold: Magnitude up to which an element counts as zero, >= 0.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = DeadNeurons()
        >>> metric.update(torch.tensor([[0.0, 2.0, 0.0, 1.0]]))
        >>> metric.update(torch.tensor([[0.0, 0.0, 0.0, -3.0]]))
        >>> metric.compute()
        tensor(0.5000)
        >>> metric.active_rates()
        tensor([0.0000, 0.5000, 0.0000, 1.0000])
    """

    plot_upper_bound = 1.0

    firing: Tensor
    tokens: Tensor
    settings: Tensor

    def __init__(self, *, threshold: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = check_threshold(threshold)
        self.keep_apart(threshold)
        # one zero, which broadcasts to the width of the first update
        self.add_state("firing", torch.zeros(1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the activations of a batch.

        Args:
            x: Activations (..., width).
            mask: Valid positions, True = valid, shape of ``x`` without its last axis.

        Raises:
            ValueError: If ``mask`` does not fit or the width changed.
        """
        width = self.firing.numel()
        if width > 1 and x.shape[-1] != width:
            raise ValueError(
                f"`x` must keep its width, {width}, got {tuple(x.shape)}: use one metric a layer, or `reset` it first."
            )
        firing, tokens = count_firing(x, threshold=self.threshold, mask=mask)
        self.firing = self.firing + firing
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """Share of neurons that were never active so far."""
        return torch.where(self.tokens > 0, (self.firing == 0).double().mean(), torch.nan).float()

    def active_rates(self) -> Tensor:
        """Share of tokens at which each neuron is active (width,), over all processes: call it on all of them."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return (self.firing.double() / self.tokens).float()

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None) -> None:
        """Give a process without an update the width of the others, then add up."""
        width = torch.tensor(self.firing.numel(), device=self.firing.device)
        widths = dist_sync_fn(width, group=process_group or self.process_group)
        missing = int(torch.stack(list(widths)).max()) - self.firing.numel()
        self.firing = F.pad(self.firing, (0, missing))
        super()._sync_dist(dist_sync_fn, process_group)
