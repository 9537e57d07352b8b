"""The learning-rate sweep: its configuration, its runs, and what is read from them."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments import lr_sensitivity as sweep
from experiments.lr_sensitivity_results import (
    Run,
    read,
    read_trace,
    spread,
    summarise,
    table,
    watch_table,
    write_csv,
    write_results,
)
from experiments.models import ImageClassifier, LanguageModel
from experiments.models.classifier import cosine
from experiments.resolvers import choices, preset_choices, remedy
from experiments.run_info import ROOT
from experiments.train import build, main
from lightning_reg.early_warning import EarlyWarning
from lightning_reg.functional.lr_sensitivity import LR_GRID
from tests.conf.configs import CONF, compose, targets, unknown_keys
from tests.conf.configs import presets as shipped_presets

TINY = (
    "model.net.embed_dim=8",
    "model.net.depth=1",
    "model.net.num_heads=2",
    "trainer.max_steps=4",
    "data.datamodule.batch_size=64",
)
RESULTS = ROOT / "experiments" / "results"
KEPT: list[pl.LightningModule] = []
LOSSES: list[float] = []


def config(output: Path | str, *overrides: str) -> DictConfig:
    return compose("sweep=lr_sensitivity", *TINY, *overrides, output=output)


def row(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


class Keep(pl.Callback):
    """Lets a test look at the trained model."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        KEPT[:] = [pl_module]


class Losses(pl.Callback):
    """The loss of each training step, computed again before it, in the mode and with the weights of the step."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            LOSSES.clear()
        with torch.no_grad():
            LOSSES.append(float(F.cross_entropy(pl_module.net(batch[0]), batch[1])))


class Raise(pl.Callback):
    """Fails in the second step."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind, self.message = kind, message

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            raise {"runtime": RuntimeError, "value": ValueError, "key": KeyError}[self.kind](self.message)


def fails(kind: str, message: str) -> list[str]:
    return [f"++callbacks.fails={{_target_: {__name__}.Raise, kind: {kind}, message: '{message}'}}"]


def validation_loss(model: pl.LightningModule, data: pl.LightningDataModule) -> float:
    """Over all validation images at once, in double precision."""
    data.setup("fit")
    images, labels = data.parts["val"]
    with torch.no_grad():
        return float(F.cross_entropy(model.double().eval().net(images.double()), labels))


def test_losses_are_those_of_the_model_before_and_after(tmp_path: Path) -> None:
    cfg = config(tmp_path, f"++callbacks.keep._target_={__name__}.Keep", "seed=3")
    returned = sweep.run(cfg)
    result = row(tmp_path)
    pl.seed_everything(3, workers=True, verbose=False)
    data, untrained = build(cfg.data.datamodule), build(cfg.model)
    assert result["initial_loss"] == pytest.approx(validation_loss(untrained, data), abs=1e-5)
    assert result["final_loss"] == pytest.approx(validation_loss(KEPT[0], data), abs=1e-5)
    assert abs(result["final_loss"] - result["initial_loss"]) > 1e-4
    assert returned == min(result["final_loss"], result["initial_loss"])
    assert (result["remedy"], result["learning_rate"], result["seed"], result["steps"]) == ("keep", 1e-3, 3, 4)


def test_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    first = sweep.run(config(tmp_path))
    monkeypatch.setattr(sweep, "train", lambda cfg: pytest.fail("trained again"))
    assert sweep.run(config(tmp_path)) == first
    assert "done before" in capsys.readouterr().out
    # what does not decide the result may change
    assert sweep.run(config(tmp_path, "presets=[none]", "seeds=[0]", "logger=csv")) == first


def test_a_run_with_other_settings_is_not_taken_for_it(tmp_path: Path) -> None:
    sweep.run(config(tmp_path))
    before = row(tmp_path)
    with pytest.raises(ValueError, match=r"run.json was run with another model.warmup: give another `hydra.sweep"):
        sweep.run(config(tmp_path, "+model.warmup=0.2"))
    with pytest.raises(ValueError, match="with another callbacks, callbacks.aem"):
        sweep.run(config(tmp_path, "lightning_reg=[aem]"))
    assert row(tmp_path) == before


