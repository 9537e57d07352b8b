"""Activation density and its gradient, one pass each. The quantity is ``functional.activation_density``."""

from collections.abc import Sequence

from torch import Tensor

from lightning_reg.kernels import reduction

SMALLEST_EPSILON = 1e-30  # as in ``functional.activation_density``


def density(x: Tensor, mask: Tensor | None, inverse: Tensor | None, fixed: float) -> Tensor:
    """Mean over valid elements of ``1 - 1 / (1 + x^2 inverse)``, a float32 scalar."""
    reduction.check(x)
    return reduction.means(x, mask, "density", inverse=inverse, fixed=fixed)[0]


def relative_inverse(x: Tensor, mask: Tensor | None, epsilon: float) -> Tensor:
    """1 / (epsilon times the mean of ``x^2`` over valid elements), a float32 scalar."""
    reduction.check(x)
    square = reduction.means(x, mask, "square")[0]
    return square.mul_(epsilon).clamp_min_(SMALLEST_EPSILON).reciprocal_()


def add_gradient(
    grad: Tensor | None, sources: Sequence[Tensor], activation: str, mask: Tensor | None, inverse: Tensor | None,
    fixed: float, strength: Tensor,
) -> list[Tensor]:  # fmt: skip
    """``grad + strength * x / (1 + x^2 inverse)^2``, through the activation; arguments as ``reduction.add``."""
    reduction.check(grad, *sources)
    return reduction.add(grad, sources, activation, mask, strength, "density", inverse=inverse, fixed=fixed)
