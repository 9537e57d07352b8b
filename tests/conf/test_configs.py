"""Every YAML of ours composes, names only arguments that exist, and is short."""

import hydra
import pytest
from omegaconf import OmegaConf

from experiments.train import build
from tests.conf.configs import CONF, PRESETS, compose, options, presets, repeated_defaults, targets, unknown_keys

GROUPS = ("data", "model", "trainer", "logger", "experiment", "debug")
CHOICES = [f"{group}={option}" for group in GROUPS for option in options(group)]
# a language model reads text, the others images
TOGETHER = {"data=python_docs": ["model=llama"], "model=llama": ["data=python_docs"]}
FILES = sorted([*CONF.rglob("*.yaml"), *PRESETS.glob("*.yaml")])


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_names_only_arguments_that_exist(choice: str) -> None:
    experiment = [] if choice.startswith("experiment") else ["experiment=quickstart", *TOGETHER.get(choice, [])]
    config = compose(*experiment, choice)
    checked = list(targets(config))
    assert {path for path, node in checked if unknown_keys(node)} == set()
    assert len(checked) > 5


@pytest.mark.parametrize("choice", CHOICES)
def test_no_choice_repeats_a_default(choice: str) -> None:
    experiment = [] if choice.startswith("experiment") else ["experiment=quickstart", *TOGETHER.get(choice, [])]
    repeated = {path: keys for path, node in targets(compose(*experiment, choice)) if (keys := repeated_defaults(node))}
    # these undo what a preset or another experiment says
    undone = {".callbacks.aem": {"normalize"}, ".trainer": {"accelerator"}}
    assert {path: left for path, keys in repeated.items() if (left := keys - undone.get(path, set()))} == {}


@pytest.mark.parametrize("option", options("sweep"))
def test_every_sweep_composes_with_an_experiment(option: str) -> None:
    if option == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    config = compose("experiment=quickstart", f"sweep={option}")
    assert list(config.arms) == ["regularized"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_one_concern(path) -> None:
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_says_how_it_is_run(experiment: str) -> None:
    assert f"experiments.train experiment={experiment}" in (CONF / "experiment" / f"{experiment}.yaml").read_text()


@pytest.mark.parametrize("preset", presets())
def test_every_preset_names_arguments_that_exist_and_no_defaults(preset: str) -> None:
    config = compose(f"lightning_reg=[{preset}]")
    assert preset in config.callbacks
    for path, node in targets(config.callbacks[preset]):
        assert unknown_keys(node) == set(), path
        assert repeated_defaults(node) == set(), path


@pytest.mark.parametrize("preset", presets())
def test_every_preset_builds(preset: str) -> None:
    config = compose(f"lightning_reg=[{preset}]")
    assert type(build(config.callbacks[preset])).__module__.startswith("lightning_reg.callbacks")


def test_presets_are_the_papers_numbers() -> None:
    callbacks = compose("lightning_reg=[aem,deft]").callbacks
    aem, deft = build(callbacks.aem), build(callbacks.deft)
    assert (aem.weight, aem.loss.objective, aem.loss.normalize) == (0.1, "maximize", False)
    assert [round(aem.schedule(step, 100), 3) for step in (0, 50, 100)] == [1.0, 0.5, 0.0]
    assert (deft.weight, deft.loss.epsilon, deft.loss.relative) == (1.0, 1e-7, False)
    callbacks = compose("lightning_reg=[prosparse,prosparse_7b]").callbacks
    relative, published = build(callbacks.prosparse).schedule, build(callbacks.prosparse_7b).schedule
    assert published.peaks == pytest.approx([s * 1e-8 * 4096 * 11008 * 32 for s in (0, 5e-3, 5e-2, 5e-2, 0.2, 0.2)])
    for step in range(25, 16_500, 50):
        assert relative(step, 16_500) == pytest.approx(published(step), abs=0.01)


def test_sigma_reparam_comes_before_everything_that_sees_its_parameters() -> None:
    regularizers = [key for key in compose("experiment=quickstart").callbacks if key != "progress_bar"]
    assert regularizers == ["sigma_reparam", "aem", "deft", "prosparse", "monitor", "stability"]


def test_seed_zero_is_a_seed() -> None:
    assert compose("experiment=quickstart").seed == 0


def test_an_unknown_argument_is_found() -> None:
    config = compose("experiment=quickstart", "+callbacks.deft.wieght=1")
    assert {path: unknown_keys(node) for path, node in targets(config) if unknown_keys(node)} == {
        ".callbacks.deft": {"wieght"}
    }


def test_configs_resolve() -> None:
    resolved = OmegaConf.to_container(compose("experiment=fashion_mnist"), resolve=True)
    assert resolved["model"]["net"]["img_size"] == 28
    assert resolved["logger"]["wandb"]["offline"] is True
    assert hydra.utils.get_class(resolved["trainer"]["_target_"]).__name__ == "Trainer"
