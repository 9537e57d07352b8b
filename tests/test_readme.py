"""The README runs, and says what exists."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml

import lightning_reg.callbacks
from tests import tiny

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed.*"),
]


def test_python_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = {"model": tiny.Tiny(), "data": tiny.loader(8)}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, str(README), "exec"), names)
    import wandb

    wandb.finish()
    assert "tensor(" in capsys.readouterr().out


def test_yaml_block_builds() -> None:
    (block,) = [yaml.safe_load(block) for language, block in BLOCKS if language == "yaml"]
    (entry,) = block["trainer"]["callbacks"]
    schedule = entry["init_args"].pop("schedule")
    built = load(entry["class_path"])(**entry["init_args"], schedule=load(schedule["class_path"])())
    assert isinstance(built, pl.Callback)


def load(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def test_hydra_line_names_presets_that_exist() -> None:
    (names,) = re.findall(r"\+lightning_reg=\[(.*?)\]", README.read_text())
    presets = Path(lightning_reg.__file__).parent / "conf" / "lightning_reg"
    assert all((presets / f"{name}.yaml").exists() for name in names.split(","))


def test_method_table_lists_every_callback_and_preset() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", README.read_text(), re.MULTILINE)
    callbacks = {
        name
        for name in lightning_reg.callbacks.__all__
        if isinstance(getattr(lightning_reg.callbacks, name), type) and name != "Regularizer"
    }
    assert {name for name, _ in rows} == callbacks
    presets = {path.stem for path in (Path(lightning_reg.__file__).parent / "conf" / "lightning_reg").glob("*.yaml")}
    assert {name for _, cell in rows for name in re.findall(r"`(\w+)`", cell)} == presets


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200
