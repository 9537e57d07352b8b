"""AEM on bags: models against one bag at a time, the penalty against its formula, choice and differences by hand."""

import csv
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments import aem_mil
from experiments.aem_mil_results import ARMS, choose, chosen_of, difference, pooled, write_results
from experiments.data.mil_bags import Draws, gather, read_classical
from experiments.evidence import Store
from experiments.models.mil import MODELS, BagClassifier, ClassTokenTransformer
from experiments.run_info import ROOT
from tests.experiments.test_aem_mil_data import write_package

FEATURES = 6


def classifier(name: str) -> BagClassifier:
    """Of a few features, in evaluation mode; torchmil's are skipped where it is not installed."""
    if name != "transformer":
        pytest.importorskip("torchmil")
    torch.manual_seed(0)
    return BagClassifier(name, FEATURES, width=8, learning_rate=0.05).eval()


def bags_of(sizes: list[int], count: int = 1):
    """Bags of random instances."""
    torch.manual_seed(1)
    rows = list(torch.arange(sum(sizes) * count).split(sizes * count))
    return gather(torch.randn(sum(sizes) * count, FEATURES), rows, torch.arange(len(rows)) % 2)


def config(tmp_path: Path, *changes: str) -> DictConfig:
    """A tiny form on the synthetic MUSK1 of ``tmp_path``."""
    torch.manual_seed(0)
    lines = []
    for bag in range(120):
        for instance in range(4):
            features = torch.randn(FEATURES)
            features[:2] += 4.0 * (bag % 2 and instance == 0)
            lines.append([bag % 2, bag, *features.tolist()])
    write_package(tmp_path, "musk1", lines)
    read_classical.cache_clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        small = [
            "tasks=[musk1]",
            "models=[transformer]",
            "seeds=[0]",
            "training.default.steps=60",
            "learning_rate=0.005",
        ]
        return compose("aem_mil", [f"output_dir={tmp_path}", f"packages={tmp_path}", *small, *changes])


@pytest.mark.parametrize("name", MODELS)
def test_padded_bags_are_seen_as_each_alone(name: str) -> None:
    model, bags = classifier(name), bags_of([5, 3, 1])
    with torch.no_grad():
        logits, entropy, given = model.look(bags.batch(torch.arange(3)))
        for place, size in enumerate(bags.sizes.tolist()):
            alone = model.look(bags.batch(torch.tensor([place])))
            torch.testing.assert_close(logits[place : place + 1], alone[0])
            torch.testing.assert_close(entropy[place : place + 1], alone[1])
            torch.testing.assert_close(given[place : place + 1, :size], alone[2])
    assert logits.std() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_regularizer_measures_the_entropy_that_the_page_reports(name: str) -> None:
    model, bags = classifier(name), bags_of([5, 3, 7])
    with torch.no_grad():
        wanted = model.look(bags.batch(torch.arange(3)))[1].mean()
    (regularizer,) = aem_mil.callbacks("floor", 0.0, name)  # nothing is below 0
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[regularizer], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model.train(), Draws(bags, 3, 1))
    torch.testing.assert_close(trainer.callback_metrics["reg/attention_entropy/value"], wanted)


def test_attention_of_the_class_token_is_that_of_the_encoder() -> None:
    torch.manual_seed(0)
    net = ClassTokenTransformer(torch.nn.Linear(FEATURES, 8), 8)
    instances, mask = torch.randn(2, 4, FEATURES), torch.tensor([[True] * 4, [True, True, False, False]])
    rows = net.attention(instances, mask)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4))
    assert (rows[1, :, 3:] == 0).all()
    # the formula, with the layer's own weights
    normed = net.encoder.norm1(net.tokens(instances))
    query, key, _ = torch.nn.functional.linear(
        normed, net.encoder.self_attn.in_proj_weight, net.encoder.self_attn.in_proj_bias
    ).chunk(3, -1)
    scores = torch.einsum("bhd,bkhd->bhk", query[:, 0].view(2, 4, 2), key.view(2, 5, 4, 2)) / 2**0.5
    torch.testing.assert_close(rows[0], scores[0].softmax(-1))


