"""Entropy of predictions as a loss: objective, sign and reduction. The quantity is `functional.prediction_entropy`."""

import math
from typing import Literal, get_args

from torch import Tensor, nn

from lightning_reg.functional._tokens import check_token_mask
from lightning_reg.functional.prediction_entropy import prediction_tap
from lightning_reg.functional.z_loss import labelled, position_mean, valid_or_zero

Objective = Literal["maximize", "minimize", "floor", "ceiling", "target"]
_LINEAR = ("maximize", "minimize")


class PredictionEntropyLoss(nn.Module):
    """Penalty on the entropy of predictions, always to be minimised; a mean over valid positions.

    ============  ====================  ========================================
    objective     penalty of an H       known as
    ============  ====================  ========================================
    ``maximize``  ``-H``                confidence penalty
    ``minimize``  ``H``                 entropy minimization
    ``floor``     ``max(0, bound - H)`` confidence penalty with a hinge
    ``ceiling``   ``max(0, H - bound)``
    ``target``    ``(H - bound)^2``
    ============  ====================  ========================================

    Args:
        objective: What to do with the entropy.
        bound: Threshold of ``floor``, ``ceiling`` and ``target``, in the unit chosen by ``normalize``.
        multi_label: The classes are sigmoids of their own: the mean of their binary entropies.
        normalize: Divide by log(classes), or by log 2 with ``multi_label``; otherwise nats.
        ignore_index: Label of the positions that do not count.
        shift: The labels given to ``forward`` are compared with the logits of the token before, as Hugging Face does.

    Example:
        >>> import torch
        >>> PredictionEntropyLoss()(torch.zeros(3, 4))  # an undecided prediction cannot be improved
        tensor(-1.)
    """

    def __init__(
        self,
        objective: Objective = "maximize",
        *,
        bound: float | None = None,
        multi_label: bool = False,
        normalize: bool = True,
        ignore_index: int = -100,
        shift: bool = False,
    ) -> None:
        super().__init__()
        if objective not in get_args(Objective):
            raise ValueError(f"`objective` must be one of {', '.join(get_args(Objective))}, got {objective!r}.")
        self.objective, self.multi_label, self.normalize = objective, multi_label, normalize
        self.bound = _check_bound(objective, bound, normalize)
        self.ignore_index, self.shift = ignore_index, shift

    def forward(self, logits: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Penalty of ``logits`` (..., classes), labels and mask (True = valid) of shape (...); a scalar."""
        if labels is not None:
            counted = labelled(labels, ignore_index=self.ignore_index, shift=self.shift)
            mask = counted if mask is None else counted & mask.bool()
        return self.tap(logits, mask)[1]

    def tap(self, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``logits`` unchanged, their penalty joined to the same autograd node, and the detached mean entropy."""
        valid = check_token_mask(mask, logits) if logits.dim() else None
        logits, entropy = prediction_tap(logits, multi_label=self.multi_label, normalize=self.normalize)
        entropy = valid_or_zero(entropy, valid)
        penalty = position_mean(valid_or_zero(self._penalty(entropy), valid), mask)
        return logits, penalty, position_mean(entropy.detach(), mask)

    def _penalty(self, entropy: Tensor) -> Tensor:
        if self.bound is None:
            return entropy if self.objective == "minimize" else -entropy
        if self.objective == "target":
            return (entropy - self.bound).square()
        return ((self.bound - entropy) if self.objective == "floor" else (entropy - self.bound)).relu()

    def extra_repr(self) -> str:
        """Arguments, as torch prints modules."""
        bound = "" if self.bound is None else f", bound={self.bound}"
        labels = f"ignore_index={self.ignore_index}, shift={self.shift}"
        return f"{self.objective!r}{bound}, multi_label={self.multi_label}, normalize={self.normalize}, {labels}"


def _check_bound(objective: str, bound: float | None, normalize: bool) -> float | None:
    if objective in _LINEAR:
        if bound is not None:
            raise ValueError(f"`bound` has no meaning for objective {objective!r}, got {bound!r}; leave it out.")
        return None
    number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
    if not number or not 0 <= bound < math.inf:  # type: ignore[operator]
        raise ValueError(f"`bound` of objective {objective!r} must be a number >= 0, got {bound!r}.")
    if normalize and bound > 1:  # type: ignore[operator]
        raise ValueError(f"`bound` of a normalised entropy must be <= 1, got {bound}; set `normalize=False` for nats.")
    return float(bound)  # type: ignore[arg-type]
