"""What every penalty callback shares: when it is attached, how strong it is, what it logs. No formula."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.callbacks.control import Control
from lightning_reg.callbacks.observer import Mask, Observer, Prepares
from lightning_reg.capture import Targets
from lightning_reg.engine import Engine
from lightning_reg.schedules import Schedule, TargetController

if TYPE_CHECKING:
    from lightning_reg.engine import Tap

Role = Literal["mlp_hidden", "mlp_pre_activation"]
LayerWeights = Mapping[str, float] | Sequence[float] | Callable[[str], float] | None


class Regularizer(Observer, Callback):
    """Base of the penalty callbacks.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        targets: Modules to regularize: a regular expression that matches a whole name or a dotted ending of it, a
            module type, a predicate on (name, module), or a list of these. Found automatically when left out.
        schedule: Factor on ``weight`` over the training, constant when left out.
        layer_weights: Factors on the penalties of single layers, >= 0: by a regular expression for a layer or what is
            around it, as in ``targets`` (the last that matches counts, 1 where none does), one for each block
            (``[1.0, 0.5, 0.0]``, by the number that differs between the layers' names), or a function of the name. The
            mean over layers keeps its denominator.
        mask: Where the batch keeps its valid tokens: a key or index of the batch, or a function of the batch; a boolean
            (or 0/1) tensor (batch, tokens), True = valid.
        allow_unused: Accept targets that do not run, or have no gradient, in the first step.
        name: Name in logs and checkpoints; two instances in one Trainer need two names.
    """

    penalizes = True

    def __init__(
        self,
        weight: float,
        *,
        targets: Targets = None,
        schedule: Schedule | None = None,
        layer_weights: LayerWeights = None,
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"`weight` must be a finite number >= 0, got {weight!r}. Use `objective` for a direction.")
        if schedule is not None and (isinstance(schedule, type) or not callable(schedule)):
            given = f"the class {schedule.__name__}" if isinstance(schedule, type) else type(schedule).__name__
            raise TypeError(f"`schedule` must be a lightning_reg.schedules.Schedule, got {given}; make an instance.")
        self.weight, self.schedule = float(weight), schedule
        self.targets = plain_targets(targets)
        self.layer_weights = check_layer_weights(layer_weights)
        self._factors: dict[str, float] = {}  # by site
        self.enabled = True  # a `Guard` switches it
        self.mask, self.allow_unused, self.name = mask, allow_unused, name
        self.strength = self.weight
        self.coefficient = torch.zeros(())
        self.total_steps: int | None = None
        self._from_checkpoint: dict[str, Any] | None = None
        controls = isinstance(schedule, TargetController)
        self.control = Control(self, schedule) if controls else None  # type: ignore[arg-type]

    # --- to be defined by a method, beside what an Observer defines ---

    raises_value = False  # whether a larger weight makes the logged value larger

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity: a checkpoint with others belongs to another training."""
        return {}

    # --- strength ---

    def update_strength(self, step: int, total_steps: int | None) -> None:
        """Set the strength of an optimizer step."""
        self.total_steps = total_steps
        factor = 1.0 if self.schedule is None else self.schedule(step, total_steps)
        self.strength = self.weight * factor if self.enabled else 0.0

    @override
    def check_layers(self, sites: list[str]) -> None:
        """Resolve ``layer_weights`` for the sites.

        Raises:
            ValueError: If one fits no site, a site has none, or all are 0.
        """
        self._factors = layer_factors(self.layer_weights, sites)

    @override
    def layer_factor(self, site: str) -> float:
        """Factor of ``layer_weights`` on the penalty of a site."""
        return self._factors.get(site, 1.0)

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        plain = {"weight": self.weight, "targets": str(describe_targets(self.targets)), "mask": str(self.mask)}
        return {**plain, "schedule": repr(self.schedule), **self.definition()}

    @override
    def observe(self, model: nn.Module, logged: Mapping[str, Any] | None = None) -> None:
        """Measure what a controller asks for."""
        if self.control is not None:
            self.control.observe(model, logged)

    # --- without a Trainer ---

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Register with the engine of ``model``; ``total_steps`` are those of the whole training."""
        self.total_steps = total_steps
        engine = Engine.of(model)
        if self.control is not None and self not in engine.taps:
            self.control.begin(model)
        engine.register(model, self)

    def detach(self, model: nn.Module) -> None:
        """Counterpart of ``attach``; the engine removes what it attached."""

    def after_step(self, model: nn.Module) -> None:
        """Called after an optimizer step of a hand-written loop."""
        if self.control is not None:
            self.control.step(self.control.steps + 1)

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start from a clean model, also after a crashed fit."""
        self._from_checkpoint = None
        if self.control is not None:
            self.control.load_state_dict(None)
        if stage == "fit" and (engine := Engine.find(pl_module)) is not None:
            engine.close()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach: here the model exists, however it was built."""
        self._check_checkpoint()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Prepares):
                callback.prepare(pl_module)
        self.attach(pl_module, _total_steps(trainer, self.schedule))
        Engine.of(pl_module).wrap(pl_module)
        self.update_strength(trainer.global_step, self.total_steps)
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the restored step."""
        self.total_steps = _total_steps(trainer, self.schedule)
        self._warn_of_silence()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the strength of this optimizer step."""
        self.update_strength(trainer.global_step, self.total_steps)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check repeated forwards."""
        Engine.of(pl_module).after_backward()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Unhook until the next batch, and log."""
        engine = Engine.of(pl_module)
        engine.disarm()
        if self.control is not None:
            self.observe(pl_module, trainer.callback_metrics if self.control.needs_logged else {})
        if self.control is not None and trainer.global_step != self.control.steps:
            self.control.step(trainer.global_step, trainer.strategy.reduce)
        if trainer._logger_connector.should_update_logs and engine.regularizers[0] is self:
            log_values(pl_module, engine)

    def _warn_of_silence(self) -> None:
        """A schedule that never starts would leave a training unregularized without a word."""
        if self.schedule is None or self.control is not None or not self.weight or not self.total_steps:
            return
        steps = {round(self.total_steps * share / 100) for share in range(100)}
        if not any(self.schedule(step, self.total_steps) for step in steps):
            rank_zero_warn(
                f"the schedule of {self.name} is 0 at every step of this training of {self.total_steps}, so nothing is "
                "regularized. Train longer, or give its times as fractions of the training."
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where a controller has ended."""
        if self.control is not None:
            self.control.warn_if_missed()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that a controller has something to go by."""
        if self.control is not None:
            self.control.check_measured(trainer.callback_metrics)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        if (engine := Engine.find(pl_module)) is not None:
            engine.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was: Lightning does not call ``teardown`` after a crash."""
        self.teardown(trainer, pl_module, "fit")

    # --- checkpoints ---

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two instances apart in a checkpoint. Lightning asks for it at every hook."""
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The definition, and what a controller learnt; a schedule's strength follows from the trainer's step."""
        state = {"definition": self.definition(), "weight": self.weight}
        return state if self.control is None else {**state, "control": self.control.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep for the check in ``on_fit_start``: nothing has changed the model yet."""
        self._from_checkpoint = state_dict
        if self.control is not None:
            self.control.load_state_dict(state_dict.get("control"))

    def _check_checkpoint(self) -> None:
        saved, self._from_checkpoint = (self._from_checkpoint or {}).get("definition", {}), None
        for key, value in self.definition().items():
            if key in saved and saved[key] != value:
                raise ValueError(
                    f"`{key}` of {type(self).__name__} {self.name!r} is {value!r}, but the checkpoint was trained with "
                    f"{saved[key]!r}: set `{key}={saved[key]!r}`, or load only the weights to start a new training."
                )


class HiddenRegularizer(Regularizer):
    """A penalty on the activations of each MLP.

    Args:
        weight: As for ``Regularizer``.
        role: ``"mlp_hidden"`` is the input of the down-projection, so the gated product where the MLP has a gate;
            ``"mlp_pre_activation"`` is what enters the activation.
        targets: Down-projections; for ``mlp_pre_activation`` also an activation, whose input is taken, or a projection
            before one, whose output is taken. All MLPs when left out.
        arguments: The others of ``Regularizer``.
    """

    loss: Any  # a module of ``lightning_reg.losses`` with a ``tap``

    def __init__(self, weight: float, *, role: Role = "mlp_hidden", targets: Targets = None, **arguments: Any) -> None:
        super().__init__(weight, targets=targets, **arguments)
        if role not in get_args(Role):
            raise ValueError(
                f"`role` must be 'mlp_hidden' or 'mlp_pre_activation', got {role!r}: the input of the down-projection, "
                "or what enters the activation."
            )
        self.role = role

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Where the activations of MLPs pass, found by shape or named by the user."""
        find = find_hidden_sites if self.role == "mlp_hidden" else find_pre_activation_sites
        return find(self.targets, model)

    def see_activations(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, penalty, value)`` of activations."""
        return self.loss.tap(x, mask)

    def check_fired(self, taps: "list[Tap]") -> None:
        """Every site must have run."""
        check_hidden_fired(self.name, taps)


class SequenceRegularizer(HiddenRegularizer):
    """A penalty that looks at neighbouring tokens: its ``mask`` may hold document numbers. Arguments as its base."""

    @override
    def as_mask(self, mask: Tensor) -> Tensor:
        """Document numbers as they are; a mask in floating point as booleans."""
        return mask.bool() if mask.is_floating_point() else mask


def log_values(pl_module: pl.LightningModule, engine: Engine) -> None:
    """Log every regularizer's values with one copy from the device.

    Raises:
        RuntimeError: If a value is not finite, naming the site.
    """
    entries: dict[str, Tensor] = {}
    for regularizer in engine.regularizers:
        if regularizer.name not in engine.totals:
            continue
        for site, of_site in engine.layers[regularizer.name].items():  # first: a bad value is reported by its site
            entries[f"reg/{regularizer.name}/layers/{site}"] = of_site
        value, weighted = engine.totals[regularizer.name]
        entries |= {f"reg/{regularizer.name}/value": value, f"reg/{regularizer.name}/weighted": weighted}
    if not entries:
        return
    packed = torch.stack([entry.to(pl_module.device, torch.float64) for entry in entries.values()]).cpu()
    numbers = dict(zip(entries, packed, strict=True))
    for key, number in numbers.items():
        if not torch.isfinite(number):
            raise RuntimeError(
                f"`{key}` is {float(number)} at step {pl_module.global_step}: the activations there are not finite. "
                "Lower the learning rate, or find the first bad batch with `Trainer(detect_anomaly=True)`."
            )
    # straight to the loggers: what goes through `log` Lightning looks at again in every step
    layers = {key: float(number) for key, number in numbers.items() if "/layers/" in key}
    pl_module.trainer._logger_connector.log_metrics(layers)  # type: ignore[arg-type]
    for key, number in numbers.items():
        if key not in layers:
            pl_module.log(key, number.float(), prog_bar=key.endswith("/value"), batch_size=1)
    for regularizer in engine.regularizers:
        pl_module.log(f"reg/{regularizer.name}/weight", regularizer.strength, batch_size=1)
        control = getattr(regularizer, "control", None)
        if control is not None and control.density is not None:
            pl_module.log(f"reg/{regularizer.name}/density", control.density, prog_bar=True, batch_size=1)


def _total_steps(trainer: pl.Trainer, schedule: Schedule | None) -> int | None:
    if schedule is None:
        return None
    total = trainer.estimated_stepping_batches
    if total in (-1, math.inf):
        return None
    # under manual optimization `global_step` counts every optimizer, the total one of them
    manual = not trainer.lightning_module.automatic_optimization
    return int(total) * (max(1, len(trainer.optimizers)) if manual and trainer.max_steps == -1 else 1)


def check_layer_weights(weights: Any) -> LayerWeights:
    """Factors of layers as plain values.

    Raises:
        ValueError: If one is negative or not finite, there is none, or an expression is wrong.
        TypeError: If they are none of the kinds.
    """
    if weights is None or callable(weights):
        return weights
    if not isinstance(weights, (Mapping, Sequence)) or isinstance(weights, str):
        raise TypeError(
            "`layer_weights` must be a mapping from regular expressions to factors, a list of factors by block number, "
            f"or a function of the layer's name, got {weights!r}."
        )
    plain = dict(weights) if isinstance(weights, Mapping) else list(weights)
    numbers = list(plain.values()) if isinstance(plain, dict) else plain
    if not numbers or not all(_is_factor(number) for number in numbers):
        raise ValueError(f"`layer_weights` must hold finite numbers >= 0, got {plain!r}; 0 leaves a layer out.")
    for pattern in plain if isinstance(plain, dict) else ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`layer_weights` key {pattern!r} is not a valid regular expression: {error}.") from error
    return plain


def _is_factor(number: Any) -> bool:
    return isinstance(number, Real) and not isinstance(number, bool) and 0 <= float(number) < math.inf


def layer_factors(weights: LayerWeights, sites: Sequence[str]) -> dict[str, float]:
    """Factor of each site.

    Raises:
        ValueError: If a key matches no site, a list does not have one factor for each block, a function returns no
            factor, or every factor is 0.
    """
    if weights is None:
        return {}
    if isinstance(weights, Mapping):
        factors = _by_pattern(weights, sites)
    elif callable(weights):
        factors = {site: weights(site) for site in sites}
        for site, factor in factors.items():
            if not _is_factor(factor):
                raise ValueError(f"`layer_weights({site!r})` must be a finite number >= 0, got {factor!r}.")
    else:
        factors = _by_block(weights, sites)
    if not any(factors.values()):
        raise ValueError(f"`layer_weights` are 0 for every layer, so nothing is regularized: {weights!r}.")
    return {site: float(factor) for site, factor in factors.items()}


def _by_pattern(weights: Mapping[str, float], sites: Sequence[str]) -> dict[str, float]:
    factors = dict.fromkeys(sites, 1.0)
    for pattern, factor in weights.items():
        whole = re.compile(rf"(?:.*\.)?(?:{pattern})")
        found = [site for site in sites if any(whole.fullmatch(part) for part in _upwards(site))]
        if not found:
            raise ValueError(f"`layer_weights` key {pattern!r} matches no layer; there are {', '.join(sites[:8])}.")
        factors |= dict.fromkeys(found, factor)
    return factors


def _upwards(name: str) -> list[str]:
    """A name and those of what is around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _by_block(weights: Sequence[float], sites: Sequence[str]) -> dict[str, float]:
    numbers = {site: [part for part in site.split(".") if part.isdigit()] for site in sites}
    most = max((len(found) for found in numbers.values()), default=0)
    differs = [i for i in range(most) if len({found[i] for found in numbers.values() if len(found) > i}) > 1]
    if len(differs) > 1:
        raise ValueError(
            f"`layer_weights` as a list needs one number that differs between the layers' names, but {sites[0]!r} and "
            f"{sites[-1]!r} differ in several. Use a mapping, or a function of the name."
        )
    place = differs[0] if differs else 0
    # outside the blocks: modules that may compute attention, and mostly do not
    blocks = {site: int(found[place]) for site, found in numbers.items() if len(found) > place}
    count = max(blocks.values(), default=-1) + 1
    if count != len(weights):
        raise ValueError(
            f"`layer_weights` has {len(weights)} factors, but the layers are in {count} blocks: give one each."
        )
    return {site: weights[blocks[site]] if site in blocks else 1.0 for site in sites}


def plain_targets(targets: Any) -> Any:
    """Hydra hands lists over as its own type."""
    if targets is None or isinstance(targets, (str, type)) or callable(targets):
        return targets
    return list(targets)


def find_hidden_sites(targets: Targets, model: nn.Module) -> list[tuple[str, bool]]:
    """Sites of the role ``mlp_hidden``."""
    return [(mlp.down, targets is not None) for mlp in capture.select_mlps(targets, model)]


def find_pre_activation_sites(targets: Targets, model: nn.Module) -> list[tuple[str, bool]]:
    """Sites of the role ``mlp_pre_activation``: activations, or projections before them."""
    modules = capture.named_modules(model)
    selected = capture.explicit_targets(targets, model)
    mlps = {mlp.down: mlp for mlp in capture.find_mlps(model)}
    if selected is None:
        mlps = {mlp.down: mlp for mlp in capture.select_mlps(None, model)}
    chosen = [name for name in modules if name in (mlps if selected is None else selected)]
    sites = [capture.pre_activation_site(model, mlps[name]) if name in mlps else name for name in chosen]
    for name in sites:
        if getattr(modules[name], "inplace", False):
            raise ValueError(
                f"the activation {name!r} changes its input in place, which a penalty on that input cannot survive. "
                f"Set `model.{name}.inplace = False`."
            )
    return [(name, selected is not None) for name in dict.fromkeys(sites)]


def check_attention_fired(name: str, taps: "list[Tap]") -> None:
    """Raise if no attention was computed, or none at or below a module the user named."""
    fired = [tap.site.name for tap in taps if tap.fired]
    if not fired:
        raise RuntimeError(
            f"`{name}` caught no attention in the first training step. It sees "
            "`F.scaled_dot_product_attention` and softmax, in modules that are in training mode and reached by "
            "gradient. Flash-attention, FlexAttention and Nystrom products are not seen: with Hugging Face use "
            "`attn_implementation='sdpa'`, and for a softmax in an unusual place name its module with `targets=`. "
            "A compiled block inside a reentrant checkpoint is not seen either: use `use_reentrant=False`. "
            "`from_pretrained` leaves models in evaluation mode: call `.train()` on them."
        )
    named = [tap.site for tap in taps if tap.site.explicit]
    idle = [site.label for site in named if not any(capture.at_or_below(other, site.name) for other in fired)]
    if idle:
        raise RuntimeError(
            f"`{name}`: no attention was computed in {', '.join(idle)} in the first training step. Leave it "
            "out of `targets`, or set `allow_unused=True` if it runs in some steps only."
        )


def check_hidden_fired(name: str, taps: "list[Tap]") -> None:
    """Raise if a down-projection did not run."""
    idle = [tap.site.label for tap in taps if not tap.fired]
    if idle:
        raise RuntimeError(
            f"`{name}`: {', '.join(idle)} did not run, with gradient and in training mode, in the first training step, "
            "so nothing is regularized there. `from_pretrained` leaves models in evaluation mode: call `.train()` on "
            "them. Otherwise leave it out with `targets=`, set `allow_unused=True` if it runs in some steps only, and "
            "use `use_reentrant=False` if it is a compiled block inside a checkpoint."
        )


def describe_targets(targets: Any) -> Any:
    """Targets as plain values, for loggers and keys."""
    if targets is None or isinstance(targets, str):
        return targets
    if isinstance(targets, type) or callable(targets):
        return getattr(targets, "__qualname__", repr(targets))
    return [describe_targets(entry) for entry in targets]
