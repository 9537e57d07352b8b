"""What the monitors share: measured steps, one line of history for each, and a way to the loggers that costs nothing.

A monitor looks at what passes its sites in training steps whose metrics reach the loggers, and at no others.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from lightning_reg import plotting
from lightning_reg.callbacks.observer import Mask, Observer
from lightning_reg.callbacks.regularizer import plain_targets
from lightning_reg.callbacks.spectral_norm import SigmaReparam
from lightning_reg.capture import Targets
from lightning_reg.engine import Engine, Tap

History = dict[str, Any]


# --- sites -----------------------------------------------------------------------------------------------------------


class Watcher(Observer):
    """Looks at its sites while it is awake, and leaves records."""

    def __init__(self, name: str, sites: list[str], mask: Mask) -> None:
        self.name, self.mask = name, mask
        self.sites = sites
        self.awake = False
        self.allow_unused = True  # the monitor checks itself

    def find_sites(self, model: nn.Module) -> list[tuple[str, bool]]:
        """The sites, never as explicit ones: that would change what a regularizer sees there."""
        return [(site, False) for site in self.sites]

    def check_fired(self, taps: list[Tap]) -> None:
        """Left to the monitor."""


# --- history ---------------------------------------------------------------------------------------------------------


class HistoryFile:
    """One JSON object a line, one line a measured step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def restart(self, step: int) -> list[History]:
        """Keep what lies before ``step``, which a resumed training will not repeat; put a finished file aside."""
        if not self.path.exists():
            return []
        if step == 0:
            os.replace(self.path, self._free_name())
            return []
        kept = [record for line in self.path.read_text().splitlines() if (record := _parsed(line))["step"] < step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        os.replace(temporary, self.path)
        return kept

    def append(self, record: History) -> None:
        """Write one line at once, so that a crash leaves at most one line behind that is not whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{json.dumps(record)}\n")

    def _free_name(self) -> Path:
        number = 1
        while (path := self.path.with_suffix(f".{number}.jsonl")).exists():
            number += 1
        return path


def _parsed(line: str) -> History:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {"step": math.inf}  # the line a crash cut off


# --- the callback ----------------------------------------------------------------------------------------------------


class Monitor(Callback):
    """Base of the monitors: when a step is measured, where its record goes, and that nothing is left behind.

    Args:
        name: Name of the history file and of the arguments in the loggers' configuration.
        targets: Parts of the model to watch, with everything below them; all of it when left out.
        mask: Key or index of the batch's valid tokens (batch, tokens), or a function of the batch.
    """

    def __init__(self, name: str, targets: Targets, mask: Mask) -> None:
        super().__init__()
        if not name or any(separator in name for separator in "/\\"):
            raise ValueError(f"`name` must be usable as a file name, got {name!r}.")
        self.name, self.targets, self.mask = name, plain_targets(targets), mask
        self.history: list[History] = []
        self.path: Path | None = None
        self._watchers: dict[str, Any] = {}
        self._forget()

    def hyperparameters(self) -> dict[str, Any]:
        """Arguments as plain values, for loggers."""
        raise NotImplementedError

    def attach(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Refuse hand-written loops: they have no logging steps.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__} needs a Trainer, whose logging steps it follows. In a hand-written loop use "
            "`lightning_reg.metrics`."
        )

    def detach(self, model: nn.Module) -> None:
        """Counterpart of ``attach``."""

    # --- life ---

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start from a clean model, also after a crashed fit."""
        if stage != "fit":
            return
        others: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(other, Monitor) and other is not self and other.name == self.name for other in others):
            raise ValueError(f"`name` must differ between monitors of one Trainer, got {self.name!r} twice.")
        if (engine := Engine.find(pl_module)) is not None:
            engine.close()
        self._forget()

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, watchers: dict[str, Any]) -> None:
        """Show the sites to ``watchers``, at measured steps, and tell the loggers the arguments."""
        self._watchers.update(watchers)
        engine = Engine.of(pl_module)
        for watcher in watchers.values():
            engine.register(pl_module, watcher)
        engine.wrap(pl_module)
        for logger in trainer.loggers:
            logger.log_hyperparams({f"reg/{self.name}/{key}": value for key, value in self.hyperparameters().items()})

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decide whether this step is measured."""
        if not self._started:
            self._start_history(trainer)
        # Lightning logs the last batch of a window
        accumulates = trainer.fit_loop._should_accumulate()
        begins = self._unchecked and logged_step(trainer) == 0
        self._measured = not accumulates and (begins or self.is_due(trainer))
        self.wake(self._measured or self._unchecked)

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether a step that is not accumulated further is measured."""
        return reaches_loggers(trainer)

    def wake(self, awake: bool) -> None:
        """Show the sites at this step, or no longer."""
        for watcher in self._watchers.values():
            watcher.awake = awake

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was; ``history`` stays."""
        if (engine := Engine.find(pl_module)) is not None:
            engine.close()
        self._forget()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was: Lightning does not call ``teardown`` after a crash."""
        self.teardown(trainer, pl_module, "fit")

    def _forget(self) -> None:
        self._watchers.clear()
        self._file: HistoryFile | None = None
        self._unchecked, self._started, self._measured = True, False, False

    # --- history ---

    def _start_history(self, trainer: pl.Trainer) -> None:
        self._started = True
        step = logged_step(trainer)
        kept = [record for record in self.history if record["step"] < step]
        self.path = None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.path = directory(trainer) / f"{self.name}.jsonl"
            self._file = HistoryFile(self.path)
            kept = self._file.restart(step) or kept
        self.history = kept if step else []

    def _write(self, record: History) -> None:
        self.history.append(record)
        if self._file is not None:
            self._file.append(record)


