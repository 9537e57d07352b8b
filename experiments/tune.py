"""Pruning inside any Hydra sweep: python -m experiments.train experiment=quickstart sweep=optuna.

Hydra's Optuna sweeper chooses the settings but sees a run only at its end. ``Pruner`` is the other half: every run
reports its validations to a study in one file, where Optuna's pruners compare it with the others and stop it early.
Sweeper and launcher may be any that share a disk. ``Trials`` prints what became of the runs at the end.
"""

import csv
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.experimental.callback import Callback as HydraCallback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")  # Optuna 2, which Hydra's sweeper wants, needs 1.4

import optuna
from optuna.trial import FrozenTrial, TrialState

STUDY = "runs"
LONG = re.compile(r"(\.0*[1-9]\d{2})\d+\b")  # more digits than a table needs
RUN = "run"  # user attribute: what this run was told, as on the command line


class Pruner(pl.Callback):
    """Stops a training whose validations are behind those of the other runs.

    A pruned run ends as any other, and returns its last value: a sweeper learns that this is no good place.

    Args:
        storage: Database of the study, as SQLAlchemy names it; shared by the runs of a sweep.
        run: What the run is called in the study.
        pruner: Decides, from values at the same step.
        metric: What is reported at each validation.
        minimize: Whether less of it is better.
    """

    def __init__(
        self, storage: str, run: Any, pruner: optuna.pruners.BasePruner, metric: str, minimize: bool = True
    ) -> None:
        self.storage, self.run, self.pruner = storage, run, pruner
        self.metric, self.minimize = metric, minimize
        self.study: optuna.Study | None = None
        self.trial: optuna.Trial | None = None
        self.pruned = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take part in the study; one process does it for all of a run."""
        if trainer.is_global_zero:
            self.study = open_study(self.storage, self.minimize, self.pruner)
            self.trial = self.study.ask()
            self.trial.set_user_attr(RUN, _text(self.run))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report, and stop if the study says so.

        Raises:
            ValueError: If the metric was not logged; lists those there are.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric not in trainer.callback_metrics:
            there = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"`metric={self.metric}` was not logged; there are {there}.")
        value = float(trainer.callback_metrics[self.metric])
        if self.trial is not None and math.isfinite(value):  # the database takes no NaN
            self.trial.report(value, trainer.global_step)
            self.pruned = self.trial.should_prune()
        self.pruned = trainer.strategy.broadcast(self.pruned)
        trainer.should_stop = trainer.should_stop or self.pruned

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell the study how it ended."""
        value = float(trainer.callback_metrics[self.metric])
        if self.pruned or not math.isfinite(value):
            self._tell(state=TrialState.PRUNED if self.pruned else TrialState.FAIL)
        else:
            self._tell(value)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A run that fails is not one to compare with."""
        self._tell(state=TrialState.FAIL)

    def _tell(self, value: float | None = None, state: TrialState = TrialState.COMPLETE) -> None:
        if self.study is not None and self.trial is not None:
            self.study.tell(self.trial, value, state)
            self.study = self.trial = None


class Trials(HydraCallback):
    """Hydra's hook around a sweep: makes the study, and at the end shows its runs and writes ``trials.csv``.

    Args:
        storage: As the ``Pruner`` of the runs has it.
        metric: As well.
        minimize: As well.
    """

    def __init__(self, storage: str, metric: str, minimize: bool = True) -> None:
        self.storage, self.metric, self.minimize = storage, metric, minimize

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the tables before several runs at once would."""
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        open_study(self.storage, self.minimize)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Show and write."""
        trials = open_study(self.storage, self.minimize).trials
        path = Path(config.hydra.sweep.dir) / "trials.csv"
        write_trials(trials, path)
        Console().print(table(trials, self.metric), f"{path}", sep="\n")


def open_study(storage: str, minimize: bool, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    """The study of a sweep, made on first use."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=storage, study_name=STUDY, direction="minimize" if minimize else "maximize", pruner=pruner,
        load_if_exists=True,
    )  # fmt: skip


def rows(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """One for each run that took part: what not all were told, how it ended, at which step, with which value."""
    told = [dict.fromkeys(trial.user_attrs.get(RUN, "").split(" ")) for trial in trials]
    shared = set(told[0]).intersection(*told) if len(told) > 1 else set()
    found = []
    for trial, settings in zip(trials, told, strict=True):
        step = trial.last_step
        value = None if step is None else trial.intermediate_values[step]
        name = {TrialState.FAIL: "failed", TrialState.RUNNING: "cut off"}.get(trial.state, trial.state.name.lower())
        run = " ".join(part for part in settings if part not in shared)
        found.append({"run": run, "state": name, "step": step, "value": value})
    return found


def write_trials(trials: Sequence[FrozenTrial], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "state", "step", "value"])
        writer.writeheader()
        writer.writerows(rows(trials))


def table(trials: Sequence[FrozenTrial], metric: str) -> Table:
    """The rows for the console."""
    shown = Table("run", "ended", "step", metric)
    for row in rows(trials):
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        run = LONG.sub(r"\1", row["run"]).replace(" ", "\n")
        shown.add_row(run, row["state"], str(row["step"] or ""), value)
    return shown


def _text(run: Any) -> str:
    return run if isinstance(run, str) else " ".join(map(str, run))