def test_a_training_that_explodes_is_recorded_and_ended(tmp_path: Path, capsys: Any) -> None:
    returned = sweep.run(config(tmp_path, "model.learning_rate=1e30", "trainer.max_steps=40"))
    result = row(tmp_path)
    assert result["final_loss"] is None
    assert result["steps"] == 10
    assert returned == result["initial_loss"] == pytest.approx(2.3, abs=0.3)
    assert "diverged after 10 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("runtime", "`reg/aem/value` is nan at step 1: the activations there are not finite."),
        ("value", "`density` is inf at step 1; a controller needs a finite number."),
        ("runtime", "The total norm of order 2.0 for gradients is non-finite"),
    ],
)
def test_errors_about_numbers_count_as_divergence(tmp_path: Path, kind: str, message: str) -> None:
    sweep.run(config(tmp_path, *fails(kind, message)))
    assert row(tmp_path)["final_loss"] is None
    assert message in row(tmp_path)["error"]


@pytest.mark.parametrize(
    ("kind", "message"), [("runtime", "shapes do not fit the information"), ("value", "bad targets"), ("key", "nan")]
)
def test_other_errors_are_raised_and_leave_no_run(tmp_path: Path, kind: str, message: str, capsys: Any) -> None:
    with pytest.raises((RuntimeError, ValueError, KeyError), match=message):
        sweep.run(config(tmp_path, *fails(kind, message)))
    assert list(tmp_path.iterdir()) == []
    assert "failed:" in capsys.readouterr().out


def test_a_run_without_a_last_validation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no validation after the last step, 4: `trainer.val_check_interval` must div"):
        sweep.run(config(tmp_path, "trainer.val_check_interval=3"))


def test_settings_of_a_preset_that_is_not_there_count_for_nothing(tmp_path: Path) -> None:
    plain, other = config(tmp_path), config(tmp_path, "++callbacks.aem.weight=3.0")
    assert (plain.remedy, other.remedy) == ("none", "none")
    assert compose("experiment=quickstart", "sweep=lr_sensitivity", "lightning_reg=[]").remedy == "none"
    assert sweep.remedies(other) == []
    assert sweep.deciding(plain) == sweep.deciding(other)
    (aem,) = sweep.remedies(config(tmp_path, "lightning_reg=[aem]", "++callbacks.aem.weight=3.0"))
    assert aem.weight == 3.0


def test_the_remedy_is_applied(tmp_path: Path) -> None:
    losses = []
    for name in ("", "sigma_reparam"):
        sweep.run(config(tmp_path / name, f"lightning_reg=[{name}]"))
        losses.append((row(tmp_path / name)["initial_loss"], row(tmp_path / name)["final_loss"]))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-4)  # sigma-Reparam starts from the same function
    assert losses[0][1] != pytest.approx(losses[1][1], abs=1e-4)


def test_lists_become_choices() -> None:
    assert choices([3e-4, 0.1]) == "0.0003,0.1"
    assert preset_choices(["none", "aem", "sigma_reparam+z_loss"]) == "[],[aem],[sigma_reparam,z_loss]"
    nodes = {"progress_bar": None, "a": {"_target_": "x"}, "setting": {"weight": 1}, "b": {"_target_": "y"}}
    assert remedy(_root_=OmegaConf.create({"callbacks": nodes})) == "a+b"
    assert remedy(_root_=OmegaConf.create({"callbacks": {"progress_bar": None}})) == "none"


BASIC = ["none", "qk_norm", "sigma_reparam", "qk_clip", "softcap", "z_loss"]


