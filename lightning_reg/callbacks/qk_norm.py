"""QK-norm as a callback: inserted before the optimizer exists, and kept. The mechanism is `lightning_reg.qk_norm`."""

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_reg import capture, qk_norm
from lightning_reg.attention import NOTHING_FOUND, check_heads, find_attentions
from lightning_reg.callbacks.building import BuildHooks, check_before_averaging
from lightning_reg.callbacks.observer import Prepares
from lightning_reg.callbacks.regularizer import describe_targets, plain_targets
from lightning_reg.capture import Targets
from lightning_reg.functional.qk_norm import Norm, check_norm


class QKNorm(Prepares, Callback):
    """Normalises the queries and keys of each head before their dot product: QK-norm.

    Modules ``q_norm`` and ``k_norm`` become children of each attention, before rotary embedding, under the keys of
    timm's ``qk_norm=True``. They exist before the optimizer is built, act in training and in everything after it, and
    stay when the fit ends, because the weights were trained with them. A Trainer with this callback puts them in place
    before it loads a checkpoint; without one call ``lightning_reg.qk_norm.load_qk_norm(model, checkpoint)``, and
    ``remove_qk_norm`` to take them away. What a run has put in place that trained nothing is taken away again. Put it
    before weight averaging. An optimizer built from ``self.parameters()`` decays the gains with the rest, which keeps
    them from growing. ``nn.MultiheadAttention`` must be called with ``need_weights=False``, and breaks the graph of
    compiled code.

    Args:
        norm: ``"rms"`` is RMSNorm as in Qwen3 and Gemma 3, ``"layer"`` LayerNorm as in ViT-22B and timm.
        eps: Added to the mean square or the variance, > 0.
        affine: Learn a gain, 1 at the start, and with ``"layer"`` a bias, 0 at the start, shared by the heads of a
            layer.
        targets: Modules that compute attention, or any of their parents; all attentions when left out.
        heads: Number of query heads, where the model does not say it.
        allow_unused: Accept attentions that do not run in the first step.
    """

    def __init__(
        self,
        *,
        norm: Norm = "rms",
        eps: float = 1e-6,
        affine: bool = True,
        targets: Targets = None,
        heads: int | None = None,
        allow_unused: bool = False,
    ) -> None:
        super().__init__()
        check_norm(norm, eps)
        check_heads(heads)
        self.norm, self.eps, self.affine, self.heads = norm, eps, affine, heads
        self.targets, self.allow_unused = plain_targets(targets), allow_unused
        self._model: nn.Module | None = None
        self._building = BuildHooks()
        self._names: list[str] = []  # attentions that have their norms from this callback
        self._inserted: list[str] = []  # by this run, which has trained nothing yet
        # attentions whose norms have not run yet: their parameters and norms
        self._unchecked: dict[str, tuple[list[nn.Parameter], Any]] = {}

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        plain = {name: getattr(self, name) for name in ("norm", "eps", "affine", "heads")}
        return {**plain, "targets": describe_targets(self.targets)}

    @override
    def prepare(self, model: nn.Module) -> None:
        """Insert. No-op where it is done.

        Raises:
            ValueError: If nothing is found, or an attention cannot have norms; nothing has changed then.
        """
        attentions = find_attentions(model, targets=self.targets, heads=self.heads)
        if not attentions:
            raise ValueError(NOTHING_FOUND.format("QKNorm"))
        self._model = model
        own = {attention.name for attention in attentions}
        new = qk_norm.insert(attentions, self.norm, self.eps, self.affine)
        self._inserted += new
        self._names = [name for name in qk_norm.norms_of(model) if name in own]
        if new:
            shown = ", ".join(new[:3]) + (", ..." if len(new) > 3 else "")
            rank_zero_info(f"QKNorm: {self.norm} norms on queries and keys of {len(new)} attentions ({shown})")

    # --- without a Trainer ---

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Insert; build the optimizer afterwards, its ``parameters()`` then hold the gains."""
        self._inserted = []
        self.prepare(model)

    def detach(self, model: nn.Module) -> None:
        """Take away what trained nothing."""
        self._undo(model)

    def after_step(self, model: nn.Module) -> None:
        """From here on the weights belong to the norms."""
        self._inserted = []

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Insert into what exists, and into the rest once ``setup`` and ``configure_model`` have built it."""
        if stage == "fit":
            check_before_averaging(trainer, self, "norms")
        self._release()
        self._model, self._inserted, self._unchecked = pl_module, [], {}
        self._building.install(pl_module, lambda: self._insert(pl_module))
        self._insert(pl_module)

    def _insert(self, pl_module: pl.LightningModule) -> None:
        try:
            self.prepare(pl_module)
        except ValueError:
            # its module may be built later; the start of the run insists
            if not self._building:
                raise

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that everything is in place: here the model and the optimizers exist."""
        before = len(self._inserted)
        self.prepare(pl_module)
        late = self._inserted[before:]
        if late:
            raise RuntimeError(
                f"{late[0]!r} was created after `configure_model`, too late for QKNorm: the optimizer would not train "
                "its gains. Create it earlier, or call `lightning_reg.qk_norm.apply_qk_norm` on it."
            )
        self._check_trained(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/qk_norm/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self.prepare(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self.prepare(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As in training."""
        self.prepare(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget that a sanity check ran the norms."""
        modules = capture.named_modules(pl_module)
        for name, norms in self._own(pl_module).items():
            self._unchecked[name] = list(modules[name].parameters()), norms
            for norm in norms:
                norm.fired = False

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check, before the first step of what this optimizer trains, that the norms have run."""
        if not self._unchecked:
            return
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        due = [name for name, (own, _) in self._unchecked.items() if any(id(part) in owned for part in own)]
        idle = [name for name in due if not all(norm.fired for norm in self._unchecked.pop(name)[1])]
        if idle and not self.allow_unused:
            raise RuntimeError(
                f"QKNorm: the queries and keys of {', '.join(idle)} did not pass its norms in the first step: the "
                "attention did not run, or takes the weight of its projection instead of calling it. Leave it out with "
                "`targets=`, or set `allow_unused=True` if it runs in some steps only."
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From here on the weights belong to the norms."""
        self._inserted = []

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take away what trained nothing, in weights that no checkpoint brought."""
        self._release()
        if trainer.ckpt_path is None:
            self._undo(pl_module)
        self._inserted = []

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take away what trained nothing: Lightning does not call ``teardown`` after a crash."""
        self.teardown(trainer, pl_module, "fit")

    def _own(self, model: nn.Module) -> dict[str, tuple[qk_norm.HeadNorm, qk_norm.HeadNorm]]:
        return {name: norms for name, norms in qk_norm.norms_of(model).items() if name in self._names}

    def _check_trained(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        for name, norms in self._own(pl_module).items():
            for norm in norms:
                if any(id(parameter) not in trained for parameter in norm.parameters() if parameter.requires_grad):
                    raise RuntimeError(
                        f"No optimizer trains the gains that QKNorm put into {name!r}. Build it in "
                        "`configure_optimizers` from `self.parameters()`, or set `affine=False`."
                    )

    def _undo(self, model: nn.Module) -> None:
        if self._inserted and self._model is model:
            qk_norm.remove_qk_norm(model, self._inserted)
            self._names = [name for name in self._names if name not in self._inserted]
        self._inserted = []

    def _release(self) -> None:
        self._unchecked = {}
        if self._model is not None:
            self._building.remove(self._model)

    # --- checkpoints ---

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint. Lightning asks for it at every hook."""
        return self._generate_state_key(targets=str(describe_targets(self.targets)))

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was inserted, by attention; the gains are in the model's own state."""
        return {"qk_norm": {} if self._model is None else qk_norm.qk_norm_record(self._model, self._names)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check against what the checkpoint was trained with.

        Raises:
            ValueError: If the norms differ.
        """
        for name, entry in state_dict["qk_norm"].items():
            for key in ("norm", "eps", "affine"):
                if entry[key] != getattr(self, key):
                    raise ValueError(
                        f"`{key}` of QKNorm is {getattr(self, key)!r}, but the checkpoint was trained with "
                        f"{entry[key]!r} in {name!r}: set `{key}={entry[key]!r}`, or load only the weights to start a "
                        "new training."
                    )
