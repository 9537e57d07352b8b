"""Chunk density as a metric. The quantity is `functional.exact_chunk_density`."""

from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional.activation_density import check_chunk, check_threshold, count_chunks
from lightning_reg.metrics.base import QuantityMetric


class ChunkDensity(QuantityMetric):
    """Share of neurons active at one or more of ``chunk`` consecutive tokens, in [0, 1], over chunks and neurons.

    It is what decoding ``chunk`` tokens at once has to load; one minus it is BlockFFN's chunk-level sparsity. Chunks
    begin with their document and never cross into another; the last one of a document may hold fewer tokens and counts
    as one all the same. ``compute`` gives NaN as long as nothing was valid. A NaN activation counts as active.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``x`` (:class:`~torch.Tensor`): activations (..., tokens, width)
    - ``documents`` (:class:`~torch.Tensor`): (..., tokens), True = valid, or an integer for each document, 0 = padding;
      optional

    As output of ``forward`` and ``compute`` the metric returns:

    - ``density`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        chunk: Tokens in a chunk, >= 1.
        threshold: Magnitude up to which an element counts as zero, >= 0.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ChunkDensity(chunk=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]))
        >>> metric.compute()
        tensor(0.7500)
        >>> metric(torch.ones(1, 3, 2), documents=torch.tensor([[1, 1, 0]]))
        tensor(1.)
    """

    plot_upper_bound = 1.0

    active: Tensor
    total: Tensor
    settings: Tensor

    def __init__(self, chunk: int = 8, *, threshold: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chunk, self.threshold = check_chunk(chunk), check_threshold(threshold)
        self.keep_apart(chunk, threshold)
        self.add_state("active", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Tensor, documents: Tensor | None = None) -> None:
        """Add the activations of a batch.

        Args:
            x: Activations (..., tokens, width).
            documents: Shape of ``x`` without its last axis. Boolean: True = valid, one document a row. Integers: 0 =
                padding, equal neighbours belong to the same document.

        Raises:
            ValueError: If ``documents`` does not fit.
        """
        active, total = count_chunks(x, chunk=self.chunk, threshold=self.threshold, documents=documents)
        self.active = self.active + active
        self.total = self.total + total

    def compute(self) -> Tensor:
        """Density of all chunks so far."""
        return (self.active.double() / self.total).float()
