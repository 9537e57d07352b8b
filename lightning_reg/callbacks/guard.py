"""Switches a remedy on when it is needed: the loop between what a monitor measures and what acts."""

import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_reg.callbacks.regularizer import Regularizer
from lightning_reg.callbacks.softcap import SoftCap
from lightning_reg.callbacks.stability import HEADLINES, StabilityMonitor
from lightning_reg.callbacks.surgery import Surgery
from lightning_reg.conditions import Condition

Action = Callable[[pl.Trainer, pl.LightningModule], Any]


class Guard(Callback):
    """Holds a remedy back until a condition on measured quantities is met: ``Guard(QKClip(), "max_logit > 100")``.

    The condition is looked at when a ``StabilityMonitor`` has measured: the one before the guard in the Trainer's
    callbacks, or one of its own. It names that monitor's headlines, such as ``max_logit``, ``entropy_min``,
    ``collapsed_share``, ``log_z``, ``gradient_rms``; ``lightning_reg.callbacks.stability.HEADLINES`` says what each is.
    All processes decide alike. Until then the remedy costs nothing but a look at the first batch, in which it checks
    that it would find its targets, and training is bit-identical to one without it.

    Logs ``reg/<name>/active`` at every measurement, and says at which step and by which values it acted. Its state,
    and the remedy's, are in the checkpoint.

    Args:
        remedy: What acts, one or several: penalties, ``QKClip``, ``SoftCap``, ``StochasticAttention``; or a function
            ``(trainer, pl_module)`` that is called once each time the condition becomes true. Do not pass it to the
            Trainer as well. Callbacks that change what the model computes when they are switched on (``SigmaReparam``,
            ``QKNorm``, ``ActivationSubstitution``) and penalties with a controller cannot be held back.
        when: The condition under which it acts, as text.
        release: The condition under which it is held back again; never when left out.
        hold: Optimizer steps for which it acts at least.
        every_n_steps: Of the guard's own monitor: measure every so many optimizer steps; as the Trainer logs when left
            out.
        name: In logs and checkpoints; two guards in one Trainer need two names.
    """

    def __init__(
        self,
        remedy: Callback | Sequence[Callback] | Action,
        when: str,
        *,
        release: str | None = None,
        hold: int = 0,
        every_n_steps: int | None = None,
        name: str = "guard",
    ) -> None:
        super().__init__()
        self.remedies, self.action = _check_remedies(remedy)
        self.when = Condition(when, HEADLINES)
        self.release = None if release is None else Condition(release, HEADLINES, "release")
        if isinstance(hold, bool) or not isinstance(hold, int) or hold < 0:
            raise ValueError(f"`hold` must be a number of optimizer steps >= 0, got {hold!r}.")
        if not name or "/" in name:
            raise ValueError(f"`name` must be a word for logs and checkpoints, got {name!r}.")
        self.hold, self.name, self.every_n_steps = hold, name, every_n_steps
        self._model: nn.Module | None = None
        self._inserted: list[Any] = []  # remedies that a Trainer has from here
        self._own = StabilityMonitor(warn={}, every_n_steps=every_n_steps, name=f"{name}_monitor")
        self._monitor: StabilityMonitor | None = None
        self._start()

    def _start(self) -> None:
        self.active = False
        self.since: int | None = None  # the step at which it last acted
        self.times = 0  # how often it has acted
        self._seen: Any = None  # measurement that was looked at
        self._checked = False  # the remedies have seen their first batch
        self._known: set[str] = set()  # quantities that were measured
        self._measurements = 0
        self._switch(False)

    def _switch(self, active: bool) -> None:
        for remedy in self.remedies:
            remedy.enabled = active
            if isinstance(remedy, Regularizer):
                remedy.awake = active or not self._checked

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Refuse hand-written loops: what a guard looks at is measured in a Trainer.

        Raises:
            TypeError: Always.
        """
        raise TypeError("Guard needs a Trainer. In a hand-written loop set `enabled` of the remedy yourself.")

    def detach(self, model: nn.Module) -> None:
        """Counterpart of ``attach``."""

    # --- life ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Bring the remedies into the Trainer, right behind this callback, and find a monitor."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._monitor = self._find_monitor(callbacks)
        if stage == "fit":
            if self._model is not pl_module:  # a second fit of a model goes on as the first has ended
                for remedy in self.remedies:
                    if isinstance(remedy, SoftCap):
                        remedy.renew()
                self._start()
            self._model, self._checked, self.since = pl_module, False, None
            self._seen = self._monitor.latest  # of an earlier fit
        for remedy in self.remedies:
            if remedy in callbacks and remedy not in self._inserted:
                raise ValueError(
                    f"{type(remedy).__name__} is in the Trainer's callbacks and in {self.name}, which could not hold "
                    "it back: leave it out of the callbacks, the guard brings it along."
                )
        self._inserted = self.remedies
        place = callbacks.index(self) + 1
        # Lightning goes through this very list, so they are set up next
        callbacks[place:place] = [remedy for remedy in self.remedies if remedy not in callbacks]
        if self._monitor is self._own and self._own not in callbacks:
            callbacks.insert(place, self._own)

    def _find_monitor(self, callbacks: list[Callback]) -> StabilityMonitor:
        own = [guard._own for guard in callbacks if isinstance(guard, Guard)]
        found = [other for other in callbacks if isinstance(other, StabilityMonitor) and other not in own]
        return found[0] if found else self._own

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold back, or go on acting where a checkpoint says so."""
        self._switch(self.active)
        for logger in trainer.loggers:
            arguments = {"when": self.when.text, "release": self.release and self.release.text, "hold": self.hold}
            arguments["remedy"] = ", ".join(self._names())
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in arguments.items()})

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Act on the last measurement: by now all callbacks have seen the last batch."""
        self._decide(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From the second batch on a remedy that is held back does not look."""
        if not self._checked and outputs is not None:
            self._checked = True
            self._switch(self.active)

    def _decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._monitor is not None
        values = self._monitor.latest
        if not values or values is self._seen:
            return
        self._seen = values
        self._check_measured(values)
        step = trainer.global_step
        if not self.active and self.when(values):
            self._act(trainer, pl_module, step, values)
        elif self.active and self._may_release(step) and self.release is not None and self.release(values):
            self.active = False
            self._switch(False)
            rank_zero_info(
                f"{self.name}: {self.release} holds at step {step} ({self._shown(self.release, values)}), so "
                f"{', '.join(self._names())} is held back again."
            )
        if not trainer.barebones:
            pl_module.log(f"reg/{self.name}/active", float(self.active), batch_size=1, rank_zero_only=False)

    def _check_measured(self, values: dict[str, float]) -> None:
        """At the second measurement: every quantity of the conditions must have been there."""
        self._known |= set(values)
        self._measurements += 1
        asked = self.when.quantities | (self.release.quantities if self.release else frozenset())
        missing = sorted(asked - self._known - {"predicted_step"})
        if missing and self._measurements > 1:
            raise RuntimeError(
                f"{self.name} asks for {', '.join(missing)}, which its StabilityMonitor does not measure here. It "
                f"measures {', '.join(sorted(self._known))}: change the condition, or the monitor's `quantities`."
            )

    def _may_release(self, step: int) -> bool:
        return self.since is None or step - self.since >= self.hold

    def _act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, values: dict[str, float]) -> None:
        self.active, self.since, self.times = True, step, self.times + 1
        self._switch(True)
        rank_zero_warn(
            f"{self.name}: {self.when} holds at step {step} ({self._shown(self.when, values)}), so "
            f"{', '.join(self._names())} acts from here on."
        )
        if self.action is None:
            return
        try:
            self.action(trainer, pl_module)
        except Exception:  # a training of weeks must not end by a slip in what watches over it
            rank_zero_warn(f"the `remedy` of {self.name} raised, and training goes on:\n{traceback.format_exc()}")

    def _shown(self, condition: Condition, values: dict[str, float]) -> str:
        return ", ".join(f"{name} = {values[name]:.4g}" for name in sorted(condition.quantities) if name in values)

    def _names(self) -> list[str]:
        if self.action is not None:
            return [getattr(self.action, "__qualname__", repr(self.action))]
        return [type(remedy).__name__ for remedy in self.remedies]

    # --- checkpoints ---

    @cached_property
    def state_key(self) -> str:  # type: ignore[override]
        """Tells two guards apart in a checkpoint."""
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Whether it acts, since when, how often, and the measurement that is still to be looked at."""
        values = self._monitor.latest if self._monitor is not None else {}
        waiting = dict(values) if values is not self._seen else {}
        return {"active": self.active, "since": self.since, "times": self.times, "waiting": waiting}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counterpart of ``state_dict``."""
        self.active, self.since, self.times = (state_dict[key] for key in ("active", "since", "times"))
        if self._monitor is not None and state_dict["waiting"]:
            self._monitor.latest = dict(state_dict["waiting"])
        self._switch(self.active)


