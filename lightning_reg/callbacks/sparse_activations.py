"""Substitution of MLP activations as a callback. The mechanism is `lightning_reg.activations`."""

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from typing_extensions import override

from lightning_reg import activations
from lightning_reg.activations import Activation
from lightning_reg.callbacks.regularizer import plain_targets
from lightning_reg.capture import Targets


class SubstitutesActivations(Callback):
    """Part of the callbacks that train a model with other activations than its code has.

    The activations are replaced as soon as the model exists, so before other callbacks look for them, and stay when
    training ends, because the weights were trained with them. A crash before the first step puts the old ones back.
    """

    substitute: Activation | None
    targets: Targets
    _substituted: nn.Module | None = None  # the model
    _trained = False
    _record: Mapping[str, Any] = MappingProxyType({})  # from a checkpoint

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Substitute. No-op where it is done."""
        self._substitute(model)
        getattr(super(), "attach", lambda *_: None)(model, total_steps)

    def _substitute(self, model: nn.Module) -> None:
        if self._substituted is not model:
            self._substituted, self._trained = model, False
        if self.substitute is not None:
            activations.substitute_activations(model, self.substitute, targets=self.targets)
        if self._record:
            record, self._record = self._record, {}
            activations.load_activations(model, record)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Substitute where the model exists by now."""
        super().setup(trainer, pl_module, stage)
        with suppress(ValueError):  # `configure_model` may build more; what is wrong then is raised at the start
            self._substitute(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Substitute: here the model exists, however it was built, and the checkpoint is loaded."""
        self._substitute(pl_module)
        super().on_fit_start(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_hyperparams({"reg/activation": str(self.substitute)})

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self._substitute(pl_module)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self._substitute(pl_module)
        super().on_test_start(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self._substitute(pl_module)
        super().on_predict_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From here on the weights belong to the substitutes."""
        self._trained = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave an untrained model as it was."""
        super().on_exception(trainer, pl_module, exception)
        if self._substituted is pl_module and self.substitute is not None and not self._trained:
            activations.restore_activations(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was substituted, with its thresholds."""
        record = {} if self._substituted is None else activations.activation_record(self._substituted)
        return {**super().state_dict(), "activations": record}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the substitutes for when the model is there."""
        super().load_state_dict(state_dict)
        self._record = state_dict.get("activations", {})


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

    def detach(self, model: nn.Module) -> None:
        """The substitutes stay: the weights were trained with them."""

    def after_step(self, model: nn.Module) -> None:
        """Called after an optimizer step of a hand-written loop."""

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint."""
        return self._generate_state_key(targets=str(self.targets))
