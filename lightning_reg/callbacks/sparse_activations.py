"""Substitution of MLP activations as a callback. The mechanism is `lightning_reg.activations`."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_reg import activations, capture
from lightning_reg.activations import Activation
from lightning_reg.callbacks.regularizer import describe_targets, plain_targets
from lightning_reg.callbacks.surgery import Surgery
from lightning_reg.capture import Targets


class SubstitutesActivations(Surgery):
    """Part of the callbacks that train a model with other activations than its code has."""

    substitute: Activation | None
    targets: Targets
    record_key = "activations"

    @override
    def operate(self, model: nn.Module) -> list[str]:
        """Substitute."""
        if self.substitute is None:
            return []
        self._refuse_two(model)
        return activations.substitute_activations(model, self.substitute, targets=self.targets)

    @override
    def undo(self, model: nn.Module, names: list[str]) -> None:
        """Put the old activations back."""
        activations.restore_activations(model, names)

    @override
    def record(self, model: nn.Module) -> Mapping[str, Any]:
        """The substitutes, with their thresholds."""
        return activations.activation_record(model)

    @override
    def repeat(self, model: nn.Module, record: Mapping[str, Any]) -> list[str]:
        """Substitute as a record says."""
        return activations.load_activations(model, record)

    @override
    def describe(self, name: str) -> str:
        """The substitute at a path."""
        assert self._model is not None
        return f"{activations.describe(capture.attribute(self._model, name))} in place of the MLP's activation"

    def _refuse_two(self, model: nn.Module) -> None:
        own = set(activations.find_activations(model, targets=self.targets))
        for other in self._others:
            if not isinstance(other, SubstitutesActivations) or other.substitute is None:
                continue
            if own & set(activations.find_activations(model, targets=other.targets)):
                raise ValueError(
                    f"{type(self).__name__} and {type(other).__name__} both substitute {sorted(own)[0]!r}: give them "
                    "`targets=` that do not overlap, or `substitute=None` to `ProgressiveSparsity`."
                )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Substitute, and log by what."""
        super().on_fit_start(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{type(self).__name__}/activation": str(self.substitute)})


class ActivationSubstitution(SubstitutesActivations):
    """Trains a model with other MLP activations than its code has, for instance ReLU instead of GELU.

    The substitutes stay when the fit ends, because the weights were trained with them;
    ``lightning_reg.activations.restore_activations`` puts the old ones back, ``fold_activations`` leaves plain torch
    modules. Checkpoints keep their plain keys and hold a record of the substitutes: a Trainer with this callback puts
    them in place before it validates, tests or predicts, and ``load_activations(model, checkpoint)`` does so without
    one. ``save_pretrained`` of Hugging Face writes the old activation unless the model was folded.

    Args:
        activation: ``"relu"``, ``"relu2"``, ``"shifted_relu"``, ``"drelu"``, ``"fatrelu"``, ``"topk"``,
            ``"statistical_topk"``, or a module, of which each MLP gets a copy.
        targets: Down-projections of the MLPs; all MLPs when left out.
    """

    def __init__(self, activation: Activation = "relu", *, targets: Targets = None) -> None:
        super().__init__()
        activations.make_activation(activation)
        self.substitute, self.targets = activation, plain_targets(targets)
        self._trained_with: str | None = None

    @override
    def prepare(self, model: nn.Module) -> None:
        """Substitute.

        Raises:
            ValueError: If the checkpoint was trained with another activation.
        """
        saved, self._trained_with = self._trained_with, None
        if saved is not None and saved != str(self.substitute):
            raise ValueError(
                f"`activation` of ActivationSubstitution is {str(self.substitute)!r}, but the checkpoint was trained "
                f"with {saved!r}: set `activation={saved!r}`, or load only the weights to start a new training."
            )
        super().prepare(model)

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint."""
        return self._generate_state_key(targets=str(describe_targets(self.targets)))

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was substituted, by what."""
        return {**super().state_dict(), "activation": str(self.substitute)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the name for the check at the start."""
        super().load_state_dict(state_dict)
        self._trained_with = state_dict.get("activation")
