"""Size of attention logits as a loss: objective and reduction. The quantity is `functional.attention_logits`."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_reg.functional.attention_logits import Statistic, logit_rows, logit_rows_from_scores

Objective = Literal["hinge", "square"]


class AttentionLogitLoss(nn.Module):
    """Penalty on large attention logits, minimised; a mean over the rows that see a key.

    ==========  ======================================  ======================================
    objective   penalty of a row of scores s            logged value
    ==========  ======================================  ======================================
    ``hinge``   ``max(0, max_j |s_j| - bound)^2``       mean over rows of ``max_j |s_j|``
    ``square``  ``logsumexp(s)^2``, attention's z-loss  the penalty
    ==========  ======================================  ======================================

    Args:
        objective: ``hinge`` or ``square``.
        bound: The largest logit that ``hinge`` leaves alone; ``square`` has none.

    Example:
        >>> AttentionLogitLoss(bound=3.0).from_scores(torch.tensor([[1.0, -5.0], [0.0, 2.0]]))
        tensor(2.)
    """

    def __init__(self, objective: Objective = "hinge", *, bound: float = 50.0) -> None:
        super().__init__()
        if objective not in get_args(Objective):
            raise ValueError(f"`objective` must be 'hinge' or 'square', got {objective!r}.")
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if not number or not 0 <= bound < math.inf:
            raise ValueError(
                f"`bound` must be a finite number >= 0, got {bound!r}: the largest logit to leave alone, such as 50."
            )
        self.objective, self.bound = objective, float(bound)

    @property
    def statistic(self) -> Statistic:
        """What ``reduce`` needs of each row."""
        return "max" if self.objective == "hinge" else "logsumexp"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Penalty of the attention of ``query`` (batch, heads, queries, dim) to ``key``; a scalar."""
        rows, visible = logit_rows(
            query, key, attn_mask, statistic=self.statistic, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return self.reduce(rows, visible, valid)[0]

    def from_scores(
        self, scores: Tensor, *, mask: Tensor | None = None, dim: int = -1, valid: Tensor | None = None
    ) -> Tensor:
        """Penalty of attention scores before softmax, keys along ``dim``, mask True = visible; a scalar."""
        rows, visible = logit_rows_from_scores(scores, statistic=self.statistic, mask=mask, dim=dim)
        return self.reduce(rows, visible, valid)[0]

    def reduce(self, rows: Tensor, visible: Tensor | int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Penalty and value of rows.

        Args:
            rows: The ``statistic`` of each row, (batch, heads, queries) or any shape.
            visible: Visible keys of each row, same shape, or one number for all rows.
            valid: Rows to count, broadcastable to ``rows``; rows that see no key never count.

        Returns:
            ``(penalty, value)``, scalars, the value detached. Both are 0 when no row is valid.
        """
        seen = visible > 0
        counted = seen if isinstance(seen, Tensor) else torch.full_like(rows, seen, dtype=torch.bool)
        counted = (counted if valid is None else counted & valid).expand(rows.shape)
        count = counted.sum().clamp_min(1)
        rows = torch.where(counted, rows, 0.0)
        if self.objective == "square":
            penalty = rows.square().sum() / count
            return penalty, penalty.detach()
        return (rows - self.bound).relu().square().sum() / count, rows.detach().sum() / count

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"{self.objective!r}" + (f", bound={self.bound}" if self.objective == "hinge" else "")
