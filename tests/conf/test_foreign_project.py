"""The presets in somebody else's Hydra project, from the wheel as it is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from experiments.run_info import ROOT
from tests.conf.configs import presets

APP = """
import hydra, lightning_reg, json
from omegaconf import OmegaConf
@hydra.main(version_base="1.3", config_path="configs", config_name="main")
def main(cfg):
    with open(cfg.log, "a") as file:
        file.write(json.dumps(OmegaConf.to_container(cfg, resolve=True)) + "\\n")
    if cfg.build:
        print([type(hydra.utils.instantiate(node)).__name__ for node in cfg.callbacks.values()], lightning_reg.__file__)
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "main.yaml").write_text(f"callbacks: {{}}\nbuild: false\nlog: {tmp_path}/log.jsonl\n")
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


def run(project: Path, site: Path, *arguments: str) -> str:
    """Run the project's script with the unpacked wheel on the path; returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "app.py", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_presets_and_plugin_but_no_plugin_namespace(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"lightning_reg/conf/lightning_reg/{preset}.yaml" for preset in presets()} <= set(names)
    assert "hydra_plugins/lightning_reg_searchpath.py" in names
    assert "hydra_plugins/__init__.py" not in names
    assert not [name for name in names if name.startswith(("experiments/", "conf/", "tests/"))]


@pytest.mark.slow
def test_presets_are_found_and_built(project: Path, site: Path) -> None:
    printed = run(project, site, "+lightning_reg=[aem,deft]", "callbacks.deft.weight=3", "build=true")
    assert "['AttentionEntropyRegularizer', 'ActivationDensityRegularizer']" in printed
    assert str(site) in printed
    assert '"weight": 3' in (project / "log.jsonl").read_text()


@pytest.mark.slow
def test_presets_can_be_swept(project: Path, site: Path) -> None:
    run(project, site, "--multirun", "+lightning_reg=aem,deft")
    first, second = (project / "log.jsonl").read_text().splitlines()
    assert '"aem"' in first
    assert '"deft"' in second
