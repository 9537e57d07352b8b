"""``trainer=ddp`` and ``trainer=fsdp`` on two processes over gloo: the quickstart, every method on, ends the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.run_info import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
STEPS = ["trainer.max_steps=12", "trainer.val_check_interval=6", "trainer.log_every_n_steps=1"]


def losses(strategy: str, folder: Path) -> dict[str, dict[str, float]]:
    command = [
        sys.executable, "-m", "experiments.train", "experiment=quickstart", f"trainer={strategy}", *STEPS,
        "timing_rounds=0", "logger=csv", f"hydra.run.dir={folder / strategy}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distributed_backend=gloo" in done.stdout + done.stderr
    assert "with 2 processes" in done.stdout + done.stderr
    assert done.stdout.count("Report, opens in any browser") == 1
    arms = json.loads((folder / strategy / "summary.json").read_text())["arms"]
    return {
        arm: {key: scores[key] for key in ("val/loss", "test/loss", "test/accuracy")} for arm, scores in arms.items()
    }


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    copied, sharded = losses("ddp", tmp_path), losses("fsdp", tmp_path)
    for arm in ("regularized", "plain"):
        assert sharded[arm] == pytest.approx(copied[arm], abs=1e-4)
        # of all 360 images, not of the half that one process sees
        assert copied[arm]["test/accuracy"] * 360 == pytest.approx(round(copied[arm]["test/accuracy"] * 360), abs=1e-3)
    assert copied["regularized"]["val/loss"] != pytest.approx(copied["plain"]["val/loss"], abs=1e-2)
