"""Substitution of MLP activations as a callback. The mechanism is `lightning_reg.activations`."""

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_reg import activations, capture
from lightning_reg.activations import Activation
from lightning_reg.callbacks.observer import Prepares
from lightning_reg.callbacks.regularizer import describe_targets, plain_targets
from lightning_reg.capture import Targets


class SubstitutesActivations(Prepares, Callback):
    """Part of the callbacks that train a model with other activations than its code has.

    The activations are replaced when training starts, before other callbacks look for them, and stay when it ends,
    because the weights were trained with them. What a run has put in place that trained nothing, because it crashed
    before its first step or only evaluated a model without loading a checkpoint, is put back.
    """

    substitute: Activation | None
    targets: Targets

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._model: nn.Module | None = None
        self._replaced: list[str] = []  # by this run, which has trained nothing yet
        self._loaded = False  # the weights came from a checkpoint
        self._record: Mapping[str, Any] = {}  # of that checkpoint, until it is in place
        self._others: list[SubstitutesActivations] = []

    def prepare(self, model: nn.Module) -> None:
        """Substitute. No-op where it is done."""
        self._model = model
        if self.substitute is not None:
            self._refuse_two(model)
            self._note(activations.substitute_activations(model, self.substitute, targets=self.targets))
        if self._record:
            record, self._record = self._record, {}
            self._note(activations.load_activations(model, record))

    def _refuse_two(self, model: nn.Module) -> None:
        own = set(activations.find_activations(model, targets=self.targets))
        for other in self._others:
            if other.substitute is not None and own & set(activations.find_activations(model, targets=other.targets)):
                raise ValueError(
                    f"{type(self).__name__} and {type(other).__name__} both substitute {sorted(own)[0]!r}: give them "
                    "`targets=` that do not overlap, or `substitute=None` to `ProgressiveSparsity`."
                )

    def _note(self, paths: list[str]) -> None:
        self._replaced += paths
        if paths and self._model is not None:
            new = activations.describe(capture.attribute(self._model, paths[0]))
            shown = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
            rank_zero_info(f"{type(self).__name__}: {new} in place of the activations of {len(paths)} MLPs ({shown})")

    def _undo(self, model: nn.Module) -> None:
        if self._model is model and self._replaced and not self._loaded:
            activations.restore_activations(model, self._replaced)
        self._forget()

    def _forget(self) -> None:
        self._replaced, self._record, self._loaded = [], {}, False

    # --- without a Trainer ---

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Substitute."""
        self.prepare(model)
        getattr(super(), "attach", lambda *_: None)(model, total_steps)

    def detach(self, model: nn.Module) -> None:
        """Put back what trained nothing."""
        getattr(super(), "detach", lambda *_: None)(model)
        self._undo(model)

    def after_step(self, model: nn.Module) -> None:
        """From here on the weights belong to the substitutes."""
        self._replaced = []
        getattr(super(), "after_step", lambda *_: None)(model)

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a run, and substitute where the model exists by now."""
        super().setup(trainer, pl_module, stage)
        self._forget()
        found = [other for other in trainer.callbacks if isinstance(other, SubstitutesActivations)]  # type: ignore[attr-defined]
        self._others = [other for other in found if other is not self]
        with suppress(ValueError):  # `configure_model` may build more; what is wrong then is raised at the start
            self.prepare(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Substitute: here the model exists, however it was built, and the checkpoint is loaded."""
        self.prepare(pl_module)
        super().on_fit_start(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{type(self).__name__}/activation": str(self.substitute)})

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self.prepare(pl_module)
        super().on_validation_start(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self.prepare(pl_module)
        super().on_test_start(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self.prepare(pl_module)
        super().on_predict_start(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From here on the weights belong to the substitutes."""
        self._replaced = []
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back what trained nothing."""
        super().teardown(trainer, pl_module, stage)
        self._undo(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put back what trained nothing."""
        super().on_exception(trainer, pl_module, exception)
        self._undo(pl_module)

    # --- checkpoints ---

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was substituted, with its thresholds."""
        record = {} if self._model is None else activations.activation_record(self._model)
        return {**super().state_dict(), "activations": record}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the substitutes in place, or keep them for when the model is there."""
        super().load_state_dict(state_dict)
        self._record, self._loaded = state_dict.get("activations", {}), True
        if self._model is not None:
            with suppress(ValueError):  # raised at the start, where it is known what is missing
                activations.load_activations(self._model, self._record)


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