@pytest.mark.parametrize(
    ("name", "presets"),
    [("lr_sensitivity", BASIC), ("lr_sensitivity_lm", [*BASIC, "entropy_floor", "qk_norm+z_loss"])],
)
def test_the_sweep_is_the_papers(name: str, presets: list[str]) -> None:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", [f"sweep={name}", "output_dir=unused"], return_hydra_config=True)
    assert tuple(cfg.learning_rates) == LR_GRID
    assert list(cfg.presets) == presets
    assert {part for preset in presets for part in preset.split("+")} - {"none"} <= set(shipped_presets())
    assert dict(cfg.hydra.sweeper.params) == {
        "seed": "0,1,2",
        "lightning_reg": preset_choices(presets),
        "model.learning_rate": "0.0003,0.001,0.003,0.01,0.03,0.1,0.3",
    }
    checked = list(targets(compose(f"sweep={name}")))
    assert {path for path, node in checked if unknown_keys(node)} == set()
    assert len(checked) >= 4
    model = build(cfg.model)
    assert (tuple(model.betas), model.minimum, cfg.trainer.gradient_clip_val) == ((0.9, 0.95), 1e-5, 1.0)
    assert model.weight_decay * model.learning_rate == pytest.approx(1e-4)
    assert cfg.trainer.val_check_interval == cfg.trainer.max_steps


@pytest.mark.parametrize("make", [ImageClassifier, LanguageModel])
def test_schedule_ends_at_its_minimum_and_decay_ignores_the_peak(make: Callable[..., pl.LightningModule]) -> None:
    for rate in (1e-3, 1e-1):
        model = make(torch.nn.Linear(2, 3), rate, 1e-4, 0.1, (0.9, 0.95), minimum=1e-5, independent_decay=True)
        model._trainer = SimpleNamespace(estimated_stepping_batches=50)
        made = model.configure_optimizers()
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        group, bare = optimizer.param_groups
        assert (group["betas"], group["weight_decay"] * rate, bare["weight_decay"]) == ((0.9, 0.95), 1e-4, 0.0)
        rates = [group["lr"]]
        for _ in range(50):
            optimizer.step()
            schedule.step()
            rates.append(group["lr"])
        assert max(rates) == rates[5] == pytest.approx(rate)
        assert rates[-1] == pytest.approx(1e-5)
        assert min(rates) == pytest.approx(min(1e-5, rate / 5))


def test_cosine_by_hand() -> None:
    assert [cosine(step, 10, 0.2, 0.5) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5])
    assert [cosine(step, 10, 0.2) for step in (2, 6, 10)] == pytest.approx([1.0, 0.5, 0.0])


def test_the_language_models_have_two_million_parameters() -> None:
    net = build(compose("sweep=lr_sensitivity_lm").model).net
    # 4 layers of 4 x 192 x 192, 3 x 192 x 576 and two norms; embedding and head of 256 x 192; the last norm
    assert sum(p.numel() for p in net.parameters()) == 4 * (147456 + 331776 + 384) + 2 * 49152 + 192


def test_a_run_keeps_its_trace(tmp_path: Path) -> None:
    cfg = config(
        tmp_path, f"++callbacks.keep._target_={__name__}.Losses", "trainer.max_steps=20", "lightning_reg=[aem]"
    )
    sweep.run(cfg)
    trace = row(tmp_path)["trace"]
    assert trace["step"] == [10, 20]
    # the losses without the penalty, which the returned ones contain
    assert trace["loss"] == pytest.approx([sum(LOSSES[:10]) / 10, sum(LOSSES[10:]) / 10])
    assert all(value > 0 for value in trace["max_logit"])
    assert all(0 < low <= mean <= 1 for low, mean in zip(trace["entropy_min"], trace["entropy_mean"]))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def trace_of(losses: list[float | None], logits: list[float | None]) -> dict[str, Any]:
    steps = [10 * (place + 1) for place in range(len(losses))]
    lows = [round(1 - place / 100, 2) for place in range(len(losses))]
    return {"step": steps, "loss": losses, "max_logit": logits, "entropy_mean": lows, "entropy_min": lows}


def test_a_trace_says_when_the_loss_left_and_what_it_looked_like() -> None:
    # of 400 steps a mean over 40, four points: the first mean with a 3 is 0.25 above 2
    found = read_trace(trace_of([2.0] * 20 + [3.0] * 20, [5.0] * 20 + [6.0] + [5.0] * 18 + [2e4]), 400)
    assert found == {
        "watched": True, "diverged": 210.0, "logit": 6.0, "entropy": 0.8, "warned": None, "named": None,
        "passed": 400.0,
    }  # fmt: skip
    quiet = read_trace(trace_of([2.0] * 40, [5.0] * 39 + [None]), 400)
    assert (quiet["diverged"], quiet["logit"], quiet["entropy"]) == (None, 5.0, 0.61)


