"""The full design of four methods: contrasts by hand, a toy run end to end, the page against its files."""

import csv
from itertools import product
from pathlib import Path

import pytest
from hydra import compose as compose_config
from hydra import initialize_config_dir

from experiments import compose
from experiments.compose_results import METHODS, contrast, effects_of, write_results
from experiments.evidence import Store, sized
from experiments.run_info import ROOT


def arms(loss) -> dict[frozenset[str], dict[str, float]]:
    """A design whose loss is a function of the methods that are on."""
    subsets = [
        frozenset(name for name, on in zip(METHODS, bits, strict=True) if on) for bits in product((0, 1), repeat=4)
    ]
    return {on: {"loss": loss(on)} for on in subsets}


def test_contrasts_are_those_the_losses_were_made_of() -> None:
    def loss(on: frozenset[str]) -> float:
        both = {"aem", "deft"} <= on
        return 3.0 - 0.5 * ("aem" in on) + 0.25 * ("z_loss" in on) + 0.8 * both

    made = arms(loss)
    assert contrast(made, ("z_loss",), "loss") == pytest.approx(0.25)
    assert contrast(made, ("sigma_reparam",), "loss") == pytest.approx(0.0)
    assert contrast(made, ("aem",), "loss") == pytest.approx(-0.5 + 0.8 / 2)
    assert contrast(made, ("aem", "deft"), "loss") == pytest.approx(0.8 / 2)
    assert contrast(made, ("aem", "z_loss"), "loss") == pytest.approx(0.0)


def test_seeds_without_all_arms_are_left_out() -> None:
    records = [
        {"settings": {"task": "vit", "seed": seed, "arm": "+".join(on) or "none"}, "result": {"loss": 1.0 + seed}}
        for seed in (0, 1)
        for on in list(arms(lambda on: 0.0))[: 16 - seed]
    ]
    assert effects_of(records, "vit")["loss"]["aem",].count == 1
    assert effects_of(records, "lm") == {}


def test_a_toy_run_ends_in_a_page_that_says_what_the_files_hold(tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = sized(
            compose_config("compose", ["output_dir=x", "+size=small", "small.steps.vit=10", "trainer.accelerator=cpu"])
        )
    store = Store(tmp_path)
    plain = compose.train(cfg, {"task": "vit", "seed": 0, "arm": "none"})
    both = compose.train(cfg, {"task": "vit", "seed": 0, "arm": "sigma_reparam+z_loss"})
    assert plain["loss"] != both["loss"]
    assert 0 <= both["accuracy"] <= 1
    assert 0 < plain["entropy"] <= 1
    for on, result in arms(lambda on: 1.0 + 0.125 * ("deft" in on)).items():
        store.write({"task": "vit", "seed": 0, "arm": "+".join(sorted(on)) or "none"}, plain | result, 1.0)
    page = write_results(store, tmp_path).read_text()
    assert "| density loss | +0.1250 |" in page
    assert "16 runs, 0 minutes in all" in page
    assert "million parameters, 10 steps of 64 images, seeds 0" in page
    assert "- weights: AEM 0.1, density loss 0.1, z-loss 0.001;" in page
    assert (tmp_path / "compose.png").stat().st_size > 1000
    with (tmp_path / "compose.csv").open(newline="") as file:
        assert {row["arm"]: row["loss"] for row in csv.DictReader(file)}["deft"] == "1.125"


def test_every_subset_is_an_arm() -> None:
    assert len(set(compose.ARMS)) == 16
    assert {"none", "aem", "sigma_reparam+aem+deft+z_loss"} <= set(compose.ARMS)


def test_an_unknown_size_is_refused() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose_config("compose", ["output_dir=x", "+size=tiny"])
    with pytest.raises(ValueError, match="`size` must be small"):
        sized(cfg)
