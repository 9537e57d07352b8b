"""Activation L1 as a callback: which MLPs, when, how strong. The penalty is `losses.activation_l1`."""

from typing import Any

from lightning_reg.callbacks.regularizer import HiddenRegularizer, Mask
from lightning_reg.capture import Targets
from lightning_reg.losses import ActivationL1Loss
from lightning_reg.schedules import Schedule


class ActivationL1Regularizer(HiddenRegularizer):
    """Shrink MLP activations by their mean magnitude, the penalty of ProSparse.

    The penalty is the mean over sites of the mean over valid elements of ``|x|``, where x is the *input* of
    each MLP's down-projection.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        relative: Divide by the root mean square of the activations, held fixed.
        targets: Down-projections; all MLPs when left out.
        schedule: Factor on ``weight`` over the training.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    def __init__(
        self,
        weight: float,
        *,
        relative: bool = False,
        targets: Targets = None,
        schedule: Schedule | None = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "activation_l1",
    ) -> None:
        super().__init__(weight, targets=targets, schedule=schedule, mask=mask, allow_unused=allow_unused, name=name)
        self.loss = ActivationL1Loss(relative=relative)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"relative": self.loss.relative}
