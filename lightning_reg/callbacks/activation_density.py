"""Activation density (DEFT) as a callback: which MLPs, when, how strong. The penalty is `losses.activation_density`."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_reg import capture
from lightning_reg.callbacks.regularizer import Mask, Regularizer, explicit_sites
from lightning_reg.capture import Targets
from lightning_reg.losses import ActivationDensityLoss
from lightning_reg.schedules import Schedule

if TYPE_CHECKING:
    from lightning_reg.engine import Tap


class ActivationDensityRegularizer(Regularizer):
    """Push MLP activations to zero with DEFT's soft count.

    The penalty is the mean over sites of the mean over valid elements of ``x^2 / (x^2 + epsilon)``, where x is the
    *input* of each MLP's down-projection, so the gated product where the MLP has a gate.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        epsilon: Softness of the count; it decides which activations can be pushed to zero.
        relative: Scale ``epsilon`` by the mean square of the activations.
        targets: Down-projections; all MLPs when left out.
        schedule: Factor on ``weight`` over the training.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    role = "mlp_hidden"

    def __init__(
        self,
        weight: float,
        *,
        epsilon: float = 1e-7,
        relative: bool = False,
        targets: Targets = None,
        schedule: Schedule | None = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "activation_density",
    ) -> None:
        super().__init__(weight, targets=targets, schedule=schedule, mask=mask, allow_unused=allow_unused, name=name)
        self.loss = ActivationDensityLoss(epsilon, relative=relative)

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Down-projections of MLPs, found by shape or named by the user."""
        return find_hidden_sites(self.targets, model)

    def see_hidden(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, penalty, value)`` of a down-projection's input."""
        return self.loss.tap(x, mask)

    def check_fired(self, taps: "list[Tap]") -> None:
        """Every down-projection must have run."""
        check_hidden_fired(self.name, taps)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"epsilon": self.loss.epsilon, "relative": self.loss.relative}


def find_hidden_sites(targets: Targets, model: nn.Module) -> list[tuple[str, bool]]:
    """Sites of the role ``mlp_hidden``."""
    selected = explicit_sites(targets, model)
    found = capture.find_down_projections(model)
    if selected is None:
        if not found:
            names = [name for name, module in capture.named_modules(model).items() if capture.projection_sizes(module)]
            raise ValueError(
                "no MLP down-projection was found: no wide-to-narrow linear map follows the matching narrow-to-wide "
                f"one. Name it with `targets=`; the linear maps are {', '.join(names[:8]) or 'none'}."
            )
        return [(name, False) for name in found]
    modules = capture.named_modules(model)
    for name in selected:
        if capture.projection_sizes(modules[name]) is None:
            inside = [other for other in found if other.startswith(f"{name}.")]
            remedy = f" Its down-projections: {', '.join(inside[:5])}." if inside else ""
            raise ValueError(
                f"`targets` must name down-projections, whose input is regularized; {name or 'the model'!r} is a "
                f"{type(modules[name]).__name__}.{remedy}"
            )
    return [(name, True) for name in modules if name in selected]


def check_hidden_fired(name: str, taps: "list[Tap]") -> None:
    """Raise if a down-projection did not run."""
    idle = [tap.site.label for tap in taps if not tap.fired]
    if idle:
        raise RuntimeError(
            f"`{name}`: {', '.join(idle)} did not run, with gradient and in training mode, in the first training step, "
            "so nothing is regularized there. Leave it out with `targets=`, set `allow_unused=True` if it runs in some "
            "steps only, and use `use_reentrant=False` if it is a compiled block inside a checkpoint."
        )
