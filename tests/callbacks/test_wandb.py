"""An offline W&B run of a tiny training, read back: every value, the configuration and the heat map are there."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from lightning_reg.callbacks import ActivationDensityRegularizer, AttentionEntropyRegularizer
from lightning_reg.callbacks.monitor import RegMonitor
from lightning_reg.schedules import Cosine
from tests import tiny
from tests.wandb_reader import Run, read_run

BLOCKS = [f"net.blocks.{block}" for block in range(2)]


@pytest.fixture(scope="module")
def monitor() -> RegMonitor:
    return RegMonitor(heatmap_every_n_epochs=1, histogram_every_n_epochs=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, monitor: RegMonitor) -> Run:
    folder: Path = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        logger = WandbLogger(offline=True, save_dir=folder, project="tests")
        try:
            callbacks = [
                AttentionEntropyRegularizer(2.0, schedule=Cosine()),
                ActivationDensityRegularizer(0.5, epsilon=0.01),
                monitor,
            ]
            tiny.fit(tiny.Tiny(), callbacks, logger=logger, log_every_n_steps=4, max_epochs=2)
        finally:
            logger.experiment.finish()  # not `wandb.finish()`: that ends whichever run is the current one
    return read_run(folder)


def test_values_are_logged_at_the_steps_of_the_trainer(run: Run, monitor: RegMonitor) -> None:
    at_steps = [step for step in (record["step"] for record in monitor.history) if step % 4 == 3]
    assert at_steps == [3, 7, 11, 15]
    for key in ("attention_entropy/value", "attention_entropy/weight", "activation_density/weighted"):
        rows = [row for row in run.history if f"reg/{key}" in row]
        assert [row["trainer/global_step"] for row in rows] == at_steps, key
    for site in BLOCKS:
        for head in range(tiny.HEADS):
            key = f"reg/attention_entropy/heads/{site}.attention/{head}"
            rows = {row["trainer/global_step"]: row[key] for row in run.history if key in row}
            wanted = {r["step"]: r["attention_entropy"][f"{site}.attention"][head] for r in monitor.history[1:]}
            assert rows == pytest.approx(wanted)


def test_nothing_is_logged_under_two_meanings(run: Run) -> None:
    for site in BLOCKS:
        assert len(run.column(f"reg/attention_entropy/layers/{site}.attention")) == 4
        assert len(run.column(f"reg/activation_density/layers/{site}.fc2")) == 4
        assert len(run.column(f"reg/activation_density/active/{site}.fc2")) == 4
        assert len(run.column(f"reg/spectral_norm/layers/{site}.attention.qkv")) == 4


def test_summary_holds_the_last_values(run: Run, monitor: RegMonitor) -> None:
    heads = [value for row in monitor.history[-1]["attention_entropy"].values() for value in row]
    assert run.column("reg/attention_entropy/min_head")[-1] == pytest.approx(min(heads))
    assert run.column("reg/spectral_norm/max")[-1] == pytest.approx(max(monitor.history[-1]["spectral_norm"].values()))


def test_config_holds_the_arguments_of_every_callback(run: Run) -> None:
    wanted = {
        "reg/attention_entropy/weight": 2.0,
        "reg/attention_entropy/schedule": "Cosine(start=1.0, end=0.0, begin=0, duration=1.0)",
        "reg/attention_entropy/objective": "maximize",
        "reg/activation_density/weight": 0.5,
        "reg/activation_density/epsilon": 0.01,
        "reg/reg_monitor/threshold": 0.0,
        "reg/reg_monitor/heatmap_every_n_epochs": 1,
    }
    assert {key: run.config.get(key) for key in wanted} == wanted


def test_figures_are_images_of_the_run(run: Run) -> None:
    heatmaps = [row for row in run.history if "reg/attention_entropy/heatmap" in row]
    assert [row["trainer/global_step"] for row in heatmaps] == [7, 15]
    for row in heatmaps:
        entry = row["reg/attention_entropy/heatmap"]
        assert entry["_type"] == "image-file"
        with Image.open(run.media.parent / entry["path"]) as image:
            assert image.size == (entry["width"], entry["height"])
            assert len(image.convert("RGB").getcolors(2**20)) > 10
    assert len(run.column("reg/attention_entropy/histogram")) == 1
    assert len(run.column("reg/activation_density/histogram")) == 1
