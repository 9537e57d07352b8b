"""sigma-Reparam as a callback: attached before the optimizer exists, updated once per step, merged at the end.

The mechanism is `lightning_reg.reparam`, the formula `lightning_reg.functional.spectral_norm`.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_reg import capture, reparam
from lightning_reg.callbacks.building import (
    BuildHooks,
    check_before_averaging,
    extend_schedules,
    nested_schedulers,
    takes_groups,
)
from lightning_reg.callbacks.regularizer import describe_targets
from lightning_reg.capture import Targets
from lightning_reg.reparam import FusedQKV, Init

# --- optimizers ------------------------------------------------------------------------------------------------------


def _place_gains(trainer: pl.Trainer, layers: list[reparam.Layer], decay: bool) -> None:
    """See to it that every gain is in an optimizer, and in a group without weight decay unless ``decay``."""
    groups = [(optimizer, group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    holder = {id(parameter): place for place in groups for parameter in place[1]["params"]}
    moves: dict[int, tuple[Any, dict[str, Any], list[reparam.Layer]]] = {}
    for layer in layers:
        gain = layer.spectral.gain
        if not gain.requires_grad:
            continue
        place = holder.get(id(gain))
        if place is None:
            place = holder.get(id(layer.original))
            if place is None or not takes_groups(place[0]):
                raise RuntimeError(
                    f"No optimizer trains the gain of {layer.label!r}, and none that takes another parameter group "
                    "holds its weight. Build the optimizer in `configure_optimizers` from `self.parameters()`."
                )
        elif decay or not place[1].get("weight_decay", 0):
            continue
        moves.setdefault(id(place[1]), (*place, []))[2].append(layer)
    for optimizer, group, moved in moves.values():
        _to_own_group(trainer, optimizer, group, moved, decay)


def _to_own_group(
    trainer: pl.Trainer, optimizer: Any, group: dict[str, Any], moved: list[reparam.Layer], decay: bool
) -> None:
    gains = {id(layer.spectral.gain): layer for layer in moved}
    kept = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in gains]
    if not kept:
        group["weight_decay"] = 0.0
        return
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if "weight_decay" in own and not decay:
        own["weight_decay"] = 0.0
    names = group.get("param_names")
    group["params"] = [group["params"][index] for index in kept]
    parameters: list[Any] = [layer.spectral.gain for layer in moved]
    if names is not None:
        group["param_names"] = [names[index] for index in kept]
        parameters = [(f"{layer.key}.gain", layer.spectral.gain) for layer in moved]
    index = next(i for i, candidate in enumerate(optimizer.param_groups) if candidate is group)
    optimizer.add_param_group({**own, "params": parameters})
    for config in trainer.lr_scheduler_configs:
        for scheduler in nested_schedulers(config.scheduler):
            if getattr(scheduler, "optimizer", optimizer) is optimizer:
                extend_schedules(scheduler, index, len(optimizer.param_groups) - 1)


def _leave_out_of_broadcasts(trainer: pl.Trainer, layers: list[reparam.Layer]) -> None:
    """DDP sends buffers at each forward; after its start u and v are the same in all processes, as the weights are."""
    wrapper = trainer.strategy.model
    if isinstance(wrapper, DistributedDataParallel):
        own = {id(vector) for layer in layers for vector in (layer.spectral.u, layer.spectral.v)}
        named = wrapper.module.named_buffers()
        wrapper.parameters_to_ignore |= {name for name, buffer in named if id(buffer) in own}
        wrapper.modules_buffers = [buffer for buffer in wrapper.modules_buffers if id(buffer) not in own]


# --- the callback ----------------------------------------------------------------------------------------------------


class SigmaReparam(Callback):
    """Trains ``(gain / sigma(W)) W`` in place of each weight W: sigma-Reparam (Zhai et al. 2023).

    Checkpoints hold plain ``weight`` keys and load without this library; raw state beside them makes a resumed run
    equal an uninterrupted one. After ``fit`` the model is merged, so a checkpoint that is saved *after* the fit
    continues the function, not the run. Sharded training (``ModelParallelStrategy``) keeps live keys in its checkpoints
    and stays reparametrized after the fit: consolidate and ``fold_checkpoint``. Put it before weight averaging.

    Args:
        targets: Modules that own the weights: a regular expression that matches a whole name or a dotted ending of it,
            a module type, a predicate on (name, module), or a list of these. Left out: every Linear, convolution,
            GPT-2 Conv1D and MultiheadAttention, except weights that are tied to an embedding.
        init: Start of the gain: ``"preserve"`` takes sigma(W), so the model computes what it did; ``"one"`` is the
            paper.
        fused_qkv: ``"split"`` gives query, key and value of a fused projection a gain each, ``"fused"`` one to all.
        decay_gain: Leave the gain in the weight decay of its optimizer; it shrinks the function.
        name: Name in logs and checkpoints; two instances in one Trainer need two names and disjoint targets.

    Logs ``reg/<name>/max``, the largest spectral norm of the weights in use.
    """

    def __init__(
        self,
        *,
        targets: Targets = None,
        init: Init = "preserve",
        fused_qkv: FusedQKV = "split",
        decay_gain: bool = False,
        name: str = "spectral_norm",
    ) -> None:
        super().__init__()
        reparam.check_choices(init, fused_qkv)
        if not name:
            raise ValueError("`name` must not be empty; it names the logged values and the state in checkpoints.")
        self.targets, self.init, self.fused_qkv, self.decay_gain, self.name = targets, init, fused_qkv, decay_gain, name
        self._model: pl.LightningModule | None = None
        self._sharded = False
        self._building = BuildHooks()
        self._updated_step: int | None = None
        self._pending: dict[str, Any] | None = None
        self._updates = reparam.Updates([])
        self._loaded_groups: list[list[int]] = []

    def spectral_norms(self) -> dict[str, Tensor]:
        """Spectral norm of the weights in use, ``|gain|`` (parts,), by layer; empty outside of training."""
        layers = self._updates.layers or self._own_layers()
        return {layer.label: reparam.whole_tensor(layer.spectral.gain.detach()).abs() for layer in layers}

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        names = ("init", "fused_qkv", "decay_gain")
        return {"targets": describe_targets(self.targets), **{name: getattr(self, name) for name in names}}

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint. Lightning asks for it at every hook."""
        return self._generate_state_key(name=self.name)

    # --- life ---

    # --- without a Trainer ---

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Reparametrize ``model``; build the optimizer afterwards, its ``parameters()`` then hold the gains."""
        reparam.apply_sigma_reparam(model, targets=self.targets, init=self.init, fused_qkv=self.fused_qkv)
        self._updates = reparam.Updates(reparam.unique_layers(reparam.find_layers(model)))

    def detach(self, model: nn.Module) -> None:
        """Merge ``model`` back; no-op when nothing is attached."""
        self._updates = reparam.Updates([])
        reparam.merge_sigma_reparam(model)

    def after_step(self, model: nn.Module) -> None:
        """One power iteration, after an optimizer step."""
        self._updates.step()

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Attach to what exists, and to the rest once ``setup`` and ``configure_model`` have built it."""
        if stage != "fit":
            return
        self._check_trainer(trainer)
        self._release()
        self._model, self._updated_step, self._pending, self._loaded_groups = pl_module, None, None, []
        self._sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        self._building.install(pl_module, lambda: self._attach(pl_module, lenient=True))
        self._attach(pl_module, lenient=bool(self._building))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that everything is in place: here the model, the optimizers and the loaded checkpoint exist."""
        self._check_attached(pl_module)
        self._restore_pending(trainer, pl_module)
        _place_gains(trainer, self._own_layers(), self.decay_gain)
        self._check_optimizers(trainer)
        _leave_out_of_broadcasts(trainer, self._own_layers())
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the restored step; the learning rate finder loads a checkpoint after ``on_fit_start``."""
        self._restore_pending(trainer, pl_module)
        self._updates = reparam.Updates(self._own_layers())
        if self._updated_step is None:
            self._updated_step = trainer.global_step

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let u and v follow the weights after an optimizer step, and log."""
        if trainer.global_step != self._updated_step:
            self._updates.step()
            self._updated_step = trainer.global_step
        if trainer._logger_connector.should_update_logs and not trainer.barebones:
            largest = torch.cat(list(self.spectral_norms().values())).max()
            pl_module.log(f"reg/{self.name}/max", largest, batch_size=1, rank_zero_only=False)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Merge: the model is plain again."""
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Merge: Lightning does not call ``teardown`` after a crash."""
        self._release()

    def _own_layers(self) -> list[reparam.Layer]:
        return [] if self._model is None else reparam.unique_layers(reparam.find_layers(self._model, self.name))

    def _check_trainer(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise RuntimeError(
                f"SigmaReparam does not work with {type(trainer.strategy).__name__}, which flattens the parameters. "
                "Use `ModelParallelStrategy` (FSDP2) or `DDPStrategy`."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.precision in ("bf16-true", "16-true"):
            raise RuntimeError(
                "SigmaReparam keeps its gains in float32, but FSDP2 takes parameters of one dtype only, here those of "
                f"`precision={trainer.precision!r}`. Use `precision='bf16-mixed'`, or `DDPStrategy`."
            )
        check_before_averaging(trainer, self, "gains")

    def _attach(self, pl_module: pl.LightningModule, lenient: bool) -> None:
        reparam.attach(pl_module, self.targets, self.init, self.fused_qkv, lenient, self.name)
        for layer in reparam.find_layers(pl_module, ""):
            layer.spectral.manager, layer.spectral.adopted = self.name, True
        for layer in reparam.find_layers(pl_module, self.name):
            layer.spectral.plain_keys = not self._sharded

    def _check_attached(self, pl_module: pl.LightningModule) -> None:
        if not self._own_layers() and self.targets is None:
            raise ValueError(reparam.NOTHING_FOUND)
        modules = capture.named_modules(pl_module)
        for name in reparam.select_owners(self.targets, modules, lenient=False) if self.targets is not None else ():
            if not reparam.live_weights(modules[name]):
                raise RuntimeError(
                    f"{name!r} was created after `configure_model`, too late for SigmaReparam. Create it earlier, or "
                    "call `lightning_reg.callbacks.apply_sigma_reparam` on it."
                )

    def _check_optimizers(self, trainer: pl.Trainer) -> None:
        current = [_group_sizes(optimizer.state_dict()) for optimizer in trainer.optimizers]
        if self._loaded_groups and self._loaded_groups != current:
            raise ValueError(
                f"The checkpoint was trained without {self.state_key}, so the state of its optimizer has no gains. "
                "Load its weights with `load_from_checkpoint` and fit without `ckpt_path`."
            )

    def _release(self) -> None:
        model, self._model, self._updates = self._model, None, reparam.Updates([])
        if model is None:
            return
        self._building.remove(model)
        layers = reparam.find_layers(model, self.name)
        if not any(reparam.is_sharded(layer.original) for layer in layers):
            reparam.merge_layers([layer for layer in layers if not layer.spectral.adopted])
        for layer in reparam.find_layers(model, self.name):
            layer.spectral.manager, layer.spectral.adopted = "", False

    # --- checkpoints ---

    @override
    def state_dict(self) -> dict[str, Any]:
        """The step at which u and v were last updated."""
        return {"updated_step": self._updated_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counterpart of ``state_dict``."""
        self._updated_step = state_dict["updated_step"]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the raw tensors beside the plain weights, also those of averaged models."""
        if self._sharded or not self._own_layers():
            return
        raw = {key: _raw_state(model, self.name) for key, model in _copies(trainer, pl_module).items()}
        checkpoint.setdefault("lightning_reg", {})[self.state_key] = {"decay_gain": self.decay_gain, "models": raw}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check the raw tensors; they are put back in ``on_fit_start``, after all callbacks have loaded theirs."""
        if self._model is None or self._sharded:
            return
        stash = checkpoint.get("lightning_reg", {}).get(self.state_key)
        if stash is None:
            rank_zero_info(
                f"The checkpoint holds no state of {self.state_key}: the training continues from the function of its "
                "weights, with fresh gains."
            )
            self._loaded_groups = [_group_sizes(state) for state in checkpoint.get("optimizer_states", [])]
            return
        self._check_stash(stash, pl_module)
        self._pending = stash

    def _check_stash(self, stash: Mapping[str, Any], pl_module: pl.LightningModule) -> None:
        remedy = "as in the training that wrote the checkpoint, or load only the weights to start a new one."
        if stash["decay_gain"] != self.decay_gain:
            raise ValueError(f"`decay_gain` is {self.decay_gain}, but the checkpoint has the opposite: set it {remedy}")
        saved, current = stash["models"][""], _raw_state(pl_module, self.name)
        for key in [*saved, *current]:
            if key not in current or key not in saved:
                where = "in the checkpoint, not in the model" if key in saved else "in the model, not in the checkpoint"
                raise ValueError(f"{key!r} is reparametrized {where}: set `targets` of SigmaReparam {remedy}")
            for name, tensor in current[key].items():
                if (shape := saved[key][name].shape) != tensor.shape:
                    argument = "`fused_qkv` of SigmaReparam" if name == "gain" else "the size of the layer"
                    raise ValueError(
                        f"`{name}` of {key!r} has shape {tuple(tensor.shape)}, but {tuple(shape)} in the checkpoint: "
                        f"set {argument} {remedy}"
                    )

    @torch.no_grad()
    def _restore_pending(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stash, self._pending = self._pending, None
        if stash is None:
            return
        for key, model in _copies(trainer, pl_module).items():
            saved = stash["models"].get(key, {})
            for layer in reparam.unique_layers(reparam.find_layers(model, self.name)):
                for name, tensor in layer.state().items():
                    if layer.key in saved:
                        tensor.copy_(saved[layer.key][name])


def _callbacks(trainer: Any) -> list[Callback]:
    return trainer.callbacks


def _copies(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
    """The model, under an empty key, and the averaged models of other callbacks."""
    averaged = {callback.state_key: getattr(callback, "_average_model", None) for callback in _callbacks(trainer)}
    return {"": pl_module, **{key: model for key, model in averaged.items() if isinstance(model, nn.Module)}}


def _group_sizes(optimizer_state: dict[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer_state["param_groups"]]


def _raw_state(model: nn.Module, manager: str) -> dict[str, dict[str, Tensor]]:
    return {layer.key: layer.state() for layer in reparam.unique_layers(reparam.find_layers(model, manager))}
