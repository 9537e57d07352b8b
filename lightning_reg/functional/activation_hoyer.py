r"""Hoyer-square of activations: how evenly a token's activation spreads over the width, whatever its scale.

Formula
    For a token of width d: ``H = ||x||_1^2 / (d ||x||_2^2)``; the mean over valid tokens.
    ``dH/dx_i = 2 ||x||_1 (sign(x_i) ||x||_2^2 - ||x||_1 x_i) / (d ||x||_2^4)``, orthogonal to x. With a ``floor`` it is
    that of ``max(x, floor) - floor``: how far x stands above the floor.
Source
    Kurtz et al. 2020 (Inducing and exploiting activation sparsity, section 2.1), after Hoyer 2004; per token as in
    D2DMoE (arXiv 2310.04361). Public code takes it over the whole batch and gives NaN for zeros, or 1 to d. The floor
    is D2DMoE's for GELU, -10 on *pre*-activations.
Input
    Activations ``x`` of any shape (..., width), normally the input of an MLP's down-projection; with a floor, what
    enters the activation.
Unit and range
    Dimensionless: 1 / width when one activation holds everything, 1 when all magnitudes are equal, and 0 for a token
    that is all zero. k equal non-zeros give k / width, so it reads as a density.
Where it acts
    It pushes activations below ``||x||_2^2 / ||x||_1`` to zero, or to the floor, and lets larger ones grow. What is at
    or below the floor has no gradient.
Default and why
    Divided by the width, so that a weight does not depend on it.
Cost
    One pass forward and one backward; keeps only ``x`` and three numbers for each token. On a GPU, where ``x`` comes
    straight from GELU or SiLU or is gated by one, the backward pass is that of the activation and free.
When it hurts
    Small tokens count as much as large ones. A dead ReLU has no gradient. With a floor far below all activations each
    stands about equally high above it: the value is near 1 and the pull weak.
Not together with
    Nothing known; it does not see the scale, so it adds well to a penalty that does.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_reg.functional._fusing import activate, differentiable, in_place, producer, through
from lightning_reg.functional._tokens import at_least_one, check_activations, check_token_mask, upcast, valid_sum
from lightning_reg.functional.activation_l1 import above, check_floor
from lightning_reg.kernels import operator, whole


def activation_hoyer(x: Tensor, *, mask: Tensor | None = None, floor: float | None = None) -> Tensor:
    """Mean over valid tokens of ``||x||_1^2 / (width ||x||_2^2)``, of x or of ``max(x, floor) - floor``.

    Args:
        x: Activations (..., width).
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.
        floor: Measure how far ``x`` stands above this, instead of its magnitude.

    Returns:
        Scalar in [0, 1], float32 (float64 for float64 input); 0 when no position is valid.

    Raises:
        ValueError: If ``floor`` is not finite or ``x`` or ``mask`` does not fit.

    Example:
        >>> activation_hoyer(torch.tensor([[0.0, 3.0, 0.0, -3.0]]))
        tensor(0.5000)
    """
    return hoyer_tap(x, mask=mask, floor=floor)[1]


@whole
def hoyer_tap(x: Tensor, *, mask: Tensor | None = None, floor: float | None = None) -> tuple[Tensor, Tensor]:
    """``x`` unchanged, and its Hoyer-square joined to the same autograd node. Arguments as ``activation_hoyer``."""
    mask = check_token_mask(mask, check_activations(x))
    activation, sources = producer(x)
    return _Hoyer.apply(x.detach() if sources else x, mask, check_floor(floor), activation, *sources)


class _Hoyer(torch.autograd.Function):
    """One node for the value and its Hoyer-square.

    With the ``sources`` of x, its backward goes on through the activation function that made x of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, floor: float | None, activation: str, *sources: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return ``x`` and its Hoyer-square."""
        unit, l1, square = _norms(x, floor)
        ctx.save_for_backward(mask, unit, l1, square, *(sources or (x,)))
        ctx.floor, ctx.activation = floor, activation
        ctx.set_materialize_grads(False)
        return x.view_as(x), valid_sum(l1.square() / (square * max(1, x.shape[-1])), mask) / _tokens(x, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_hoyer: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add the gradient of the Hoyer-square to that of ``x``."""
        mask, unit, l1, square, *sources = ctx.saved_tensors
        if grad_hoyer is None:
            grads = through(ctx.activation, grad, sources)
        else:
            if torch.is_grad_enabled():  # of these too
                unit, l1, square = differentiable(_norms)(activate(ctx.activation, sources), ctx.floor)
            strength = grad_hoyer * 2 / (_tokens(sources[0], mask) * max(1, sources[0].shape[-1]))
            per_token = strength * l1 / (square * unit)
            if mask is not None:
                per_token = per_token.masked_fill(~mask, 0.0)
            add = differentiable(_add_gradient)
            grads = add(grad, sources, ctx.activation, ctx.floor, unit, l1 / square, per_token)
        return (None, None, None, None, *grads) if ctx.activation else (*grads, None, None, None)


@operator("activation_hoyer.norms", inline=True)
def _norms(x: Tensor, floor: float | None) -> list[Tensor]:
    """``[unit, L1, L2 squared]`` of each token, in units of its largest magnitude: nothing overflows."""
    exact = above(upcast(x), floor)
    unit = exact.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else exact.new_ones(*x.shape[:-1], 1)
    unit = torch.where(unit == 0, 1.0, unit)
    scaled = exact / unit
    square = scaled.square().sum(-1, keepdim=True)
    return [unit, scaled.abs().sum(-1, keepdim=True), torch.where(square == 0, 1.0, square)]


@operator("activation_hoyer.add_gradient", inline=True)
def _add_gradient(
    grad: Tensor | None, sources: list[Tensor], activation: str, floor: float | None, unit: Tensor, ratio: Tensor,
    per_token: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of ``sources``, of which ``activation`` makes x, with ``ratio`` L1 / L2 squared of each token."""
    x = activate(activation, sources)
    scaled = above(upcast(x), floor) / unit
    # where nothing but the sign is left of a number too small to be squared, and in padding
    pull = ((scaled.sign() - scaled * ratio) * per_token).masked_fill(per_token == 0, 0.0)
    total = (pull if grad is None else grad + pull).to(x.dtype)
    return through(activation, in_place(total), sources)


def _tokens(x: Tensor, mask: Tensor | None) -> int | Tensor:
    return at_least_one(x[..., :1].numel() if mask is None else mask.sum())
