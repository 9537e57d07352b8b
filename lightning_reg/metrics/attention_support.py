"""Support of attention rows as a metric. The quantity is `functional.attention_support`."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_reg.functional.attention_entropy import scores_tap
from lightning_reg.functional.attention_support import attention_support, check_mass, effective_keys
from lightning_reg.metrics.base import QuantityMetric

Input = Literal["probs", "scores"]
Measure = Literal["support", "effective"]


class AttentionSupport(QuantityMetric):
    """Mean number of keys an attention row uses, over all rows of all updates; rows that see no key do not count.

    ``compute`` gives NaN as long as no row counted. A NaN in the input stays visible until ``reset``.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``rows`` (:class:`~torch.Tensor`): probabilities, or scores before softmax, (..., keys)

    As output of ``forward`` and ``compute`` the metric returns:

    - ``keys`` (:class:`~torch.Tensor`): a float32 scalar

    Args:
        input: What ``update`` is given, ``"probs"`` or ``"scores"``; scores at or below ``MASKED_BIAS`` hide their key.
        measure: ``"support"`` is the smallest number of keys that hold ``mass`` of the weight, ``"effective"`` is
            exp(entropy).
        mass: Share of the weight, in (0, 1].
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = AttentionSupport()
        >>> metric.update(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> metric.compute()
        tensor(2.)
        >>> AttentionSupport("scores", measure="effective")(torch.zeros(3, 7))
        tensor(7.0000)
    """

    plot_lower_bound = 0.0

    total: Tensor
    rows: Tensor
    settings: Tensor

    def __init__(
        self, input: Input = "probs", *, measure: Measure = "support", mass: float = 0.9, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if input not in get_args(Input):
            raise ValueError(f"`input` must be one of {', '.join(get_args(Input))}, got {input!r}.")
        if measure not in get_args(Measure):
            raise ValueError(f"`measure` must be one of {', '.join(get_args(Measure))}, got {measure!r}.")
        self.input, self.measure, self.mass = input, measure, check_mass(mass)
        self.keep_apart(get_args(Measure).index(measure), mass, get_args(Input).index(input))
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()  # torchmetrics' forward enables gradients
    def update(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of a batch.

        Args:
            rows: Probabilities or scores (..., keys).
            mask: Visible keys, True = visible, broadcastable to ``rows``.

        Raises:
            ValueError: If ``rows`` is not floating point or ``mask`` is not boolean.
        """
        if self.input == "scores":
            probs, entropy, visible = scores_tap(rows, mask=mask)
            seen = visible > 0
            probs = torch.where(seen.unsqueeze(-1), probs, 0.0)
        else:
            if mask is not None and mask.dtype != torch.bool:
                raise ValueError(f"`mask` must be boolean (True = visible), got {mask.dtype}; use `mask.bool()`.")
            probs = rows if mask is None else rows.masked_fill(~mask, 0.0)
            seen, entropy = probs.sum(-1) != 0, torch.special.entr(probs.double()).sum(-1)
        keys = attention_support(probs, mass=self.mass) if self.measure == "support" else effective_keys(entropy)
        self.total = self.total + torch.where(seen, keys, 0.0).sum(dtype=torch.float64)
        self.rows = self.rows + seen.sum()

    def compute(self) -> Tensor:
        """Mean over all rows so far."""
        return (self.total / self.rows).float()
