"""Activation L1 as a callback: which MLPs, when, how strong. The penalty is `losses.activation_l1`."""

from typing import Any, Literal

from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import HiddenRegularizer, LayerWeights, Role
from lightning_reg.capture import Targets
from lightning_reg.losses import ActivationL1Loss
from lightning_reg.schedules import Schedule

Floor = float | Literal["auto"] | None
D2DMOE_FLOOR = -10.0  # of its public code, before GELU


class ActivationL1Regularizer(HiddenRegularizer):
    """Shrink MLP activations by their mean magnitude, the penalty of ProSparse.

    The penalty is the mean over sites of the mean over valid elements of ``|x|``, where x is the *input* of
    each MLP's down-projection, or of ``max(x, floor) - floor``, where x is what enters the activation (D2DMoE).

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        relative: Divide by the root mean square of the activations, held fixed.
        floor: Measure how far the activations stand above this, instead of their magnitude. ``"auto"`` is None for the
            input of the down-projection and -10 before the activation.
        role: ``"mlp_hidden"`` is the input of the down-projection, ``"mlp_pre_activation"`` what enters the activation.
        targets: Down-projections; all MLPs when left out.
        schedule: Factor on ``weight`` over the training.
        layer_weights: Factors on the penalties of single layers, as for ``Regularizer``.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    def __init__(
        self,
        weight: float,
        *,
        relative: bool = False,
        floor: Floor = "auto",
        role: Role = "mlp_hidden",
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "activation_l1",
    ) -> None:
        super().__init__(
            weight,
            role=role,
            targets=targets,
            schedule=schedule,
            layer_weights=layer_weights,
            mask=mask,
            allow_unused=allow_unused,
            name=name,
        )
        self.loss = ActivationL1Loss(relative=relative, floor=floor_of(role, floor))

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"relative": self.loss.relative, "floor": self.loss.floor, "role": self.role}


def floor_of(role: Role, floor: Floor) -> float | None:
    """The floor, or that of the role for ``"auto"``."""
    if floor != "auto":
        return floor  # type: ignore[return-value]
    return D2DMOE_FLOOR if role == "mlp_pre_activation" else None
