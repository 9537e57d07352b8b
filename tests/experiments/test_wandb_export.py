"""Stored runs as offline W&B runs, read back; the W&B sweep file against Hydra's sweep of the same name."""

import json
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from experiments.evidence import Store
from experiments.wandb_export import DONE, experiment_of, export, main, split
from tests.conf.configs import CONF, compose
from tests.wandb_reader import _ended, read_run

RESULT = {
    "accuracy": 0.75, "steps": 30, "stopped": None, "precision": "bf16", "trials": [{"auc": 0.5}, {"auc": 0.25}],
    "loss": [[10, 2.5], [20, 1.5]], "entropy": [[10, 0.5], [30, None]], "layers": [0.125, 0.5],
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with two runs and a broken one."""
    folder = tmp_path_factory.mktemp("outputs") / "compose" / "2026-11-26_12-00-00"
    store = Store(folder)
    store.write({"task": "vit", "seed": 0, "arm": "aem+deft"}, RESULT, 12.5)
    store.write({"task": "vit", "seed": 1, "arm": "none"}, {"accuracy": 1.0}, 1.0)
    (folder / "runs" / "broken.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def exported(stored: Path) -> list[Path]:
    """Its offline runs."""
    return export(stored, "compose")


def test_a_run_comes_back_whole(exported: list[Path]) -> None:
    assert len(exported) == 2
    run = read_run(exported[0])
    assert [(row["_step"], row.get("loss"), row.get("entropy")) for row in run.history] == [
        (10, 2.5, 0.5), (20, 1.5, None),
    ]  # fmt: skip
    wanted = {"accuracy": 0.75, "steps": 30, "seconds": 12.5, "trials/0/auc": 0.5, "trials/1/auc": 0.25,
              "layers/0": 0.125, "layers/1": 0.5}  # fmt: skip
    assert {key: run.summary.get(key) for key in wanted} == wanted
    assert {key: run.config[key] for key in ("task", "seed", "arm", "precision", "stopped")} == {
        "task": "vit", "seed": 0, "arm": "aem+deft", "precision": "bf16", "stopped": None,
    }  # fmt: skip
    assert {"hardware", "versions", "commit"} <= set(run.config)


def test_runs_are_grouped_and_tagged(exported: list[Path]) -> None:
    (path,) = exported[0].glob("*.wandb")
    (run,) = [record.run for kind, record in _ended(path) if kind == "run"]
    assert (run.project, run.run_group, run.job_type) == ("lightning_reg", "compose", "aem+deft")
    assert run.display_name == "vit-0-aem+deft"
    assert sorted(run.tags) == ["aem", "deft", "seed=0", "task=vit"]
    assert path.parent.name.endswith(run.run_id)


def test_a_second_export_adds_only_what_is_new(
    exported: list[Path], stored: Path, capsys: pytest.CaptureFixture
) -> None:
    assert export(stored, "compose") == []
    (exported[1] / DONE).unlink()  # as an interruption leaves it
    main([str(stored)])
    assert "1 new runs: wandb sync" in capsys.readouterr().out
    runs = sorted(path.name.split("-")[-1] for path in stored.glob("wandb/offline-run-*"))
    assert runs == sorted(path.name.split("-")[-1] for path in exported)


def test_the_folder_says_which_experiment_it_is(stored: Path, tmp_path: Path) -> None:
    assert experiment_of(stored) == "compose"
    assert experiment_of(Path("outputs/aem_mil")) == "aem_mil"
    with pytest.raises(FileNotFoundError, match="There are no complete runs in"):
        export(tmp_path, "compose")


def test_runs_of_a_sweep_become_arms_with_curves(tmp_path: Path) -> None:
    trace = {"step": [10, 20], "loss": [4.0, None], "max_logit": [1.5, 2.5]}
    row = {"remedy": "qk_norm+z_loss", "learning_rate": 0.01, "seed": 2, "initial_loss": 5.5, "final_loss": 1.25,
           "steps": 20, "seconds": 3.0, "error": "", "trace": trace, "info": {"commit": "abc"},
           "settings": {"model": {"width": 8}}}  # fmt: skip
    for name, text in (("a", json.dumps(row)), ("b", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    (path,) = export(tmp_path, "lr_sensitivity")
    run = read_run(path)
    assert [(row["_step"], row.get("loss"), row.get("max_logit")) for row in run.history] == [
        (10, 4.0, 1.5), (20, None, 2.5),
    ]  # fmt: skip
    assert {key: run.summary[key] for key in ("initial_loss", "final_loss", "seconds")} == {
        "initial_loss": 5.5, "final_loss": 1.25, "seconds": 3.0,
    }  # fmt: skip
    assert run.config["arm"] == "qk_norm+z_loss"
    assert run.config["commit"] == "abc"
    assert export(tmp_path, "lr_sensitivity") == []


def test_only_rising_steps_make_a_curve() -> None:
    numbers, words, curves = split({"a": [[1, 2.0], [1, 3.0]], "b": [[3, 4.0]], "c": [], "d": True})
    assert numbers == {"a/0/0": 1, "a/0/1": 2.0, "a/1/0": 1, "a/1/1": 3.0}
    assert words == {"c": [], "d": True}
    assert curves == {3: {"b": 4.0}}


def test_the_wandb_sweep_is_the_sweep_of_hydra() -> None:
    sweep = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())
    hydra_config = OmegaConf.load(CONF / "sweep" / "density.yaml")
    overrides = [f"{key}={value}" for key, value in hydra_config.hydra.sweeper.params.items()]
    (choices,) = [list(map(float, o.value().list)) for o in OverridesParser.create().parse_overrides(overrides)]
    assert sweep["parameters"] == {"callbacks.deft.weight": {"values": choices}}
    assert sweep["method"] == "grid"
    # as the agent makes it
    args = create_sweep_command_args({"args": {key: {"value": "0.3"} for key in sweep["parameters"]}})
    line = [part for chunk in create_sweep_command(sweep["command"]) for part in args.get(chunk[2:-1], [chunk])]
    assert line[:4] == ["${env}", "${interpreter}", "-m", "experiments.train"]
    config = compose(*line[4:])
    assert config.callbacks.deft.weight == 0.3
    assert sweep["metric"] == {"name": config.objective, "goal": "maximize"}
    swept = compose("experiment=quickstart", "sweep=density", "logger=wandb")
    swept.callbacks.deft.weight = 0.3
    assert config == swept
