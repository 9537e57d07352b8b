"""Attention entropy as a loss: objective, sign and reduction. The quantity is `functional.attention_entropy`."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_reg.functional.attention_entropy import (
    attention_entropy_from_probs,
    check_top_k,
    entropy_tap,
    normalize_entropy,
    rows_with_choice,
    scores_tap,
    visible_keys,
)

Objective = Literal["maximize", "minimize", "floor", "ceiling", "band", "target"]
OBJECTIVES = ("maximize", "minimize", "floor", "ceiling", "band", "target")
Level = Literal["query", "head", "site"]
LEVELS = ("query", "head", "site")
_LINEAR = ("maximize", "minimize")
_WEIGHTS = "_lightning_reg_weights"


class AttentionEntropyLoss(nn.Module):
    """Penalty on the entropy of attention rows, always to be minimised.

    ============  ==========================================  =====================
    objective     penalty of an entropy H                      ``bound``
    ============  ==========================================  =====================
    ``maximize``  ``-H`` (AEM)                                 none
    ``minimize``  ``H``                                        none
    ``floor``     ``max(0, bound - H)``                        number
    ``ceiling``   ``max(0, H - bound)``                        number
    ``band``      floor at the first, ceiling at the second    pair (low, high)
    ``target``    ``(H - bound)^2``                            number
    ============  ==========================================  =====================

    Args:
        objective: What to do with the entropy.
        normalize: Divide by log(visible keys); rows that see fewer than two keys are left out. Otherwise nats, and
            rows that see no key are left out.
        bound: Threshold of ``floor``, ``ceiling``, ``band`` and ``target``, in the unit chosen by ``normalize``.
        level: Average the entropy over batch and queries (``head``), also over heads (``site``), or not at all
            (``query``) before the objective applies. The choice matters for the non-linear objectives only; at
            ``query`` the penalty is a mean over rows and so exact under gradient accumulation and DDP.
        top_k: Keep the ``top_k`` largest scores of a row (AEM's top-k form).

    Example:
        >>> loss = AttentionEntropyLoss("maximize")
        >>> loss(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4))  # uniform attention cannot be improved
        tensor(-1.)
    """

    def __init__(
        self,
        objective: Objective = "maximize",
        *,
        normalize: bool = True,
        bound: float | Sequence[float] | None = None,
        level: Level = "query",
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
        if level not in LEVELS:
            raise ValueError(f"`level` must be one of {', '.join(LEVELS)}, got {level!r}.")
        self.objective, self.normalize, self.level = objective, normalize, level
        self.bound = _check_bound(objective, bound, normalize)
        self._low, self._high = self.bound if isinstance(self.bound, tuple) else (self.bound or 0.0,) * 2
        self.top_k = check_top_k(top_k)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Penalty of the attention of ``query`` (batch, heads, queries, dim) to ``key``; a scalar."""
        *_, entropy, visible = entropy_tap(
            query, key, attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa, top_k=self.top_k
        )
        return self.reduce(entropy, visible)[0]

    def from_scores(self, scores: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
        """Penalty of attention scores before softmax, keys along ``dim``, mask True = visible; a scalar."""
        _, entropy, visible = scores_tap(scores, mask=mask, dim=dim, top_k=self.top_k)
        return self.reduce(entropy, visible)[0]

    def from_probs(self, probs: Tensor, *, mask: Tensor | None = None, dim: int = -1) -> Tensor:
        """Penalty of attention probabilities, keys along ``dim``, mask True = visible; a scalar."""
        if self.top_k is not None:
            raise ValueError(f"`top_k={self.top_k}` needs scores: use `from_scores`.")
        entropy = attention_entropy_from_probs(probs, mask=mask, dim=dim)
        return self.reduce(entropy, visible_keys(probs, mask, dim))[0]

    def reduce(self, entropy: Tensor, visible: Tensor | int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Penalty and mean entropy of rows.

        Args:
            entropy: Entropy in nats, (batch, heads, queries) or any shape.
            visible: Visible keys of each row, same shape, or one number for all rows.
            valid: Rows to count, broadcastable to ``entropy``; rows without a choice of keys never count.

        Returns:
            ``(penalty, value)``, scalars: what to minimise, and the mean entropy in the chosen unit, detached. Both
            are 0 when no row is valid.
        """
        if self.objective in _LINEAR:
            sign = 1.0 if self.objective == "minimize" else -1.0
            penalty = self._mean(entropy, visible, valid, sign)
            return penalty, penalty.detach() if sign > 0 else -penalty.detach()
        mean = self._mean(entropy.detach(), visible, valid)
        counted = rows_with_choice(entropy, visible, self.normalize)
        if valid is not None:
            counted = counted & valid
        if self.normalize:
            entropy = normalize_entropy(entropy, visible)
        if self.level != "query":
            axes = _averaged_axes(entropy, self.level)
            entropy, counted = masked_mean(entropy, counted, self.level), counted.any(axes)
        return masked_mean(self._hinge(entropy), counted, "site"), mean

    def _mean(self, entropy: Tensor, visible: Tensor | int, valid: Tensor | None, sign: float = 1.0) -> Tensor:
        """``sign`` times the mean entropy of the counted rows, in the chosen unit."""
        if valid is None and isinstance(visible, int) and entropy.numel() and (visible > 1 or not self.normalize):
            # one product: a mean, a quotient and a sign would be three more operations in each layer's backward
            return entropy.sum() * (sign / entropy.numel() / (math.log(visible) if self.normalize else 1.0))
        if valid is None and isinstance(visible, Tensor) and not torch.compiler.is_compiling():
            counted, weights = _row_weights(visible, entropy.dtype, self.normalize)
            mean = (torch.where(counted, entropy, 0.0) * weights).sum()
        else:
            counted = rows_with_choice(entropy, visible, self.normalize)
            if valid is not None:
                counted = counted & valid
            mean = masked_mean(normalize_entropy(entropy, visible) if self.normalize else entropy, counted, "site")
        return mean if sign > 0 else -mean

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        bound = "" if self.bound is None else f", bound={self.bound}"
        return f"{self.objective!r}, normalize={self.normalize}{bound}, level={self.level!r}, top_k={self.top_k}"

    def _hinge(self, entropy: Tensor) -> Tensor:
        if self.objective == "target":
            return (entropy - self._low).square()
        below, above = (self._low - entropy).relu(), (entropy - self._high).relu()
        return {"floor": below, "ceiling": above, "band": below + above}[self.objective]


def _row_weights(visible: Tensor, dtype: torch.dtype, normalize: bool) -> tuple[Tensor, Tensor]:
    """Which rows a mean counts, and their weights in it, of which ``visible`` keeps those found last."""
    known = getattr(visible, _WEIGHTS, None)
    if known is None or known[0] != (dtype, normalize):
        counted = visible > (1 if normalize else 0)
        share = counted.sum().clamp_min(1).to(dtype).reciprocal()
        unit = torch.where(counted, visible, math.inf).to(dtype).log() if normalize else torch.ones_like(share)
        known = (dtype, normalize), counted, torch.where(counted, share / unit, 0.0)
        setattr(visible, _WEIGHTS, known)
    return known[1], known[2]


def masked_mean(entropy: Tensor, counted: Tensor, level: str) -> Tensor:
    """Mean of the counted rows of (..., heads, queries), 0 for none: of all (``site``) or for each head (``head``)."""
    axes = _averaged_axes(entropy, level)
    return torch.where(counted, entropy, 0.0).sum(axes) / counted.expand(entropy.shape).sum(axes).clamp_min(1)


def _averaged_axes(entropy: Tensor, level: str) -> tuple[int, ...]:
    return tuple(axis for axis in range(entropy.dim()) if level == "site" or axis != entropy.dim() - 2)


def _check_bound(
    objective: str, bound: float | Sequence[float] | None, normalize: bool
) -> float | tuple[float, ...] | None:
    if objective in _LINEAR:
        if bound is not None:
            raise ValueError(f"`bound` has no meaning for objective {objective!r}, got {bound}; leave it out.")
        return None
    count, wanted = (2, "a pair (low, high)") if objective == "band" else (1, "a number")
    given = bound if isinstance(bound, Sequence) else () if bound is None else (bound,)
    numbers = tuple(float(number) for number in given)
    if len(numbers) != count or numbers[0] > numbers[-1] or not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"`bound` of objective {objective!r} must be {wanted} >= 0, got {bound}.")
    if normalize and numbers[-1] > 1:
        raise ValueError(f"`bound` of a normalised entropy must be <= 1, got {bound}; set `normalize=False` for nats.")
    return numbers if objective == "band" else numbers[0]
