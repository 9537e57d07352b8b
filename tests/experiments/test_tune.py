"""Pruning of runs in a shared study, against cases worked by hand; the Optuna sweep from the command line."""

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

os.environ["SQLALCHEMY_SILENCE_UBER_WARNING"] = "1"
optuna = pytest.importorskip("optuna")

from experiments.run_info import ROOT  # noqa: E402
from experiments.tune import Pruner, open_study, rows, table, write_trials  # noqa: E402
from tests.conf.configs import compose  # noqa: E402


class Replay(pl.LightningModule):
    """Logs given losses, one a validation, and trains nothing."""

    def __init__(self, losses: Sequence[float]) -> None:
        super().__init__()
        self.losses, self.seen = losses, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/loss", self.losses[self.seen])
            self.seen += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def replay(folder: Path, losses: Sequence[float], run: str = "", pruner=None, **settings) -> Pruner:
    """A training of two steps a validation."""
    pruner = pruner or optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=3)
    callback = Pruner(f"sqlite:///{folder}/optuna.db", run.split(), pruner, **{"metric": "val/loss", **settings})
    trainer = pl.Trainer(
        max_steps=2 * len(losses), val_check_interval=2, check_val_every_n_epoch=None, limit_val_batches=1,
        callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(torch.zeros(8, 1))
    trainer.fit(Replay(losses), batches, batches)
    return callback


def test_a_run_behind_the_median_stops_where_the_pruner_says(tmp_path: Path) -> None:
    assert not replay(tmp_path, [3.0, 2.0, 1.0], "a weight=0.1").pruned
    assert not replay(tmp_path, [3.0, 1.0, 0.5], "a weight=0.2").pruned
    # step 2 is warm-up; at 4 the others have 2 and 1, whose median is 1.5
    assert replay(tmp_path, [9.0, 1.6, 0.1], "a weight=0.3").pruned
    assert not replay(tmp_path, [9.0, 1.4, 0.7], "a weight=0.4").pruned
    study = open_study(f"sqlite:///{tmp_path}/optuna.db", minimize=True)
    assert rows(study.trials) == [
        {"run": "weight=0.1", "state": "complete", "step": 6, "value": 1.0},
        {"run": "weight=0.2", "state": "complete", "step": 6, "value": 0.5},
        {"run": "weight=0.3", "state": "pruned", "step": 4, "value": pytest.approx(1.6)},
        {"run": "weight=0.4", "state": "complete", "step": 6, "value": pytest.approx(0.7)},
    ]
    write_trials(study.trials, tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["complete", "complete", "pruned", "complete"]
    assert table(study.trials, "val/loss").row_count == 4


def test_more_can_be_better(tmp_path: Path) -> None:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    assert not replay(tmp_path, [0.5, 0.6], pruner=pruner, minimize=False).pruned
    assert not replay(tmp_path, [0.6, 0.7], pruner=pruner, minimize=False).pruned
    assert replay(tmp_path, [0.1, 0.9], pruner=pruner, minimize=False).pruned


def test_a_run_that_fails_or_is_not_finite_is_no_measure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`metric=val/los` was not logged; there are val/loss"):
        replay(tmp_path, [1.0], metric="val/los")
    replay(tmp_path, [1.0, float("nan")])
    study = open_study(f"sqlite:///{tmp_path}/optuna.db", minimize=True)
    assert [row["state"] for row in rows(study.trials)] == ["failed", "failed"]


def test_a_run_that_was_cut_off_is_told(tmp_path: Path) -> None:
    study = open_study(f"sqlite:///{tmp_path}/optuna.db", minimize=True)
    study.ask()
    assert rows(study.trials) == [{"run": "", "state": "cut off", "step": None, "value": None}]
    assert table(study.trials, "val/loss").row_count == 1


def test_the_sweep_names_what_the_config_has() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    config = compose("experiment=quickstart", "sweep=optuna")
    assert "Cosine" in config.callbacks.aem.schedule._target_
    assert {config.callbacks.aem.weight, config.callbacks.deft.weight} == {0.1}
    assert config.callbacks.pruner._target_ == "experiments.tune.Pruner"


@pytest.mark.slow
def test_the_optuna_sweep_runs_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = [
        sys.executable, "-m", "experiments.train", "experiment=quickstart", "sweep=optuna", "debug=fast",
        "~callbacks.monitor", "~callbacks.stability", "hydra.sweeper.n_trials=2",
        f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    for count in (2, 4):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "UserWarning: Callback" not in done.stderr
        with (tmp_path / "trials.csv").open(newline="") as file:
            trials = list(csv.DictReader(file))
        assert len(trials) == count
        assert all(row["state"] in ("complete", "pruned") and row["step"] in ("2", "4") for row in trials)
        assert len({row["run"] for row in trials}) == count
    settings = optuna.load_study(storage=f"sqlite:///{tmp_path}/optuna.db", study_name="settings")
    assert [trial.value for trial in settings.trials] == pytest.approx([float(row["value"]) for row in trials])
    assert set(settings.best_params) == {
        "callbacks.aem.weight", "callbacks.aem.schedule._target_", "callbacks.deft.weight",
    }  # fmt: skip
    assert len(list(tmp_path.glob("*/report.html"))) == 4