def _check_remedies(remedy: Any) -> tuple[list[Any], Action | None]:
    if isinstance(remedy, type):
        raise TypeError(f"`remedy` must be an instance, got the class {remedy.__name__}: call it, {remedy.__name__}().")
    if callable(remedy) and not isinstance(remedy, Callback):
        return [], _check_action(remedy)
    several = isinstance(remedy, Iterable) and not isinstance(remedy, str)  # Hydra has a list type of its own
    remedies = list(remedy) if several else [remedy]
    if not remedies:
        raise ValueError("`remedy` must hold at least one callback, got none.")
    for one in remedies:
        changes = isinstance(one, Surgery) and not isinstance(one, SoftCap)
        if changes or not isinstance(one, Callback) or not hasattr(one, "enabled"):
            raise ValueError(
                f"`remedy` must be a penalty, QKClip, SoftCap, StochasticAttention or a function of (trainer, "
                f"pl_module), got {one!r}. What changes the model when it is switched on belongs into the Trainer's "
                "callbacks from the start."
            )
        if getattr(one, "control", None) is not None:
            raise ValueError(
                f"`remedy` {type(one).__name__} has a TargetController, which would wind up while it is held back. "
                "Give it a fixed weight, or leave it to the controller without a guard."
            )
    return remedies, None


def _check_action(action: Action) -> Action:
    try:
        inspect.signature(action).bind(None, None)
    except TypeError as error:
        raise TypeError(f"`remedy` must be callable with (trainer, pl_module), got {action!r}: {error}.") from error
    except ValueError:  # a function of C, which does not say
        pass
    return action
