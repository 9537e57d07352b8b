"""Every experiment trains, reports and returns its objective; sweeps work from the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.data import fashion_mnist
from experiments.report import write_report
from experiments.run_info import ROOT
from experiments.runs import load_run
from experiments.summary import comparison
from experiments.train import callbacks, main, objective
from lightning_reg.callbacks import RegMonitor, Regularizer, SigmaReparam
from tests.conf.configs import compose, options
from tests.experiments.fashion import write_fashion
from tests.wandb_reader import _ended

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),  # the checkpoint folder, on the second fit
    pytest.mark.filterwarnings("ignore:.*number of training batches.*"),
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Output and objective of the quickstart, a few steps long."""
    output = tmp_path_factory.mktemp("quickstart")
    returned = main.__wrapped__(compose("experiment=quickstart", "debug=fast", "timing_rounds=1", output=output))
    return output, returned


@pytest.mark.parametrize("experiment", [name for name in options("experiment") if name != "quickstart"])
def test_every_experiment_runs(experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path, train=5200, test=64)
    monkeypatch.setattr(fashion_mnist, "find_files", lambda root: tmp_path)
    config = compose(f"experiment={experiment}", "debug=fast", "arms=[regularized]", output=tmp_path / "out")
    assert 0 <= main.__wrapped__(config) <= 1
    assert (tmp_path / "out" / "report.html").exists()


def test_the_quickstart_returns_the_validation_accuracy(quickstart: tuple[Path, float]) -> None:
    output, returned = quickstart
    arms = json.loads((output / "summary.json").read_text())["arms"]
    assert returned == arms["regularized"]["val/accuracy"]
    assert set(arms) == {"regularized", "plain"}


def test_both_arms_are_logged_and_only_one_is_regularized(quickstart: tuple[Path, float]) -> None:
    _, (regularized, plain) = load_run(quickstart[0])
    assert "reg/attention_entropy/weighted" in regularized.metrics
    assert not [key for key in plain.metrics if key.endswith("/weighted")]
    for arm in (regularized, plain):
        assert len(arm.sites("attention_entropy")) == 4
        assert len(arm.sites("activation_density")) == 4
        assert len(arm.sites("spectral_norm")) >= 16
        assert len(arm.metrics["train/loss"]) == 4


def test_the_arms_start_from_the_same_model_and_see_the_same_batch(quickstart: tuple[Path, float]) -> None:
    _, (regularized, plain) = load_run(quickstart[0])
    first = [arm.metrics["train/loss"][0][1] for arm in (regularized, plain)]
    assert first[0] == pytest.approx(first[1], abs=1e-5)


def test_the_overhead_is_measured(quickstart: tuple[Path, float]) -> None:
    overhead = json.loads((quickstart[0] / "summary.json").read_text())["overhead"]
    assert 0.2 < overhead["median"] < 20
    assert overhead["low"] <= overhead["median"] <= overhead["high"]


def test_the_report_is_one_file_that_loads_nothing(quickstart: tuple[Path, float]) -> None:
    page = (quickstart[0] / "report.html").read_text()
    loads = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", page)
    assert [link for pair in loads for link in pair if link] == ["data:,"]
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", page)
    assert len(page) < 6e6


def test_the_report_shows_both_arms(quickstart: tuple[Path, float]) -> None:
    page = (quickstart[0] / "report.html").read_text()
    for text in ("training loss", "validation accuracy", "Attention entropy", "Activation density", "Spectral norms",
                 "Layer by head", "Strength of the penalties", "regularized, by layer", "plain, by layer"):  # fmt: skip
        assert text in page, text
    assert page.count("<svg") >= 12
    assert "nan" not in re.findall(r'points="[^"]*"', page)


def test_the_report_can_be_written_again(quickstart: tuple[Path, float]) -> None:
    path = quickstart[0] / "report.html"
    before = path.read_text()
    path.unlink()
    write_report(quickstart[0])
    assert path.read_text() == before


def test_the_table_holds_what_the_run_measured(quickstart: tuple[Path, float]) -> None:
    rows = {row.label: row.values for row in comparison(*load_run(quickstart[0]))}
    assert {
        "test accuracy",
        "attention entropy",
        "activation density",
        "spectral norm",
        "time per step",
    } <= set(rows)
    assert all(len(values) == 2 for values in rows.values())


def test_the_checkpoint_loads_without_the_library(quickstart: tuple[Path, float]) -> None:
    import torch
    from hydra.utils import instantiate

    (path,) = (quickstart[0] / "regularized" / "checkpoints").glob("*.ckpt")
    state = torch.load(path, weights_only=False)["state_dict"]
    instantiate(compose("experiment=quickstart").model).load_state_dict(state)


def test_the_plain_arm_keeps_the_monitor_only() -> None:
    config = compose("experiment=quickstart")
    plain = callbacks(config, "plain")
    assert any(isinstance(callback, RegMonitor) for callback in plain)
    assert not any(isinstance(callback, (Regularizer, SigmaReparam)) for callback in plain)


def test_wandb_groups_and_tags_the_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = compose("experiment=quickstart", "debug=fast", "logger=wandb_offline", "seed=3", output=tmp_path)
    main.__wrapped__(config)
    found = {}
    for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"):
        (run,) = [record.run for kind, record in _ended(path) if kind == "run"]
        assert (run.project, run.run_group) == ("lightning_reg", "quickstart")
        found[run.job_type] = sorted(run.tags)
    assert found == {"regularized": ["aem", "deft", "prosparse", "seed=3", "sigma_reparam"], "plain": ["seed=3"]}


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="`arms` may hold regularized and plain, got 'other'"):
        callbacks(compose("experiment=quickstart"), "other")


def test_an_unknown_objective_is_refused() -> None:
    config = OmegaConf.create({"arms": ["regularized"], "objective": "val/acuracy"})
    with pytest.raises(ValueError, match="`objective=val/acuracy` was not logged; there are val/accuracy"):
        objective(config, {"regularized": {"val/accuracy": 0.5}})


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="finished run"):
        write_report(tmp_path)


@pytest.mark.slow
def test_multirun_from_the_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "experiments.train", "--multirun", "experiment=quickstart", "debug=fast",
        "arms=[regularized]", "callbacks.deft.weight=0,1", f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [(tmp_path / job / "report.html").read_text() for job in "01"]
    assert all("callbacks.deft.weight" in page for page in pages)
