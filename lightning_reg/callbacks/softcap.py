"""Soft-capped attention as a callback. The formula is `functional.softcap`, the mechanism `lightning_reg.rewriting`."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture, rewriting
from lightning_reg.callbacks.regularizer import describe_targets, plain_targets
from lightning_reg.callbacks.surgery import Surgery, check_reached, collect_unreached
from lightning_reg.capture import Targets
from lightning_reg.functional.softcap import check_cap, softcap, softcapped_attention

KIND = "softcap"


class SoftCapRewrite(rewriting.Rewrite):
    """``cap * tanh(scores / cap)`` before masking and softmax."""

    kind = KIND
    order = 2  # after what changes queries and keys

    def __init__(self, cap: float) -> None:
        self.cap = check_cap(cap)

    @override
    def attention(
        self, module: nn.Module, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        **arguments: Any,
    ) -> Tensor:  # fmt: skip
        """Attention with its scores in memory: ``attend`` knows no cap."""
        return softcapped_attention(query, key, value, cap=self.cap, softmax=capture.watched_softmax, **arguments)

    @override
    def scores(self, module: nn.Module, scores: Tensor, dim: int) -> Tensor:
        """Capped scores; hidden ones stay hidden."""
        return softcap(scores, self.cap)

    @override
    def arguments(self) -> dict[str, Any]:
        """The cap."""
        return {"cap": self.cap}


class SoftCap(Surgery):
    """Trains a model with soft-capped attention scores, as Gemma 2 does: ``cap * tanh(scores / cap)``.

    In every module that computes attention by ``F.scaled_dot_product_attention`` or softmax, in training and
    evaluation. The cap stays when the fit ends, because the weights were trained with it: ``remove_softcap(model)``
    takes it away. Checkpoints keep their plain keys and hold a record of it: a Trainer with this callback puts it in
    place before it validates, tests or predicts, and ``load_softcap(model, checkpoint)`` does so without one. Scores
    are held in memory, (batch, heads, queries, keys): torch's fused attention knows no cap.

    Args:
        cap: Bound of the scores, > 0.
        targets: The modules in whose forward the attention is computed, or any of their parents; all when left out.
    """

    record_key = KIND

    def __init__(self, cap: float = 50.0, *, targets: Targets = None) -> None:
        super().__init__()
        self.cap, self.targets = check_cap(cap), plain_targets(targets)
        self._rewrite = SoftCapRewrite(cap)
        self._checked = False

    @property
    def enabled(self) -> bool:
        """Whether the cap acts; a ``Guard`` switches it."""
        return self._rewrite.active

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._checked &= self._rewrite.active or not enabled  # switched on, its first batch is checked
        self._rewrite.active = enabled

    @override
    def operate(self, model: nn.Module) -> list[str]:
        """Cap attention."""
        return rewriting.install_everywhere(model, self._rewrite, self.targets)

    @override
    def undo(self, model: nn.Module, names: list[str]) -> None:
        """Take the cap away."""
        modules = capture.named_modules(model)
        for name in names:
            rewriting.remove(modules[name], KIND)

    @override
    def record(self, model: nn.Module) -> Mapping[str, Any]:
        """Modules and caps; none while the cap does not act."""
        return rewriting.record(model, KIND) if self.enabled else {}

    @override
    def repeat(self, model: nn.Module, record: Mapping[str, Any]) -> list[str]:
        """Cap as a record says.

        Raises:
            ValueError: If the checkpoint was trained with another cap.
        """
        for saved in {entry["cap"] for entry in record.values()} - {self.cap}:
            raise ValueError(
                f"`cap` of SoftCap is {self.cap:g}, but the checkpoint was trained with {saved:g}: set "
                f"`cap={saved:g}`, or load only the weights to start a new training."
            )
        present = rewriting.find(model, KIND)
        return rewriting.load(model, KIND, {n: entry for n, entry in record.items() if n not in present}, self._rewrite)

    @override
    def describe(self, name: str) -> str:
        """The cap."""
        return f"attention scores capped at {self.cap:g}"

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint."""
        return self._generate_state_key(targets=str(describe_targets(self.targets)))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cap, and log the argument."""
        super().on_fit_start(trainer, pl_module)
        self._checked = False
        for logger in trainer.loggers:
            logger.log_hyperparams({"reg/softcap/cap": self.cap})

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch, in the first batch, what attention is reached."""
        if not self._checked:
            collect_unreached(self._rewrite, "SoftCap", pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the first batch was reached."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._checked:
            self._checked = True
            check_reached(self._rewrite, "SoftCap", everything=self.targets is None)


def load_softcap(model: nn.Module, checkpoint: Mapping[str, Any]) -> list[str]:
    """Cap a model's attention as a checkpoint's was; returns the names of the modules.

    Args:
        model: The LightningModule, or the module whose names the checkpoint has.
        checkpoint: What ``torch.load`` returned.

    Raises:
        ValueError: If the checkpoint holds no record of a cap, or the model lacks a module.
    """
    records = [state[KIND] for state in checkpoint.get("callbacks", {}).values() if KIND in state]
    if not records:
        raise ValueError(
            "the checkpoint holds no record of `SoftCap`; it was trained without, or saved without callbacks."
        )
    return [name for record in records for name in rewriting.load(model, KIND, record)]


def remove_softcap(model: nn.Module) -> list[str]:
    """Take the cap away; returns the names of the modules that had one. No-op where there is none."""
    return rewriting.remove_all(model, KIND)
