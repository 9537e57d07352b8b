"""Entropy-guided thresholds as a loss: what counts, and the reduction. The quantity is `functional.entropy_guided`."""

import torch
from torch import Tensor, nn

from lightning_reg.functional.attention_entropy import entropy_tap, normalize_entropy, rows_with_choice, scores_tap
from lightning_reg.functional.entropy_guided import (
    GuidedObjective,
    check_guided_objective,
    check_margin,
    entropy_guided,
)


class EntropyGuidedLoss(nn.Module):
    """Squared distance of each head's normalised entropy from its threshold beyond a margin, to be minimised.

    The thresholds are given to each call: one parameter for each layer belongs to whoever trains them. Rows that see
    fewer than two keys are left out.

    Args:
        margin: Distance that costs nothing, in [0, 1].
        objective: ``band``, ``floor`` (only below counts) or ``ceiling`` (only above).

    Example:
        >>> loss = EntropyGuidedLoss()
        >>> loss(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.tensor([0.5, 0.9]))  # uniform attention is 1
        tensor(0.1250)
    """

    def __init__(self, margin: float = 0.2, *, objective: GuidedObjective = "band") -> None:
        super().__init__()
        self.margin, self.objective = check_margin(margin), check_guided_objective(objective)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        threshold: Tensor | float,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Penalty of the attention of ``query`` (batch, heads, queries, dim) to ``key``; a scalar."""
        *_, entropy, visible = entropy_tap(
            query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
        )
        return self.reduce(entropy, visible, threshold)[0]

    def from_scores(self, scores: Tensor, threshold: Tensor | float, *, mask: Tensor | None = None) -> Tensor:
        """Penalty of attention scores (batch, heads, queries, keys) before softmax, mask True = visible; a scalar."""
        _, entropy, visible = scores_tap(scores, mask=mask)
        return self.reduce(entropy, visible, threshold)[0]

    def reduce(
        self, entropy: Tensor, visible: Tensor | int, threshold: Tensor | float, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Penalty and mean entropy of rows.

        Args:
            entropy: Entropy in nats, (batch, heads, queries).
            visible: Visible keys of each row, same shape, or one number for all rows.
            threshold: (heads,) or a scalar, in [0, 1].
            valid: Rows to count, broadcastable to ``entropy``; rows that see fewer than two keys never count.

        Returns:
            ``(penalty, value)``, scalars: what to minimise, and the mean normalised entropy, detached.
        """
        counted = rows_with_choice(entropy, visible, normalize=True)
        if valid is not None:
            counted = counted & valid
        entropy = normalize_entropy(entropy, visible)
        penalty = entropy_guided(entropy, threshold, margin=self.margin, objective=self.objective, mask=counted)
        rows = entropy.detach()
        value = torch.where(counted, rows, 0.0).sum() / counted.expand(rows.shape).sum().clamp_min(1)
        return penalty, value

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        return f"{self.margin:g}, objective={self.objective!r}"
