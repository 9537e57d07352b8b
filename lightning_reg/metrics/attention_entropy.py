"""Attention entropy as a metric. The quantity is `functional.attention_entropy`."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_reg.functional.attention_entropy import (
    attention_entropy_from_probs,
    check_top_k,
    entropy_tap,
    normalize_entropy,
    rows_with_choice,
    scores_tap,
    visible_keys,
)
from lightning_reg.metrics.base import QuantityMetric

INPUTS = ("query_key", "scores", "probs")


class AttentionEntropy(QuantityMetric):
    """Mean entropy of attention rows, in [0, 1] when normalised, else in nats from 0 to log(visible keys).

    The mean is over batch, heads and queries of all updates, each row with the same weight. Rows that see no key, or a
    single key when normalised, have no choice and do not count. ``compute`` gives NaN as long as nothing counted. A NaN
    in the input stays visible: the mean is NaN until ``reset``.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``query`` (:class:`~torch.Tensor`): (batch, heads, queries, dim) with ``key`` (batch, heads, keys, dim); or, as
      ``input`` says, scores before softmax or probabilities, (..., queries, keys), without ``key``.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``entropy`` (:class:`~torch.Tensor`): a float32 scalar, or (heads,) with ``num_heads``.

    Args:
        input: What ``update`` is given: ``"query_key"``, ``"scores"`` or ``"probs"``.
        normalize: Divide by log(visible keys).
        num_heads: Report one value a head; the axis before the queries must have this size.
        top_k: Keep the ``top_k`` largest scores of a row and renormalise (AEM's top-k form).
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = AttentionEntropy()
        >>> metric.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8))
        >>> metric.compute()
        tensor(1.)
        >>> AttentionEntropy("probs", normalize=False)(torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
        tensor(0.6931)
    """

    total: Tensor
    count: Tensor

    def __init__(
        self,
        input: Literal["query_key", "scores", "probs"] = "query_key",
        *,
        normalize: bool = True,
        num_heads: int | None = None,
        top_k: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if input not in INPUTS:
            raise ValueError(f"`input` must be one of {', '.join(INPUTS)}, got {input!r}.")
        if num_heads is not None and num_heads < 1:
            raise ValueError(f"`num_heads` must be >= 1 or None for one value, got {num_heads}.")
        if input == "probs" and top_k is not None:
            raise ValueError(f"`top_k={top_k}` needs scores: use `input='scores'` or `input='query_key'`.")
        self.input, self.normalize, self.num_heads, self.top_k = input, normalize, num_heads, check_top_k(top_k)
        size = () if num_heads is None else (num_heads,)
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()  # torchmetrics' forward enables gradients
    def update(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Add the rows of a batch.

        Args:
            query: Queries (batch, heads, queries, dim); or scores or probabilities (..., queries, keys).
            key: Keys (batch, heads, keys, dim), for ``input="query_key"`` only.
            attn_mask: True = visible, broadcastable to (..., queries, keys); an additive mask is accepted too with
                queries and keys.
            is_causal: Query i sees keys 0..i; with queries and keys only, as the two arguments below.
            scale: Factor on the scores, default ``dim ** -0.5``.
            enable_gqa: Share key heads among query heads.

        Raises:
            ValueError: If the arguments do not fit ``input``, ``num_heads`` or each other.
        """
        if self.input == "query_key":
            if key is None:
                raise ValueError("`key` is missing: give queries and keys, or set `input='scores'` or `input='probs'`.")
            *_, entropy, visible = entropy_tap(
                query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, top_k=self.top_k
            )
        elif key is not None or is_causal or scale is not None or enable_gqa:
            raise ValueError(
                f"`input={self.input!r}` takes one tensor and `attn_mask`; leave out `key`, `is_causal`, `scale` and "
                "`enable_gqa`, which belong to queries and keys."
            )
        elif self.input == "scores":
            _, entropy, visible = scores_tap(query, mask=attn_mask, top_k=self.top_k)
        else:
            entropy = attention_entropy_from_probs(query, mask=attn_mask)
            visible = visible_keys(query, attn_mask, -1)
        self._add(normalize_entropy(entropy, visible) if self.normalize else entropy, visible)

    def _add(self, entropy: Tensor, visible: Tensor | int) -> None:
        counted = rows_with_choice(entropy, visible, self.normalize)
        axes = list(range(entropy.dim()))
        if self.num_heads is not None:
            if entropy.dim() < 2 or entropy.shape[-2] != self.num_heads:
                raise ValueError(
                    f"`num_heads={self.num_heads}` must be the size of the axis before the queries, got entropies of "
                    f"shape {tuple(entropy.shape)}."
                )
            axes.remove(entropy.dim() - 2)
        self.total = self.total + torch.where(counted, entropy, 0.0).sum(axes, dtype=torch.float64)
        self.count = self.count + counted.sum(axes)

    @property
    def plot_upper_bound(self) -> float | None:  # type: ignore[override]
        """1 when normalised."""
        return 1.0 if self.normalize else None

    def compute(self) -> Tensor:
        """Mean entropy of all rows so far."""
        return (self.total / self.count).float()