def test_a_trace_that_ends_in_no_number_has_diverged() -> None:
    assert read_trace(trace_of([2.0] * 9 + [None], [5.0] * 9 + [None]), 400)["diverged"] == 100.0
    assert read_trace(trace_of([2.0, None], [5.0, None]), 400)["diverged"] == 20.0  # too short for a mean
    assert read_trace(trace_of([2.0, 2.0], [5.0, 5.0]), 400)["diverged"] is None
    assert read_trace(trace_of([], []), 400) == {}


def test_the_warning_of_a_trace_is_the_librarys() -> None:
    logits: list[float | None] = [1e4 * (10 * (place + 1) / 300) ** 4 for place in range(40)]
    found = read_trace(trace_of([2.0] * 40, logits), 400)
    warning = EarlyWarning(until=400)
    first = next(
        (step, named) for step in range(10, 410, 10) if (named := warning.update(step, logits[step // 10 - 1]))
    )
    assert (found["warned"], found["named"]) == first
    assert found["named"] == pytest.approx(300)
    assert found["passed"] == 300.0


def test_the_table_of_divergences_by_hand() -> None:
    def watched(remedy: str, seed: int, **what: float) -> Run:
        return Run(remedy, 0.1, seed, 5.0, 2.0, steps=1000, watched=True, **what)

    runs = [
        watched("none", 0, diverged=500.0, logit=1000.0, entropy=0.25, warned=450.0),  # exactly 5 % ahead
        watched("none", 1, diverged=500.0, logit=3000.0, entropy=0.75, warned=460.0),
        watched("none", 2, logit=10.0, entropy=0.9, warned=100.0),
        watched("none", 3, logit=20.0, entropy=0.9),
        watched("qk_norm", 0, logit=8.0, entropy=0.9),
        Run("softcap", 0.1, 0, 5.0, 2.0),  # from an older file
    ]
    none, qk_norm, everything = watch_table(runs)
    assert none == (
        "none", "2", "2e+03 (1e+03 to 3e+03)", "0.500 (0.250 to 0.750)", "15 (10 to 20)", "50 % (1)", "45 (40)", "2",
        "50 % (1)",
    )  # fmt: skip
    assert qk_norm == ("qk_norm", "0", "", "", "8 (8 to 8)", "", "", "1", "0 % (0)")
    assert everything[:2] == ("all", "2")
    assert everything[-2:] == ("3", "33 % (1)")


def test_what_was_watched_comes_back_from_the_table(tmp_path: Path) -> None:
    runs = [
        Run("none", 0.1, 0, 5.0, 2.0, 1000, watched=True, diverged=500.0, logit=1e3, entropy=0.25, warned=450.0),
        Run("none", 0.2, 0, 5.0, 2.0, 1000),
    ]
    write_csv(runs, tmp_path / "some.csv")
    assert read([tmp_path / "some.csv"])[0] == runs
    text = write_results([tmp_path / "some.csv"]).read_text()
    assert "| none | 1 | 1e+03 (1e+03 to 1e+03) | 0.250 (0.250 to 0.250) |  | 100 % (1) | 50 (50) | 0 |  |" in text


def runs_of(remedy: str, seed: int, *losses: float, start: float = 2.0) -> list[Run]:
    return [Run(remedy, rate, seed, start, loss) for rate, loss in zip((1e-3, 1e-2, 1e-1), losses)]


SYNTHETIC = [
    # 1, 0, 1 above the best; 0.5, 0, 1 above it
    *runs_of("none", 0, 2.0, 1.0, math.nan),
    *runs_of("none", 1, 1.5, 1.0, 9.0),
    # 0.5, 0, 0.5 above it; seed 1 has no last learning rate
    *runs_of("aem", 0, 1.5, 1.0, 1.5),
    *runs_of("aem", 1, 1.2, 0.6),
]


def test_the_table_by_hand() -> None:
    curves = summarise(SYNTHETIC)
    assert [curve.remedy for curve in curves] == ["aem", "none"]
    assert curves[1].sensitivity == pytest.approx({0: 2 / 3, 1: 1.5 / 3})
    assert curves[0].sensitivity == pytest.approx({0: 1 / 3})
    assert curves[0].incomplete == [1]
    assert torch.tensor(curves[0].losses()).tolist() == [
        pytest.approx(point) for point in ((1e-3, 1.35, 1.2, 1.5), (1e-2, 0.8, 0.6, 1.0), (1e-1, 1.5, 1.5, 1.5))
    ]
    assert curves[1].losses()[2] == pytest.approx((1e-1, 2.0, 2.0, 2.0))
    aem, none = table(curves)
    # half of t(0.975, 1) = 12.7062 times 1/6, the difference of the two
    assert none == ("none", "0.5833 ± 1.0589", "", "1.0000 ± 0.0000", "0.01", "3 of 6 (1 not finite)", "2")
    assert aem == ("aem", "0.3333", "-0.3333", "1.0000", "0.01", "0 of 5", "1")


def test_interval_is_students() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.0000 ± 2.4841"  # 4.30265 / sqrt(3)
    assert spread([]) == ""
    assert spread([0.5], "+") == "+0.5000"


def test_files_are_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    write_csv(SYNTHETIC, path)
    page = write_results([path])
    assert page == tmp_path / "some.md"
    text = page.read_text()
    assert "| aem | 0.3333 | -0.3333 |" in text
    assert "aem: left out of the metric, because learning rates are missing: seed 1." in text
    assert (tmp_path / "some.png").stat().st_size > 10_000
    html = (tmp_path / "some.html").read_text()
    assert all(name in html for name in ("aem", "none", "before training", "peak learning rate"))
    again = {str(run) for run in read([path])[0]}
    assert again == {str(run) for run in SYNTHETIC}


def test_later_sources_win_and_parts_are_joined(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    write_csv(runs_of("none", 0, 1.0, 2.0), first)
    write_csv([Run("none", 1e-2, 0, 2.0, 0.5), Run("none", 1e-1, 0, 2.0, 0.7)], second)
    assert [run.final_loss for run in read([first, second])[0]] == [1.0, 0.5, 0.7]


def test_no_runs_are_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.csv"):
        with pytest.raises(
            FileNotFoundError, match="no finished run in .*: give the folder of a sweep, or a CSV of one"
        ):
            write_results([path])


def test_multirun_ends_with_curves(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "experiments.train", "--multirun", "sweep=lr_sensitivity", *TINY, "seeds=[5]",
        "presets=[none,aem]", "learning_rates=[1e-3,1e30]", f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if "seed 5" in line]
    assert [line.split()[0] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert sum("diverged" in line for line in lines) == 2
    rows = list(csv.DictReader((tmp_path / "lr_sensitivity.csv").read_text().splitlines()))
    assert [(row["remedy"], float(row["learning_rate"]), row["seed"]) for row in rows] == [
        ("none", 1e-3, "5"), ("none", 1e30, "5"), ("aem", 1e-3, "5"), ("aem", 1e30, "5"),
    ]  # fmt: skip
    page = (tmp_path / "lr_sensitivity.md").read_text()
    assert "- hardware: " in page
    assert "1 of 2 (1 not finite)" in page
    assert {path.name for path in tmp_path.glob("lr_sensitivity.*")} == {
        f"lr_sensitivity.{kind}" for kind in ("csv", "md", "png", "html")
    }


def test_a_plain_training_does_not_run_the_task() -> None:
    assert compose("experiment=quickstart").task is None
    cfg = OmegaConf.create({"output_dir": "unused", "threads": None, "task": "math.isfinite"})
    with pytest.raises(TypeError, match="must be real number"):
        main.__wrapped__(cfg)


@pytest.mark.parametrize("name", [path.stem for path in sorted((RESULTS / "lr_sensitivity").glob("*.csv"))])
def test_published_tables_are_those_of_the_published_runs(name: str) -> None:
    page = (RESULTS / "lr_sensitivity.md").read_text()
    curves = summarise(read([RESULTS / "lr_sensitivity" / f"{name}.csv"])[0])
    assert all(f"| {' | '.join(line)} |" in page for line in table(curves))
