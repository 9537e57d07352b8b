"""Change from token to token as a callback: which MLPs, when, how strong. The penalty is `losses.temporal_delta`."""

from typing import Any

from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights, Role, SequenceRegularizer
from lightning_reg.capture import Targets
from lightning_reg.losses import TemporalDeltaLoss
from lightning_reg.schedules import Schedule


class TemporalDeltaRegularizer(SequenceRegularizer):
    """Let MLP activations change little from one token or frame to the next, as the Delta Activation Layer.

    The penalty is the mean over sites of the mean over neighbours and neurons of ``|q_t - q_{t+1}|``, where q is the
    *input* of each MLP's down-projection in steps of ``theta``. The model itself goes on with what is not rounded.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        theta: Step to which activations are rounded before they are compared; None does not round.
        relative: Divide the activations by their root mean square, held fixed; ``theta`` is then in units of it.
        role: ``"mlp_hidden"`` is the input of the down-projection, ``"mlp_pre_activation"`` what enters the activation.
        targets: Down-projections; all MLPs when left out.
        schedule: Factor on ``weight`` over the training.
        layer_weights: Factors on the penalties of single layers, as for ``Regularizer``.
        mask: Key or index of the batch's valid tokens or document numbers (batch, tokens), or a function of the batch.
            Boolean: True = valid, one document a row. Integers: 0 = padding, equal neighbours = same document.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    def __init__(
        self,
        weight: float,
        *,
        theta: float | None = None,
        relative: bool = False,
        role: Role = "mlp_hidden",
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "temporal_delta",
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
        self.loss = TemporalDeltaLoss(theta, relative=relative)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"theta": self.loss.theta, "relative": self.loss.relative, "role": self.role}