# --- small parts -----------------------------------------------------------------------------------------------------


def described(targets: Any) -> Any:
    """Targets as plain values."""
    if targets is None or isinstance(targets, str):
        return targets
    if isinstance(targets, list):
        return [described(entry) for entry in targets]
    return getattr(targets, "__qualname__", repr(targets))


def check_quantities(quantities: Sequence[str] | None, among: Sequence[str]) -> list[str] | None:
    """Return ``quantities`` as a list or raise a ValueError."""
    if quantities is None:
        return None
    listed = [quantities] if isinstance(quantities, str) else [str(quantity) for quantity in quantities]
    unknown = [quantity for quantity in listed if quantity not in among]
    if unknown or not listed:
        raise ValueError(
            f"`quantities` must be among {', '.join(among)}, got {', '.join(map(repr, unknown)) or 'none'}. "
            "Leave it out to watch what the model has."
        )
    return list(dict.fromkeys(listed))


def check_count(argument: str, count: int | None) -> int | None:
    """Return ``count`` or raise a ValueError."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"`{argument}` must be an integer >= 1, got {count!r}. Leave it out for none.")
    return count


def sigma_reparams(trainer: pl.Trainer) -> list[Any]:
    """The `SigmaReparam` callbacks of a Trainer."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SigmaReparam)]


def reparametrized(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Spectral norms of the weights that sigma-Reparam has taken."""
    return {site: norm for callback in sigma_reparams(trainer) for site, norm in callback.spectral_norms().items()}


def spaced(items: list[Any], most: int | None) -> list[Any]:
    """At most ``most`` items, evenly spaced from the first to the last."""
    if most is None or len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / max(1, most - 1))] for place in range(most)]


def logged_step(trainer: pl.Trainer) -> int:
    """The x-axis that Lightning gives the metrics of this step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def reaches_loggers(trainer: pl.Trainer) -> bool:
    """Whether the metrics of this step go to the loggers."""
    return trainer._logger_connector.should_update_logs or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def every(epochs: int | None, trainer: pl.Trainer) -> bool:
    """Whether something that is due every so many epochs is due at the end of this one."""
    return epochs is not None and (trainer.current_epoch + 1) % epochs == 0


def directory(trainer: pl.Trainer) -> Path:
    """Where the first logger keeps its files; for those without a `log_dir`, where checkpoints of the run go."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    if log_dir := getattr(logger, "log_dir", None):
        return Path(log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def show(trainer: pl.Trainer, key: str, figure: Any, step: int) -> None:
    """Hand a figure to every logger, or save it where there is none."""
    for logger in trainer.loggers:
        plotting.log_figure(logger, key, figure, step, directory=trainer.default_root_dir)
    if not trainer.loggers:
        plotting.save_figure(trainer.default_root_dir, key, figure, step)


def when(record: History) -> str:
    """Epoch and step of a record, for titles."""
    return f"epoch {record['epoch']}, step {record['step']}"


def to_host(tensors: "dict[Any, Tensor]", device: torch.device) -> "dict[Any, Tensor]":
    """The same tensors on the host, by one copy from the device."""
    if not tensors:
        return {}
    packed = torch.cat([tensor.to(device).flatten() for tensor in tensors.values()]).cpu()
    parts = packed.split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view(tensors[key].shape) for key, part in zip(tensors, parts, strict=True)}


def number(value: Tensor) -> float | None:
    """Float of eight digits; None where nothing was counted or the value is not finite, which JSON cannot say."""
    number = float(value)
    return float(f"{number:.8g}") if math.isfinite(number) else None


def mean(values: Any) -> float | None:
    """Mean of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def known(values: dict[str, float | None]) -> dict[str, float]:
    """What is known."""
    return {key: value for key, value in values.items() if value is not None}
