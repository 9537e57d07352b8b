"""Callbacks from the YAML and the command line of LightningCLI."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_reg.callbacks import (
    ActivationDensityRegularizer,
    ActivationL1Regularizer,
    AttentionEntropyRegularizer,
    Guard,
    QKClip,
    SigmaReparam,
)
from lightning_reg.schedules import Cosine
from tests.tiny import Tiny, loader

# Lightning 2.6 calls jsonargparse by names that its newest versions deprecate
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

YAML = """
trainer:
  accelerator: cpu
  max_epochs: 1
  log_every_n_steps: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_reg.callbacks.SigmaReparam
      init_args:
        init: one
    - class_path: lightning_reg.callbacks.AttentionEntropyRegularizer
      init_args:
        weight: 0.1
        objective: band
        bound: [0.2, 0.9]
        schedule:
          class_path: lightning_reg.schedules.Cosine
          init_args:
            duration: 0.5
    - class_path: lightning_reg.callbacks.ActivationDensityRegularizer
      init_args:
        weight: 0.05
        targets: [fc2]
"""


@pytest.fixture(autouse=True)
def _only_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(2)

    def val_dataloader(self) -> DataLoader:
        return loader(1)


def cli(*arguments: str) -> LightningCLI:
    return LightningCLI(
        Tiny, Data, args=list(arguments), run=False, save_config_callback=None, seed_everything_default=0
    )


def found(trainer: pl.Trainer, kind: type) -> list:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


def test_yaml_builds_callbacks_with_nested_schedules_and_target_lists(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(YAML)
    trainer = cli("--config", str(tmp_path / "config.yaml")).trainer
    (sigma,), (entropy,), (density,) = (
        found(trainer, kind) for kind in (SigmaReparam, AttentionEntropyRegularizer, ActivationDensityRegularizer)
    )
    assert sigma.init == "one"
    assert isinstance(entropy.schedule, Cosine)
    assert entropy.schedule(50, 100) == 0.0
    assert entropy.loss.bound == (0.2, 0.9)
    assert density.targets == ["fc2"]


def test_yaml_trains(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(YAML)
    ready = cli("--config", str(tmp_path / "config.yaml"), "--trainer.limit_val_batches=0")
    ready.trainer.fit(ready.model, ready.datamodule)
    assert 0 < ready.trainer.callback_metrics["reg/activation_density/value"] < 1


def test_command_line_appends_callbacks() -> None:
    trainer = cli(
        "--trainer.callbacks+=lightning_reg.callbacks.AttentionEntropyRegularizer", "--trainer.callbacks.weight=0.5",
        "--trainer.callbacks+=lightning_reg.callbacks.ActivationDensityRegularizer", "--trainer.callbacks.weight=2",
        "--trainer.logger=false", "--trainer.accelerator=cpu",
    ).trainer  # fmt: skip
    assert [callback.weight for callback in found(trainer, AttentionEntropyRegularizer)] == [0.5]
    assert [callback.weight for callback in found(trainer, ActivationDensityRegularizer)] == [2.0]


def test_a_negative_weight_is_refused_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        cli(
            "--trainer.callbacks+=lightning_reg.callbacks.ActivationDensityRegularizer", "--trainer.callbacks.weight=-1"
        )
    assert "`weight` must be a finite number >= 0" in capsys.readouterr().err + str(error.value)


GUARDED = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_reg.callbacks.Guard
      init_args:
        when: max_logit > 1e9
        remedy:
          - class_path: lightning_reg.callbacks.QKClip
            init_args: {threshold: 50.0, heads: 2}
          - class_path: lightning_reg.callbacks.ActivationL1Regularizer
            init_args: {weight: 1.0, layer_weights: {fc2: 0.5}}
"""


def test_a_guard_and_its_remedies_are_built_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(GUARDED)
    trainer = cli("--config", str(path)).trainer
    (guard,) = [callback for callback in trainer.callbacks if isinstance(callback, Guard)]
    clip, penalty = guard.remedies
    assert (type(clip), clip.threshold, clip.enabled) == (QKClip, 50.0, False)
    assert (type(penalty), penalty.layer_weights) == (ActivationL1Regularizer, {"fc2": 0.5})
