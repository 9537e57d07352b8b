"""Activation density (DEFT) as a callback: which MLPs, when, how strong. The penalty is `losses.activation_density`."""

from typing import Any

from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import HiddenRegularizer, LayerWeights
from lightning_reg.capture import Targets
from lightning_reg.losses import ActivationDensityLoss
from lightning_reg.schedules import Schedule


class ActivationDensityRegularizer(HiddenRegularizer):
    """Push MLP activations to zero with DEFT's soft count.

    The penalty is the mean over sites of the mean over valid elements of ``x^2 / (x^2 + epsilon)``, where x is the
    *input* of each MLP's down-projection, so the gated product where the MLP has a gate.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        epsilon: Softness of the count; it decides which activations can be pushed to zero.
        relative: Scale ``epsilon`` by the mean square of the activations.
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
        epsilon: float = 1e-7,
        relative: bool = False,
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "activation_density",
    ) -> None:
        super().__init__(
            weight,
            targets=targets,
            schedule=schedule,
            layer_weights=layer_weights,
            mask=mask,
            allow_unused=allow_unused,
            name=name,
        )
        self.loss = ActivationDensityLoss(epsilon, relative=relative)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"epsilon": self.loss.epsilon, "relative": self.loss.relative}