def test_instance_auc_by_hand() -> None:
    given = torch.tensor([[0.5, 0.2, 0.2, 0.1, 9.0], [0.3, 0.7, 0.0, 0.0, 9.0], [1.0, 0.0, 0.0, 0.0, 9.0]])
    positive = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    negative = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    # 0.2 beats neither 0.5 nor the equal 0.2, which is half a pair of four; 0.1 beats none
    found = aem_mil.instance_auc(given, positive, negative)
    assert found[:2].tolist() == [0.125, 1.0]
    assert found[2].isnan()


def test_evaluation_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, bags = classifier("transformer"), bags_of([2, 9, 1, 4], count=3)
    whole = aem_mil.evaluate(model, bags)
    monkeypatch.setattr(aem_mil, "INSTANCES_AT_ONCE", 10)
    pieces = list(aem_mil.by_size(bags))
    assert torch.cat(pieces).sort().values.tolist() == list(range(12))
    assert all(len(piece) * int(bags.sizes[piece].max()) <= 10 for piece in pieces)
    assert aem_mil.evaluate(model, bags) == pytest.approx(whole, abs=1e-5)
    assert "instance_auc" not in whole


def test_a_toy_run_learns_and_aem_raises_the_entropy(tmp_path: Path) -> None:
    cfg = config(tmp_path, "trials.none=[0,1]", "trials.aem_constant=[0.003,3.0]", "trials.target=[0.2,0.95]")
    runs = {
        arm: aem_mil.train(cfg, {"seed": 0, "task": "musk1", "model": "transformer", "arm": arm})["trials"]
        for arm in ("none", "aem_constant", "target")
    }
    (none, other), (weak, strong), (low, high) = runs["none"], runs["aem_constant"], runs["target"]
    assert none["test"]["auc"] > 0.8
    assert none["test"] != other["test"]  # another start
    assert none["test"]["entropy"] < weak["test"]["entropy"] + 0.02
    assert strong["test"]["entropy"] > none["test"]["entropy"] + 0.1
    assert low["test"]["entropy"] < none["test"]["entropy"] + 0.05
    assert abs(high["test"]["entropy"] - 0.95) < 0.05
    again = aem_mil.trial(cfg, {"seed": 0, "task": "musk1", "model": "transformer", "arm": "none"}, 0)
    assert again["test"] == none["test"]


def test_workers_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(workers: int, *others: Any) -> ThreadPoolExecutor:
        pools.append(workers)
        return ThreadPoolExecutor(1)  # as if it were processes, which import for seconds

    pools: list[int] = []
    monkeypatch.setattr(aem_mil, "ProcessPoolExecutor", pool)
    cfg = config(tmp_path, "trials.none=[0]", "trials.dropout=[0.5]", "trainer.default_root_dir=.")
    runs = [{"seed": 0, "task": "musk1", "model": "transformer", "arm": arm} for arm in ("none", "dropout")]
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    two.write(runs[0], {"kept": 1}, 1.0)
    for store, workers in ((one, 1), (two, 2)):
        cfg.workers = workers
        aem_mil.run_in_processes(store, runs, pickle.loads(pickle.dumps(cfg)))
    (dropout, none), (again, kept) = ([record["result"] for record in store.read()] for store in (one, two))
    assert pools == [2]
    assert again == dropout != none
    assert kept == {"kept": 1}


def test_what_cannot_run_is_refused_before_the_first_training(tmp_path: Path) -> None:
    aem_mil.check(config(tmp_path))
    for changes, message in (
        (["trials.floor=[0.5]"], "as many values in each arm, got none 3, .*floor 1"),
        (["arms=[none,aem]"], "`arms` may hold none, aem_constant.*got 'aem'"),
        (["models=[clam]"], "`models` may hold abmil, dsmil, transformer, got 'clam'"),
        (["tasks=[musk9]"], "`tasks` may hold ilse_N"),
    ):
        with pytest.raises(ValueError, match=message):
            aem_mil.check(config(tmp_path, *changes))


# --- the page --------------------------------------------------------------------------------------------------------


def result(*trials: tuple[float, float, float, float]) -> dict[str, Any]:
    """Of (value, validation AUC, validation loss, test AUC)."""
    return {
        "trials": [
            {"value": value, "val": {"auc": auc, "loss": loss, "entropy": 0.5},
             "test": {"auc": test, "loss": 0.25, "entropy": 0.5 + value}}
            for value, auc, loss, test in trials
        ],
        "steps": 9, "batch_size": 2, "learning_rate": 1e-3,
    }  # fmt: skip


