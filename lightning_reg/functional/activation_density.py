r"""Soft count of non-zero activations, the density surrogate of DEFT.

Formula
    ``density = mean over valid x of phi(x)``, ``phi(x) = x^2 / (x^2 + epsilon)``, computed as
    ``1 - epsilon / (x^2 + epsilon)`` in float32; ``phi'(x) = 2 x epsilon / (x^2 + epsilon)^2``.
Source
    DEFT (Runwal et al. 2024, arXiv 2402.01911) and its public code, which writes ``x^2 / (x^2 + epsilon)`` in the
    input's precision: inf or NaN gradients in float16, exactly 0 in bfloat16 for |x| >= 1e-2. This form has neither.
Input
    Activations ``x`` of any shape (..., width), normally the input of an MLP's down-projection.
Unit and range
    Dimensionless, in [0, 1]: 0 when every activation is 0, towards 1 when all are far above sqrt(epsilon).
Where it acts
    The pull peaks at |x| = sqrt(epsilon / 3) with height 0.65 / sqrt(epsilon) and fades beyond a few sqrt(epsilon):
    ``epsilon`` decides which activations can be pushed to 0, it is the real hyper-parameter.
Default and why
    ``epsilon=1e-7`` as in the public code. ``relative=True`` multiplies it with the mean square of ``x`` (no gradient
    through that mean), so one value suits every layer.
Cost
    Element-wise, one pass forward and one backward; keeps only ``x``, which the next layer keeps anyway.
When it hurts
    A dead ReLU has no gradient: nothing revives it. GELU and SiLU give small, not exact, zeros.
Not together with
    ``epsilon`` far below the square of the activations' scale: the penalty is then constant and does nothing.
"""

from typing import Any

import torch
from torch import Tensor


def activation_density(
    x: Tensor, *, epsilon: float = 1e-7, mask: Tensor | None = None, relative: bool = False
) -> Tensor:
    """Mean of ``x^2 / (x^2 + epsilon)`` over valid elements.

    Args:
        x: Activations (..., width).
        epsilon: Softness of the count, > 0, in squared units of ``x``, or of its mean square with ``relative``.
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.
        relative: Scale ``epsilon`` by the mean square of the valid elements.

    Returns:
        Scalar in [0, 1], float32 (float64 for float64 input); 0 when no position is valid.

    Raises:
        ValueError: If ``epsilon`` is not positive or a shape does not fit.

    Example:
        >>> activation_density(torch.tensor([[0.0, 2.0, 0.0, -3.0]]))
        tensor(0.5000)
    """
    return density_tap(x, epsilon=epsilon, mask=mask, relative=relative)[1]


def density_tap(
    x: Tensor, *, epsilon: float = 1e-7, mask: Tensor | None = None, relative: bool = False
) -> tuple[Tensor, Tensor]:
    """``x`` unchanged, and its density joined to the same autograd node. Arguments as ``activation_density``."""
    check_epsilon(epsilon)
    if not torch.is_floating_point(x) or x.dim() == 0:
        raise ValueError(f"`x` must be floating point of shape (..., width), got {tuple(x.shape)} {x.dtype}.")
    return _Density.apply(x, check_token_mask(mask, x), epsilon, relative)


def exact_density(x: Tensor, *, threshold: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Share of valid elements with ``|x| > threshold``; ``threshold=0`` counts exact non-zeros.

    Args:
        x: Activations (..., width).
        threshold: Magnitude up to which an element counts as zero, >= 0.
        mask: Valid positions, True = valid, shape of ``x`` without its last axis.

    Returns:
        Scalar in [0, 1], float32, no gradient; 0 when no position is valid.

    Example:
        >>> exact_density(torch.tensor([[0.0, 2.0, 1e-3, -3.0]]), threshold=0.01)
        tensor(0.5000)
    """
    if threshold < 0:
        raise ValueError(f"`threshold` must be >= 0, got {threshold}.")
    active, valid = count_active(x, threshold, mask)
    return active.float() / valid.clamp_min(1)


def count_active(x: Tensor, threshold: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numbers of elements above ``threshold`` in magnitude and of valid elements, int64 scalars."""
    active = x.detach().abs() > threshold
    mask = check_token_mask(mask, x)
    if mask is None:
        return active.sum(), torch.tensor(x.numel(), device=x.device)
    return (active & mask).sum(), mask.sum() * x.shape[-1]


class _Density(torch.autograd.Function):
    """One node for the value and its density, so that one pass writes ``grad + grad_density * phi'(x) / count``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, epsilon: float, relative: bool) -> tuple[Tensor, Tensor]:
        exact = x.double() if x.dtype == torch.float64 else x.float()
        count = torch.tensor(x.numel(), device=x.device) if mask is None else mask.sum() * x.shape[-1]
        count = count.clamp_min(1).to(exact.dtype)
        scaled = torch.tensor(epsilon, dtype=exact.dtype, device=x.device)
        if relative:
            square = exact.square() if mask is None else exact.square() * mask
            # an all-zero input has no scale: any positive epsilon gives density 0
            scaled = scaled * (square.sum() / count).clamp_min(torch.finfo(exact.dtype).tiny / epsilon)
        ctx.save_for_backward(x, mask, scaled, count)
        ctx.set_materialize_grads(False)
        zeroness = scaled / torch.addcmul(scaled, exact, exact)
        density = 1 - zeroness.mean() if mask is None else ((1 - zeroness) * mask).sum() / count
        return x.view_as(x), density

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_density: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, epsilon, count = ctx.saved_tensors
        if grad_density is not None:
            exact = x.double() if x.dtype == torch.float64 else x.float()
            slope = exact / torch.addcmul(epsilon, exact, exact).square_()
            strength = grad_density * 2 * epsilon / count
            slope = slope * strength if mask is None else slope * (strength * mask)
            grad = slope.to(x.dtype) if grad is None else grad + slope.to(grad.dtype)
        return grad, None, None, None


def check_epsilon(epsilon: float) -> float:
    """Return ``epsilon`` or raise a ValueError."""
    if not epsilon > 0:
        raise ValueError(f"`epsilon` must be > 0, got {epsilon}. DEFT's public code uses 1e-7.")
    return epsilon


def check_token_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``mask`` as (..., 1) for ``x`` (..., width), or raise a ValueError."""
    if mask is None:
        return None
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"`mask` must have the shape of `x` without its last axis, {tuple(x.shape[:-1])}, "
                         f"got {tuple(mask.shape)}.")
    return mask.bool().unsqueeze(-1)
