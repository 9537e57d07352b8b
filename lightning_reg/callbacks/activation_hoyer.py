"""Activation Hoyer-square as a callback: which MLPs, when, how strong. The penalty is `losses.activation_hoyer`."""

from typing import Any

from lightning_reg.callbacks.activation_l1 import Floor, floor_of
from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import HiddenRegularizer, LayerWeights, Role
from lightning_reg.capture import Targets
from lightning_reg.losses import ActivationHoyerLoss
from lightning_reg.schedules import Schedule


class ActivationHoyerRegularizer(HiddenRegularizer):
    """Make MLP activations sparse by the Hoyer-square of each token, whatever their scale.

    The penalty is the mean over sites of the mean over valid tokens of ``||x||_1^2 / (width ||x||_2^2)``, where x is
    the *input* of each MLP's down-projection, or of ``max(x, floor) - floor``, where x is what enters the activation.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        floor: Measure how far the activations stand above this, instead of their magnitude. ``"auto"`` is None for the
            input of the down-projection and -10 before the activation, as in D2DMoE.
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
        floor: Floor = "auto",
        role: Role = "mlp_hidden",
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "activation_hoyer",
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
        self.loss = ActivationHoyerLoss(floor=floor_of(role, floor))

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"floor": self.loss.floor, "role": self.role}
