"""The collapse made on purpose: it collapses, a remedy that acts on logits rescues, and the table says so."""

import csv
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments import collapse
from experiments.run_info import ROOT


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("collapse", ["output_dir=.", *overrides])


def test_attention_collapses_and_a_clip_rescues_it_where_entropy_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = config("steps=60", "temperature=0.005", "model.net.depth=1")
    collapse._collapsed.clear()
    before, _ = collapse.collapse(cfg)
    assert before["collapsed_share"] == 1.0
    short = config("steps=15", "temperature=0.005", "model.net.depth=1")
    start = collapse._collapsed["0 0.005"][1]
    clipped, floored = (collapse.fit(short, remedy, start)[0] for remedy in ("qk_clip", "attention_entropy_floor"))
    assert clipped["collapsed_share"] == 0.0
    # one of four heads may come back: at entropies near 0 the rounding of a processor decides
    assert floored["collapsed_share"] >= 0.75
    collapse._collapsed.clear()


def row(remedy: str, share: float, seed: int = 0) -> dict[str, object]:
    numbers = dict.fromkeys(collapse.FIELDS, 0.25)
    return {
        **numbers,
        "temperature": 0.1,
        "seed": seed,
        "protocol": "rescue",
        "remedy": remedy,
        "collapsed_share": share,
    }


def test_the_table_says_what_helps(tmp_path: Path) -> None:
    path = tmp_path / "collapse.csv"
    rows = [
        row("none", 0.7),
        row("none", 0.9, 1),
        row("good", 0.0),
        row("good", 0.2, 1),
        row("half", 0.3),
        row("bad", 0.4),
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, collapse.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    text = collapse.write_results(path, {"command": "x"}).read_text()
    assert "| none | 80%, 0.25, 25.0% |" in text
    assert "| good | **yes**: 10%, 0.25, 25.0% |" in text
    assert "| half | **partly**: 30%, 0.25, 25.0% |" in text
    assert "| bad | **no**: 40%, 0.25, 25.0% |" in text


@pytest.mark.parametrize("name", sorted(config().remedies))
def test_every_remedy_of_the_comparison_is_built(name: str) -> None:
    assert len([collapse.build(callback) for callback in config().remedies[name]]) == (name != "none")


def test_the_published_runs_are_the_published_table() -> None:
    folder = ROOT / "experiments" / "results"
    means = collapse.summary(folder / "collapse" / "collapse.csv")
    page = (folder / "collapse.md").read_text()
    assert len(means) == 40
    assert all(collapse._cell(cells) in page for cells in means.itertuples())
