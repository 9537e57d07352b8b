"""L1 of activations and its gradient, one pass each. The quantity is ``functional.activation_l1``."""

from collections.abc import Sequence

from torch import Tensor

from lightning_reg.kernels import reduction


def means(x: Tensor, mask: Tensor | None, floor: float | None, square: bool) -> list[Tensor]:
    """Mean over valid elements of ``|x|``, or of its height above ``floor``, and of its square with ``square``."""
    reduction.check(x)
    return reduction.means(x, mask, "l1", square=square, floor=floor)


def add_gradient(
    grad: Tensor | None, sources: Sequence[Tensor], activation: str, mask: Tensor | None, floor: float | None,
    strength: Tensor,
) -> list[Tensor]:  # fmt: skip
    """``grad + strength * sign(x)``, through the activation; arguments as ``reduction.add``."""
    reduction.check(grad, *sources)
    return reduction.add(grad, sources, activation, mask, strength, "l1", floor=floor)
