"""Entropy of predictions as a callback: which heads, when, how strong. The objective is `losses.prediction_entropy`."""

from typing import Any

from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights
from lightning_reg.callbacks.z_loss import LogitsRegularizer
from lightning_reg.capture import Targets
from lightning_reg.losses import PredictionEntropyLoss
from lightning_reg.losses.prediction_entropy import Objective
from lightning_reg.schedules import Schedule


class PredictionEntropyRegularizer(LogitsRegularizer):
    """Maximise, minimise or bound the entropy of predictions.

    The penalty is the mean over sites of the mean over valid positions; ``objective="maximize"`` is the confidence
    penalty, ``"floor"`` its hinge, ``"minimize"`` entropy minimization.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        objective: ``maximize``, ``minimize``, ``floor``, ``ceiling`` or ``target``.
        bound: Threshold of ``floor``, ``ceiling`` and ``target``, in the unit chosen by ``normalize``.
        multi_label: The classes are sigmoids of their own: the mean of their binary entropies.
        normalize: Divide by log(classes), or by log 2 with ``multi_label``, so that the entropy is in [0, 1]; otherwise
            nats.
        labels: Key or index of the batch's labels, of the positions of the logits, or a function of the batch; only
            positions whose label is not ``ignore_index`` count. All count when left out.
        ignore_index: Label of the positions that do not count.
        shift: The loss compares the logits of a token with the label of the next, as Hugging Face does.
        mask: Key or index of the batch's valid positions, or a function of the batch; not shifted.
        targets: Modules whose output are logits; the model's own heads when left out.
        schedule: Factor on ``weight`` over the training.
        layer_weights: Factors on the penalties of single heads, as for ``Regularizer``.
        allow_unused: Accept heads that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints.
    """

    def __init__(
        self,
        weight: float = 0.1,
        *,
        objective: Objective = "maximize",
        bound: float | None = None,
        multi_label: bool = False,
        normalize: bool = True,
        labels: Mask = None,
        ignore_index: int = -100,
        shift: bool = False,
        mask: Mask = None,
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        allow_unused: bool = False,
        name: str = "prediction_entropy",
    ) -> None:
        super().__init__(
            weight, labels=labels, ignore_index=ignore_index, shift=shift, mask=mask, targets=targets,
            schedule=schedule, layer_weights=layer_weights, allow_unused=allow_unused, name=name,
        )  # fmt: skip
        self.loss = PredictionEntropyLoss(
            objective, bound=bound, multi_label=multi_label, normalize=normalize, ignore_index=ignore_index,
            shift=shift,
        )  # fmt: skip
        self.raises_value = objective in ("maximize", "floor")

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity and the direction."""
        loss = self.loss
        own = {
            "objective": loss.objective, "bound": loss.bound, "multi_label": loss.multi_label,
            "normalize": loss.normalize,
        }  # fmt: skip
        return {**own, **super().definition()}