def write(store: Store, task: str, arm: str, seed: int, found: dict[str, Any]) -> None:
    """Keep a run of ABMIL."""
    store.write({"seed": seed, "task": task, "model": "abmil", "arm": arm}, found, 1.0)


def test_validation_alone_chooses() -> None:
    assert choose(result((1, 0.8, 0.5, 0.9), (2, 0.9, 0.7, 0.1), (3, 0.9, 0.6, 0.2))["trials"])["value"] == 3


def test_differences_are_from_the_first_start_and_averaged_over_tasks_by_seed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in (0, 1, 2):
        for task in ("ilse_50", "ilse_100", "musk1"):
            write(store, task, "none", seed, result((0, 0.5, 0.5, 0.8), (1, 0.6, 0.5, 0.7)))
            gain = {"ilse_50": 0.1, "ilse_100": 0.04, "musk1": -0.05}[task] + 0.01 * seed
            if (task, seed) != ("ilse_100", 2):
                write(store, task, "aem_cosine", seed, result((0.03, 0.5, 0.5, 0.8 + gain), (0.3, 0.4, 0.5, 0.0)))
    tasks = chosen_of(store.read())["abmil"]
    assert list(tasks) == ["ilse_50", "ilse_100", "musk1"]
    assert difference(tasks["ilse_50"], "aem_cosine", "auc").mean == pytest.approx(0.11)
    assert difference(tasks["ilse_50"], "restarts", "auc").mean == pytest.approx(-0.1)
    images = pooled(tasks, "aem_cosine", "auc", "images")  # seed 2 lacks a task
    assert (images.count, images.mean) == (2, pytest.approx((0.07 + 0.08) / 2))
    assert pooled(tasks, "aem_cosine", "auc", "classical").mean == pytest.approx(-0.04)
    assert pooled(tasks, "aem_cosine", "entropy", "classical").mean == pytest.approx(0.03)
    assert pooled(tasks, "dropout", "auc", "images").count == 0


def test_the_page_says_what_the_runs_hold(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in range(5):
        wobble = 0.001 * (seed - 2)
        for arm in ARMS:
            gain = {"aem_cosine": 0.03, "dropout": 0.05, "none": 0.0}.get(arm, 0.0) + (wobble if arm != "none" else 0)
            trials = [(value, 0.5 - value, 0.5, 0.8 + gain - value) for value in (0.0, 0.1)]
            write(store, "ilse_50", arm, seed, result(*trials))
    page = write_results(store, tmp_path).read_text()
    # deviation 0.001 sqrt(2.5), t(4) = 2.776445, over sqrt(5)
    cosine = "**+0.0300 ± 0.0020**"
    assert f"| AEM, cosine | {cosine} |" in page
    assert (
        "- AEM, cosine: bag AUC clearly higher than one start in 1 and clearly lower in 0 of 1 tasks and models" in page
    )
    assert "AEM with a cosine against dropout, image bags: gated ABMIL -0.0200 ± 0.0000, worse." in page
    assert f"| Ilse, 50 bags, here, cosine | 0.800 | 0.830 | {cosine} |" in page
    gain = "+0.0300 ± 0.0020 above"
    assert f"Over the image bags AEM is {gain} one start without it, and {gain} the best of as many starts: the" in page
    assert "the paper's direction reproduces, with a clear interval. The first is as large as" in page
    assert "| AEM, cosine | 0.1 | **-0.0700 ± 0.0020** | 0.600 | 0 |" in page
    assert "Some cells have" not in page
    assert f"{5 * len(ARMS)} runs, 1 minutes in all" in page
    assert (tmp_path / "aem_mil.png").stat().st_size > 1000
    with (tmp_path / "aem_mil.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if (line["arm"], line["seed"]) == ("dropout", "2")]
    assert [(line["value"], line["chosen"], line["test_auc"]) for line in lines] == [
        ("0.0", "1", "0.8500000000000001"), ("0.1", "0", "0.7500000000000001"),
    ]  # fmt: skip


def test_too_few_runs_make_a_page_without_differences(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert "no runs yet" in write_results(store, tmp_path).read_text()
    write(store, "musk1", "aem_cosine", 0, result((0.1, 0.5, 0.5, 0.8)))
    page = write_results(store, tmp_path).read_text()
    assert "Too few runs for a difference." in page
    assert "Some cells have 1 seed" in page
