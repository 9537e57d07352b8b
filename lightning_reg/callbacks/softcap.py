"""Soft-capped attention as a callback. The formula is `functional.softcap`, the mechanism `lightning_reg.rewriting`."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture, rewriting
from lightning_reg.callbacks.regularizer import describe_targets, plain_targets
from lightning_reg.callbacks.surgery import Surgery, check_reached, collect_unreached, stop_collecting
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
    are held in memory, (batch, heads, queries, keys): torch's fused attention knows no cap. Whatever reads logits sees
    them capped: ``QKClip`` and ``AttentionLogitRegularizer`` above the cap are refused, and monitors and guards never
    see more. With eager attention an additive bias is capped with the scores, with the fused one it is added to them.

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

    def renew(self) -> None:
        """Let go of the models trained so far: from here on `enabled` is about the next one."""
        self._rewrite = SoftCapRewrite(self.cap)

    @override
    def operate(self, model: nn.Module) -> list[str]:
        """Cap attention.

        Raises:
            ValueError: If it has another cap, of another callback or of an earlier training.
        """
        modules = capture.named_modules(model)
        others = [other._rewrite for other in self._others if isinstance(other, SoftCap)]
        for name in rewriting.select_modules(self.targets, model):
            present = rewriting.rewrites_of(modules[name]).get(KIND)
            if present in others:
                raise ValueError(
                    f"two SoftCaps act on the attention of {name!r}: give them `targets=` that do not overlap."
                )
            if isinstance(present, SoftCapRewrite) and present.cap != self.cap and present.active:
                raise ValueError(
                    f"`cap` of SoftCap is {self.cap:g}, but {name!r} was trained with {present.cap:g}: set "
                    f"`cap={present.cap:g}`, or call `remove_softcap(model)` to start anew."
                )
        return rewriting.install_everywhere(model, self._rewrite, self.targets)

    @override
    def undo(self, model: nn.Module, names: list[str]) -> None:
        """Take the cap away."""
        for name, module in rewriting.find(model, KIND).items():
            if name in names:
                rewriting.remove(module, KIND)

    @override
    def record(self, model: nn.Module) -> Mapping[str, Any]:
        """Modules and caps; none while the cap does not act."""
        own = self._own(model) if self.enabled else {}
        return {name: entry for name, entry in rewriting.record(model, KIND).items() if name in own}

    def _own(self, model: nn.Module) -> dict[str, nn.Module]:
        found = rewriting.find(model, KIND)
        return {n: module for n, module in found.items() if rewriting.rewrites_of(module)[KIND] is self._rewrite}

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
        own = self._own(model)
        return rewriting.load(model, KIND, {n: entry for n, entry in record.items() if n not in own}, self._rewrite)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a run; an earlier model keeps the cap it was trained with."""
        if self._model is not None and self._model is not pl_module:
            active = self.enabled
            self.renew()
            self.enabled = active
        super().setup(trainer, pl_module, stage)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back what trained nothing, and what has never acted."""
        stop_collecting()
        super().teardown(trainer, pl_module, stage)
        if not self.enabled:
            self.undo(pl_module, list(self._own(pl_module)))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put back what trained nothing."""
        stop_collecting()
        super().on_exception(trainer, pl_module, exception)

    @override
    def describe(self, name: str) -> str:
        """The cap."""
        return f"attention scores {'capped' if self.enabled else 'to be capped when it acts,'} at {self.cap:g},"

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
            collect_unreached(self._rewrite)

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


def refuse_capped(model: nn.Module, limit: float, what: str) -> None:
    """Raise a ValueError if attention is capped at or below a limit that logits are to be held under."""
    rewrites = [rewriting.rewrites_of(module)[KIND] for module in rewriting.find(model, KIND).values()]
    caps = [rewrite.cap for rewrite in rewrites if isinstance(rewrite, SoftCapRewrite) and rewrite.active]
    if caps and min(caps) <= limit:
        raise ValueError(
            f"{what} acts above {limit:g}, but a SoftCap of {min(caps):g} lets no attention logit come so far: it "
            "would do nothing. Leave one of the two out, or set it below the cap."
        )
