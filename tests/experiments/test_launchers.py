"""Sweeps through engines that exist: the launchers' files compose, and two jobs really run at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from experiments.run_info import ROOT
from tests.conf.configs import CONF

PLUGINS = {"cores": "joblib", "slurm": "submitit", "slurm_local": "submitit", "ray_cluster": "ray"}


def job(cfg: DictConfig) -> float:
    """What the sweeps below run: says when and where, and waits for the other job, a minute at most."""
    folder = Path(cfg.output_dir)
    start = time.time()
    (folder / "started").touch()
    while len(list(folder.parent.glob("*/started"))) < 2 and time.time() < start + 60:
        time.sleep(0.05)
    both = len(list(folder.parent.glob("*/started"))) == 2
    (folder / "job.json").write_text(json.dumps({"seed": cfg.seed, "process": os.getpid(), "both": both}))
    return float(cfg.seed)


def needs(launcher: str) -> None:
    """The plugin, or a skip."""
    pytest.importorskip(f"hydra_plugins.hydra_{PLUGINS[launcher]}_launcher")


def test_every_file_is_tested() -> None:
    assert {path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")} == set(PLUGINS)


@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_launcher_composes_and_says_how_it_is_used(launcher: str) -> None:
    assert (
        f"hydra/launcher={launcher}" in (CONF / "hydra" / "launcher" / f"{launcher}.yaml").read_text().splitlines()[0]
    )
    needs(launcher)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["experiment=quickstart", "sweep=density", f"hydra/launcher={launcher}"]
        config = hydra.compose("train", overrides, return_hydra_config=True)
    assert PLUGINS[launcher] in config.hydra.launcher._target_


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["cores", "slurm_local"])
def test_two_jobs_run_at_once(launcher: str, tmp_path: Path) -> None:
    needs(launcher)
    command = [
        sys.executable, "-m", "experiments.train", "--multirun", "experiment=quickstart", "seed=3,4",
        f"task={__name__}.job", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs = [json.loads((tmp_path / name / "job.json").read_text()) for name in "01"]
    assert [found["seed"] for found in jobs] == [3, 4]
    assert len({found["process"] for found in jobs}) == 2
    assert all(found["both"] for found in jobs)
