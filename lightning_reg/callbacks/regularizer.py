"""What every penalty callback shares: when it is attached, how strong it is, what it logs. No formula."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import capture
from lightning_reg.capture import Targets
from lightning_reg.engine import Engine
from lightning_reg.schedules import Schedule

if TYPE_CHECKING:
    from lightning_reg.engine import Tap

Mask = str | int | Callable[[Any], Tensor] | None


class Observer:
    """What the engine shows its sites to. A ``Regularizer`` is one that leaves penalties."""

    name, role = "", ""
    top_k: int | None = None
    mask: Mask = None
    allow_unused = False
    penalizes = False
    awake = True  # the sites are shown to it at the current step; at the others it costs nothing
    strength = 0.0  # weight * schedule at the current step
    coefficient: Tensor  # strength / number of calls, for repeated forwards

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Names of the modules to watch, each with whether the user named it."""
        raise NotImplementedError

    def see_attention(
        self, entropy: Tensor, visible: Tensor | int, valid: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """``(penalty, value)`` of attention rows: entropy in nats and visible keys (batch, heads, queries)."""
        raise NotImplementedError

    def see_hidden(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """``(x, penalty, value)`` of a projection's input (..., width)."""
        raise NotImplementedError

    def check_fired(self, taps: "list[Tap]") -> None:
        """Raise if a target did not run in the first step."""
        raise NotImplementedError

    @property
    def live(self) -> bool:
        """Whether the penalty acts at the current step."""
        return self.strength > 0

    def update_strength(self, step: int, total_steps: int | None) -> None:
        """Set the strength of an optimizer step; without a penalty there is none."""

    def batch_mask(self, batch: Any) -> Tensor | None:
        """Valid tokens of a batch, or None."""
        if self.mask is None or batch is None:
            return None
        try:
            mask = self.mask(batch) if callable(self.mask) else batch[self.mask]
        except (KeyError, IndexError, TypeError) as error:
            keys = f" with keys {sorted(map(str, batch))}" if isinstance(batch, dict) else ""
            raise ValueError(
                f"`mask={self.mask!r}` is not in the batch, a {type(batch).__name__}{keys}; give its key, its "
                "index, or a function of the batch."
            ) from error
        if not isinstance(mask, Tensor):
            raise ValueError(f"`mask={self.mask!r}` must select a tensor, got {type(mask).__name__}.")
        return mask.bool()


class Regularizer(Observer, Callback):
    """Base of the penalty callbacks.

    Args:
        weight: Strength, >= 0. 0 measures and logs without touching the training.
        targets: Modules to regularize: a regular expression that matches a whole name or a dotted ending of it, a
            module type, a predicate on (name, module), or a list of these. Found automatically when left out.
        schedule: Factor on ``weight`` over the training, constant when left out.
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
        mask: Mask = None,
        allow_unused: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"`weight` must be a finite number >= 0, got {weight!r}. Use `objective` for a direction.")
        if schedule is not None and not callable(schedule):
            raise TypeError(f"`schedule` must be a lightning_reg.schedules.Schedule, got {type(schedule).__name__}.")
        self.weight, self.schedule = float(weight), schedule
        self.targets = _plain(targets)
        self.mask, self.allow_unused, self.name = mask, allow_unused, name
        self.strength = self.weight
        self.coefficient = torch.zeros(())
        self._from_checkpoint: dict[str, Any] | None = None

    # --- to be defined by a method, beside what an Observer defines ---

    def definition(self) -> dict[str, Any]:
        """Arguments that define the quantity: a checkpoint with others belongs to another training."""
        return {}

    # --- strength ---

    def update_strength(self, step: int, total_steps: int | None) -> None:
        """Set the strength of an optimizer step."""
        self.strength = self.weight * (1.0 if self.schedule is None else self.schedule(step, total_steps))

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        schedule = None if self.schedule is None else type(self.schedule).__name__
        return {"weight": self.weight, "schedule": schedule, **self.definition()}

    # --- without a Trainer ---

    def attach(self, model: nn.Module) -> None:
        """Register with the engine of ``model``."""
        Engine.of(model).register(model, self)

    def detach(self, model: nn.Module) -> None:
        """Counterpart of ``attach``; the engine removes what it attached."""

    def after_step(self, model: nn.Module) -> None:
        """Called after an optimizer step of a hand-written loop."""

    # --- with a Trainer ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start from a clean model, also after a crashed fit."""
        if stage == "fit" and (engine := Engine.find(pl_module)) is not None:
            engine.close()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach: here the model exists, however it was built."""
        self._check_checkpoint()
        self.attach(pl_module)
        Engine.of(pl_module).wrap(pl_module)
        self.update_strength(trainer.global_step, _total_steps(trainer, self.schedule))
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the restored step."""
        self._total = _total_steps(trainer, self.schedule)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the strength of this optimizer step."""
        self.update_strength(trainer.global_step, self._total)

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
        if trainer._logger_connector.should_update_logs and engine.regularizers[0] is self:
            log_values(pl_module, engine)

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
        """The definition; the strength follows from the trainer's step."""
        return {"definition": self.definition(), "weight": self.weight}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep for the check in ``on_fit_start``: nothing has changed the model yet."""
        self._from_checkpoint = state_dict

    def _check_checkpoint(self) -> None:
        saved, self._from_checkpoint = (self._from_checkpoint or {}).get("definition", {}), None
        for key, value in self.definition().items():
            if key in saved and saved[key] != value:
                raise ValueError(
                    f"`{key}` of {type(self).__name__} {self.name!r} is {value!r}, but the checkpoint was trained with "
                    f"{saved[key]!r}: set `{key}={saved[key]!r}`, or load only the weights to start a new training."
                )


class HiddenRegularizer(Regularizer):
    """A penalty on the input of each MLP's down-projection, so on the gated product where the MLP has a gate."""

    role = "mlp_hidden"
    loss: Any  # a module of ``lightning_reg.losses`` with a ``tap``

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Down-projections of MLPs, found by shape or named by the user."""
        return find_hidden_sites(self.targets, model)

    def see_hidden(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, penalty, value)`` of a down-projection's input."""
        return self.loss.tap(x, mask)

    def check_fired(self, taps: "list[Tap]") -> None:
        """Every down-projection must have run."""
        check_hidden_fired(self.name, taps)


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


def _total_steps(trainer: pl.Trainer, schedule: Schedule | None) -> int | None:
    if schedule is None:
        return None
    total = trainer.estimated_stepping_batches
    return None if total in (-1, math.inf) else int(total)


def _plain(targets: Any) -> Any:
    """Hydra hands lists over as its own type."""
    if targets is None or isinstance(targets, (str, type)) or callable(targets):
        return targets
    return list(targets)


def explicit_sites(targets: Targets, model: nn.Module) -> set[str] | None:
    """Names that ``targets`` selects among all modules; None when it is left out."""
    return None if targets is None else capture.match_targets(targets, capture.named_modules(model))


def find_hidden_sites(targets: Targets, model: nn.Module) -> list[tuple[str, bool]]:
    """Sites of the role ``mlp_hidden``."""
    selected = explicit_sites(targets, model)
    found = capture.find_down_projections(model)
    if selected is None:
        if not found:
            names = [name for name, module in capture.named_modules(model).items() if capture.projection_sizes(module)]
            raise ValueError(
                "no MLP down-projection was found: no wide-to-narrow linear map follows the matching narrow-to-wide "
                f"one. Name it with `targets=`; the linear maps are {', '.join(names[:8]) or 'none'}."
            )
        return [(name, False) for name in found]
    modules = capture.named_modules(model)
    for name in selected:
        if capture.projection_sizes(modules[name]) is None:
            inside = [other for other in found if other.startswith(f"{name}.")]
            remedy = f" Its down-projections: {', '.join(inside[:5])}." if inside else ""
            raise ValueError(
                f"`targets` must name down-projections, whose input is regularized; {name or 'the model'!r} is a "
                f"{type(modules[name]).__name__}.{remedy}"
            )
    return [(name, True) for name in modules if name in selected]


def check_hidden_fired(name: str, taps: "list[Tap]") -> None:
    """Raise if a down-projection did not run."""
    idle = [tap.site.label for tap in taps if not tap.fired]
    if idle:
        raise RuntimeError(
            f"`{name}`: {', '.join(idle)} did not run, with gradient and in training mode, in the first training step, "
            "so nothing is regularized there. Leave it out with `targets=`, set `allow_unused=True` if it runs in some "
            "steps only, and use `use_reentrant=False` if it is a compiled block inside a checkpoint."
        )
