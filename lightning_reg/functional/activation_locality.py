r"""How far neighbouring tokens differ in which neurons they switch on, the activation locality of BlockFFN.

Formula
    ``locality = mean over neurons and neighbours of BCE(sigmoid(alpha x_t), target=sigmoid(alpha x_{t+1}))``, that is
    ``softplus(z_t) - sigmoid(z_{t+1}) z_t`` with ``z = alpha x``. Both sides are trained:
    ``d/dx_t = alpha (sigmoid(z_t) - sigmoid(z_{t+1}))``, ``d/dx_{t+1} = -alpha z_t sigmoid'(z_{t+1})``.
Source
    BlockFFN (Song et al. 2025, arXiv 2507.08771, L_al). Which of the two is the target, alpha=100, the mean and the two
    gradients are those of its public code, where the scores enter before their ReLU.
Input
    Activations ``x`` (..., tokens, width) *before* the activation, which is on where they are positive. ``documents``
    (..., tokens) keeps padding and the borders of packed documents out.
Unit and range
    Nats, >= 0, without bound: about ``alpha |x_t|`` where the two tokens differ in sign, towards 0 where they agree and
    are far from 0, ln 2 where both are 0. Neighbours that are equal but near 0 do not give 0.
Where it acts
    The earlier token is pulled, with at most ``alpha``, wherever the signs differ. The later one is pulled only within
    a few ``1 / alpha`` of 0, but there with ``alpha^2 |x_t| / 4``. At exactly 0 on both sides there is no pull.
Default and why
    ``alpha=100`` as published, which suits activations of order 1. A mean over neighbours and neurons, then layers.
Cost
    Element-wise, one pass forward and one backward with the next token beside it; keeps only ``x``.
When it hurts
    Also all neurons on, or off, for all tokens is perfectly local: beside it something must keep them sparse. With an
    ``alpha`` far above ``1 / |x|`` the later token has no gradient.
Not together with
    Activations after a ReLU, which are never negative. An order of tokens that means nothing, as between the images or
    bags of a batch: (tokens, width) without ``documents`` is one sequence.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg.functional._tokens import (
    at_least_one,
    check_documents,
    check_tokens,
    join,
    neighbours,
    split,
    upcast,
    valid_count,
    valid_sum,
)


def activation_locality(x: Tensor, *, documents: Tensor | None = None, alpha: float = 100.0) -> Tensor:
    """Mean over neighbouring tokens and neurons of the cross-entropy between their soft activation patterns.

    Args:
        x: Activations (..., tokens, width), before the activation.
        documents: Shape of ``x`` without its last axis. Boolean: True = valid, one document a row. Integers: 0 =
            padding, equal neighbours belong to the same document.
        alpha: Steepness of the sigmoid, > 0, in one over units of ``x``.

    Returns:
        Scalar >= 0, float32 (float64 for float64 input); 0 when there are no neighbours.

    Raises:
        ValueError: If ``alpha`` is not positive or ``x`` or ``documents`` does not fit.

    Example:
        >>> activation_locality(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        tensor(50.)
    """
    return locality_tap(x, documents=documents, alpha=alpha)[1]


def locality_tap(x: Tensor, *, documents: Tensor | None = None, alpha: float = 100.0) -> tuple[Tensor, Tensor]:
    """``x`` unchanged, and its locality joined to the same autograd node. Arguments as ``activation_locality``."""
    documents = check_documents(documents, check_tokens(x))
    return _Locality.apply(x, neighbours(documents), check_alpha(alpha))


class _Locality(torch.autograd.Function):
    """One node for the value and its locality."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Tensor | None, alpha: float) -> tuple[Tensor, Tensor]:
        """Return ``x`` and its locality."""
        ctx.save_for_backward(x, pairs)
        ctx.alpha = alpha
        ctx.set_materialize_grads(False)
        earlier, later = split(upcast(x) * alpha)
        entropy = F.binary_cross_entropy_with_logits(earlier, later.sigmoid(), reduction="none")
        return x.view_as(x), valid_sum(entropy, pairs) / at_least_one(valid_count(earlier, pairs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_locality: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add the gradients of the earlier and of the later token of each pair to that of ``x``."""
        x, pairs = ctx.saved_tensors
        if grad_locality is not None:
            z = upcast(x) * ctx.alpha
            earlier = split(z)[0]
            on, target = split(z.sigmoid())
            strength = grad_locality * ctx.alpha / at_least_one(valid_count(earlier, pairs))
            pull = join(on - target, -earlier * target * (1 - target), pairs, x.shape[-2]) * strength
            grad = (pull if grad is None else grad + pull).to(x.dtype)
        return grad, None, None


def check_alpha(alpha: float) -> float:
    """Return ``alpha`` or raise a ValueError."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"`alpha` must be finite and > 0, got {alpha}. BlockFFN uses 100.")
    return alpha
