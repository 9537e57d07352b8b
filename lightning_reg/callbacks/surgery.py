"""What callbacks share that train another model than its code describes: other activations, other attention."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.callbacks.observer import Prepares
from lightning_reg.rewriting import Rewrite, release_unused


class Surgery(Prepares, Callback):
    """Part of the callbacks that change what a model computes, in training and evaluation.

    The change is made when training starts, before other callbacks look for their sites, and stays when it ends,
    because the weights were trained with it. What a run has changed that trained nothing, because it crashed before its
    first step or only evaluated a model without loading a checkpoint, is put back.
    """

    record_key = ""  # of the change in the callback's state

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._model: nn.Module | None = None
        self._changed: list[str] = []  # by this run, which has trained nothing yet
        self._loaded = False  # the weights came from a checkpoint
        self._record: Mapping[str, Any] = {}  # of that checkpoint, until it is in place
        self._others: list[Any] = []  # callbacks of the same base in the Trainer

    # --- to be defined by a method ---

    def operate(self, model: nn.Module) -> list[str]:
        """Change the model; names of what was changed now. No-op where it is done."""
        raise NotImplementedError

    def undo(self, model: nn.Module, names: list[str]) -> None:
        """Counterpart of ``operate``."""
        raise NotImplementedError

    def record(self, model: nn.Module) -> Mapping[str, Any]:
        """What is changed, as plain values."""
        raise NotImplementedError

    def repeat(self, model: nn.Module, record: Mapping[str, Any]) -> list[str]:
        """Change the model as a record says; names of what was changed now."""
        raise NotImplementedError

    def describe(self, name: str) -> str:
        """What was done to one of the names."""
        return "changed"

    # --- life ---

    def prepare(self, model: nn.Module) -> None:
        """Change the model. No-op where it is done."""
        self._model = model
        self._note(self.operate(model))
        if self._record:
            record, self._record = self._record, {}
            self._note(self.repeat(model, record))

    def _note(self, names: list[str]) -> None:
        self._changed += names
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            rank_zero_info(f"{type(self).__name__}: {self.describe(names[0])} at {len(names)} sites ({shown})")

    def _undo(self, model: nn.Module) -> None:
        if self._model is model and self._changed and not self._loaded:
            self.undo(model, self._changed)
        self._forget()

    def _forget(self) -> None:
        self._changed, self._record, self._loaded = [], {}, False

    # --- without a Trainer ---

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Change the model."""
        self.prepare(model)
        getattr(super(), "attach", lambda *_: None)(model, total_steps)

    def detach(self, model: nn.Module) -> None:
        """Put back what trained nothing."""
        getattr(super(), "detach", lambda *_: None)(model)
        self._undo(model)

    def after_step(self, model: nn.Module) -> None:
        """From here on the weights belong to the change."""
        self._changed = []
        getattr(super(), "after_step", lambda *_: None)(model)

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a run, and change what exists by now."""
        super().setup(trainer, pl_module, stage)
        release_unused()
        self._forget()
        found = [other for other in trainer.callbacks if isinstance(other, Surgery)]  # type: ignore[attr-defined]
        self._others = [other for other in found if other is not self]
        with suppress(ValueError):  # `configure_model` may build more; what is wrong then is raised at the start
            self.prepare(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change the model: here it exists, however it was built, and the checkpoint is loaded."""
        self.prepare(pl_module)
        super().on_fit_start(trainer, pl_module)

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
        """From here on the weights belong to the change."""
        self._changed = []
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back what trained nothing."""
        super().teardown(trainer, pl_module, stage)
        self._undo(pl_module)
        release_unused()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put back what trained nothing."""
        super().on_exception(trainer, pl_module, exception)
        self._undo(pl_module)

    # --- checkpoints ---

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state of the base, and what is changed."""
        record = {} if self._model is None else self.record(self._model)
        return {**super().state_dict(), self.record_key: record}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the change, or keep it for when the model is there."""
        super().load_state_dict(state_dict)
        self._record, self._loaded = state_dict.get(self.record_key, {}), True
        if self._model is not None:
            with suppress(ValueError):  # raised at the start, where it is known what is missing
                self.repeat(self._model, self._record)


def collect_unreached(rewrite: Rewrite) -> None:
    """Before the first batch: begin to note which attention a rewrite reaches."""
    rewrite.fired = False
    capture.unrewritten = []


def check_reached(rewrite: Rewrite, callback: str, everything: bool) -> None:
    """After the first batch: raise a RuntimeError if a rewrite reached none, or, with ``everything``, missed some."""
    missed, capture.unrewritten = capture.unrewritten or [], None
    if not rewrite.fired:
        raise RuntimeError(
            f"{callback} reached no attention in the first training step. It sees `F.scaled_dot_product_attention` and "
            "softmax: with Hugging Face use `attn_implementation='sdpa'` or `'eager'`, and name the module in whose "
            "forward attention is computed with `targets=`."
        )
    if missed and everything:
        raise RuntimeError(
            f"{callback} did not reach the attention computed in {', '.join(dict.fromkeys(missed))}. Name the modules "
            "that compute attention with `targets=`; those it should not reach may be left out of them."
        )


def stop_collecting() -> None:
    """After a crash: no-op when nothing is collected."""
    capture.unrewritten = None
