"""The commands that a stranger types."""

import os
import stat
import subprocess

import pytest

from experiments.run_info import ROOT
from tests.conf.configs import options


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("target", ["train", "test", "lint", "bench"])
def test_every_target_installs_first(target: str) -> None:
    # as on a fresh machine: an environment that does not exist yet
    commands = make("--dry-run", target, "VENV=.absent")
    assert commands.index("-m venv .absent") < commands.index("install --quiet") < commands.rindex(".absent/bin/")


def test_train_passes_experiment_and_arguments_on() -> None:
    commands = make("--dry-run", "train", "EXPERIMENT=fashion_mnist", "ARGS=seed=1 logger=csv")
    assert commands.rstrip().endswith("python -m experiments.train experiment=fashion_mnist seed=1 logger=csv")


def test_help_names_targets_and_experiments() -> None:
    text = make("help")
    assert all(word in text for word in ("make train", "make test", *options("experiment")))


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.stat(script).st_mode & stat.S_IXUSR
    assert script.read_text().splitlines()[-1] == "make test"
    assert "set -euo pipefail" in script.read_text()
