"""Runs that are behind the others are pruned, and told apart from those that fail."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

optuna = pytest.importorskip("optuna")
tune = pytest.importorskip("experiments.tune")


def run(storage: str, name: str, values: list[float]) -> bool:
    """Report one value a step; whether the run was stopped."""
    pruner = tune.Pruner(storage, name, optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0), "val/loss")
    trainer: Any = SimpleNamespace(
        is_global_zero=True, sanity_checking=False, state=SimpleNamespace(fn="fit"), should_stop=False, global_step=0,
        callback_metrics={}, strategy=SimpleNamespace(broadcast=lambda value: value),
    )  # fmt: skip
    pruner.on_fit_start(trainer, None)  # type: ignore[arg-type]
    for step, value in enumerate(values, 1):
        trainer.global_step, trainer.callback_metrics = step, {"val/loss": torch.tensor(value)}
        pruner.on_validation_end(trainer, None)  # type: ignore[arg-type]
        if trainer.should_stop:
            break
    pruner.on_fit_end(trainer, None)  # type: ignore[arg-type]
    return trainer.should_stop


def test_a_run_behind_the_median_is_pruned(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'runs.db'}"
    assert not run(storage, "first", [3.0, 2.0])
    assert not run(storage, "second", [3.0, 1.0])
    assert not run(storage, "better", [2.0, 1.0])
    assert run(storage, "worse", [4.0, 4.0])
    run(storage, "broken", [2.0, float("nan")])
    found = {row["run"]: (row["state"], row["step"]) for row in tune.rows(tune.open_study(storage, True).trials)}
    assert found == {
        "first": ("complete", 2), "second": ("complete", 2), "better": ("complete", 2), "worse": ("pruned", 1),
        "broken": ("failed", 1),
    }  # fmt: skip
