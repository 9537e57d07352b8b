"""Chunk density (BlockFFN) as a callback: which MLPs, when, how strong. The penalty is `losses.chunk_density`."""

from typing import Any

from lightning_reg.callbacks.observer import Mask
from lightning_reg.callbacks.regularizer import LayerWeights, Role, SequenceRegularizer
from lightning_reg.capture import Targets
from lightning_reg.functional.chunk_density import Probability
from lightning_reg.losses import ChunkDensityLoss
from lightning_reg.schedules import Schedule


class ChunkDensityRegularizer(SequenceRegularizer):
    """Let consecutive tokens share the neurons of an MLP they switch on, the chunk sparsity of BlockFFN.

    The penalty is the mean over sites of the mean over chunks and neurons of the probability that at least one token of
    the chunk switches the neuron on, computed from the *input* of each MLP's down-projection.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        chunk: Valid tokens in a chunk; chunks begin with each document.
        probability: ``"density"`` counts an activation softly; ``"share"`` is its share of the token, as published.
        epsilon: Softness of the density; it decides what counts as on.
        relative: Scale ``epsilon`` by the mean square of the activations.
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
        chunk: int = 64,
        probability: Probability = "density",
        epsilon: float = 1e-7,
        relative: bool = False,
        role: Role = "mlp_hidden",
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "chunk_density",
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
        self.loss = ChunkDensityLoss(chunk, probability=probability, epsilon=epsilon, relative=relative)

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity."""
        names = ("chunk", "probability", "epsilon", "relative")
        return {**{name: getattr(self.loss, name) for name in names}, "role": self.role}
