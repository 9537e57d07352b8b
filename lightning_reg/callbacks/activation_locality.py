"""Activation locality (BlockFFN) as a callback: which MLPs, when, how strong. The penalty is
`losses.activation_locality`.
"""

from typing import Any

from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights, Role, SequenceRegularizer
from lightning_reg.capture import Targets
from lightning_reg.losses import ActivationLocalityLoss
from lightning_reg.schedules import Schedule


class ActivationLocalityRegularizer(SequenceRegularizer):
    """Let neighbouring tokens switch on the same neurons of an MLP, the activation locality of BlockFFN.

    The penalty is the mean over sites of the mean over neighbours and neurons of the cross-entropy between
    ``sigmoid(alpha x)`` of a token and of the next, where x is what *enters* the activation of each MLP.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        alpha: Steepness of the sigmoid, in one over units of the activations.
        role: ``"mlp_pre_activation"`` is what enters the activation, ``"mlp_hidden"`` the input of the down-projection.
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
        alpha: float = 100.0,
        role: Role = "mlp_pre_activation",
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "activation_locality",
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
        self.loss = ActivationLocalityLoss(alpha)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        return {"alpha": self.loss.alpha, "role": self.role}
