r"""Mean magnitude of activations, the L1 penalty of ProSparse and, with a floor, of D2DMoE.

Formula
    ``l1 = mean over valid x of |x|``; gradient ``sign(x) / count``. With ``relative`` it is divided by the root mean
    square of the valid ``x``, through which no gradient flows. With a ``floor`` all this is of ``max(x, floor) -
    floor`` in place of ``|x|``: how far x stands above the floor.
Source
    ProSparse (Song et al. 2024, arXiv 2402.13516, section 3.2) adds ``lambda * ||x||_1`` for each layer, a *sum*. With
    n tokens of width d in a batch its lambda is ``lambda * n * d`` here. The floor is D2DMoE's (arXiv 2310.04361) for
    GELU: -10 on *pre*-activations, a sum over the width and a mean over tokens, so its weight times the width here.
    Its public code logs as sparsity how many of the clamped values are <= -10, which none is, since they are >= 0.
Input
    Activations ``x`` of any shape (..., width), normally the input of an MLP's down-projection; with a floor, what
    enters the activation.
Unit and range
    Units of ``x``, >= 0; with ``relative`` dimensionless, in [0, 1].
Where it acts
    The pull is the same at every magnitude, so large activations shrink too. At exactly 0 there is none: a dead ReLU
    stays dead. With a floor it is downwards above the floor and none at or below it.
Default and why
    Mean instead of sum, so that a weight does not depend on batch, length or width.
Cost
    Element-wise, one pass forward and one backward; keeps only ``x``, which the next layer keeps anyway. On a GPU,
    where x comes straight from GELU or SiLU or is gated by one, the backward is that of the activation and free.
When it hurts
    It falls without a single new zero when the model makes x smaller and the down-projection larger; ``relative``
    takes that way out. On GELU and SiLU nothing becomes exactly 0: substitute the activation, or penalise what enters
    it, with a floor where the activation is as good as 0.
Not together with
    Weight decay tuned without it: decay holds the down-projection small, which is what stops the way out above.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional._fusing import activate, differentiable, in_place, producer, through
from lightning_reg.functional._tokens import (
    at_least_one,
    check_activations,
    check_token_mask,
    upcast,
    valid_count,
    valid_sum,
)
from lightning_reg.kernels import operator, whole

TINY = 1e-30  # an all-zero input has no root mean square to be measured in


def activation_l1(
    x: Tensor, *, mask: Tensor | None = None, relative: bool = False, floor: float | None = None
) -> Tensor:
    """Mean of ``|x|``, or of ``max(x, floor) - floor``, over valid elements.

    Args:
        x: Activations (..., width).
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.
        relative: Divide by the root mean square of the valid elements, held fixed.
        floor: Measure how far ``x`` stands above this, instead of its magnitude.

    Returns:
        Scalar >= 0, float32 (float64 for float64 input); 0 when no position is valid.

    Raises:
        ValueError: If ``floor`` is not finite or ``x`` or ``mask`` does not fit.

    Example:
        >>> activation_l1(torch.tensor([[0.0, 2.0, 0.0, -4.0]]))
        tensor(1.5000)
        >>> activation_l1(torch.tensor([[0.0, 2.0, 0.0, -4.0]]), floor=-1.0)
        tensor(1.2500)
    """
    return l1_tap(x, mask=mask, relative=relative, floor=floor)[1]


@whole
def l1_tap(
    x: Tensor, *, mask: Tensor | None = None, relative: bool = False, floor: float | None = None
) -> tuple[Tensor, Tensor]:
    """``x`` unchanged, and its L1 joined to the same autograd node. Arguments as ``activation_l1``."""
    mask = check_token_mask(mask, check_activations(x))
    activation, sources = producer(x)
    return _L1.apply(x.detach() if sources else x, mask, relative, check_floor(floor), activation, *sources)


class _L1(torch.autograd.Function):
    """One node for the value and its L1, so that one pass writes ``grad + grad_l1 * sign(x) / count``.

    With the ``sources`` of x, that pass goes on through the activation function that made x of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, relative: bool, floor: float | None, activation: str,
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return ``x`` and its L1."""
        l1, *square = _means(x, mask, floor, relative)
        unit = square[0].sqrt().clamp_min(TINY) if relative else None
        ctx.save_for_backward(mask, unit, *(sources or (x,)))
        ctx.floor, ctx.activation = floor, activation
        ctx.set_materialize_grads(False)
        return x.view_as(x), l1 if unit is None else l1 / unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_l1: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add ``grad_l1 * sign(x) / count`` to the gradient of ``x``."""
        mask, unit, *sources = ctx.saved_tensors
        if grad_l1 is None:
            grads = through(ctx.activation, grad, sources)
        else:
            strength = grad_l1 / at_least_one(valid_count(sources[0], mask))
            strength = strength if unit is None else strength / unit
            grads = differentiable(_add_gradient)(grad, sources, ctx.activation, mask, ctx.floor, strength)
        return (None, None, None, None, None, *grads) if ctx.activation else (*grads, None, None, None, None)


@operator("activation_l1.means", inline=True)
def _means(x: Tensor, mask: Tensor | None, floor: float | None, square: bool) -> list[Tensor]:
    """Mean magnitude and, with ``square``, mean square of the valid elements."""
    exact, count = above(upcast(x), floor), at_least_one(valid_count(x, mask))
    l1 = valid_sum(exact.abs(), mask) / count
    return [l1, valid_sum(exact.square(), mask) / count] if square else [l1]


@operator("activation_l1.add_gradient", inline=True)
def _add_gradient(
    grad: Tensor | None, sources: list[Tensor], activation: str, mask: Tensor | None, floor: float | None,
    strength: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of ``sources``, of which ``activation`` makes x: ``grad + strength * sign(x)``."""
    x = activate(activation, sources)
    # against the floor in the precision of the forward: rounded to that of x it may change sides
    sign = x.sign() if floor is None else above(upcast(x), floor).sign()
    sign = sign if mask is None else sign.masked_fill(~mask, 0.0)
    pull = upcast(sign) * strength
    total = (pull if grad is None else grad + pull).to(x.dtype)
    return through(activation, in_place(total), sources)


def above(x: Tensor, floor: float | None) -> Tensor:
    """How far ``x`` stands above the floor, >= 0; ``x`` itself without one."""
    return x if floor is None else x.clamp_min(floor) - floor


def check_floor(floor: float | None) -> float | None:
    """Return ``floor`` or raise a ValueError."""
    number = isinstance(floor, (int, float)) and not isinstance(floor, bool) and math.isfinite(floor)
    if floor is not None and not number:
        raise ValueError(
            f"`floor` must be a finite number, or None for the magnitude, got {floor!r}. D2DMoE uses -10 before GELU."
        )
    return floor
