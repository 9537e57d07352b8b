"""sigma-Reparam's ViT: recipes, optimizer, sharpness against whole Hessians, tables by hand, a toy run end to end."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

from experiments import sigma_reparam_vit as experiment
from experiments.data import fashion_mnist
from experiments.data.resident import Batches, ResidentFashionMNIST
from experiments.evidence import Interval, MissingData, Record, Store, sized
from experiments.models.lars_classifier import LarsClassifier
from experiments.run_info import ROOT
from experiments.sharpness import sharpness
from experiments.sigma_reparam_vit_results import LABELS, arms_of, best_rate, ours, verdict, write_results
from lightning_reg.callbacks import apply_sigma_reparam
from lightning_reg.functional import spectral_norm
from tests.experiments.fashion import write_fashion

TINY = (
    "small.model.net.embed_dim=8", "small.model.net.depth=1", "model.net.num_heads=2", "small.steps=4",
    "small.every=2", "small.data.datamodule.batch_size=8", "small.sharpness={images: 8, points: 2, iterations: 2}",
    "trainer.accelerator=cpu",
)  # fmt: skip


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return sized(compose("sigma_reparam_vit", ["output_dir=x", "+size=small", *TINY, *overrides]))


def built(cfg: DictConfig, arm: str) -> Any:
    return experiment.build_model(cfg, experiment.recipe_of(cfg, arm), 0.5)


# --- sharpness ---


def test_sharpness_of_a_quadratic_is_its_largest_eigenvalue() -> None:
    x = torch.tensor([0.3, -2.0], requires_grad=True)
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # eigenvalues 3 and 1
    size, vector = sharpness(lambda: x @ hessian @ x / 2, [x], torch.tensor([1.0, 0.0]), 30)
    assert size == pytest.approx(3.0, abs=1e-5)
    assert (vector / vector.norm()).tolist() == pytest.approx([math.sqrt(0.5)] * 2, abs=1e-5)


def test_sharpness_counts_the_magnitude_and_spans_parameters() -> None:
    x, y = torch.tensor([1.0], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)
    size, _ = sharpness(lambda: (-5 * x**2 + y[0] ** 2).sum() / 2, [x, y], torch.tensor([1.0, 1.0]), 40)
    assert size == pytest.approx(5.0)


def test_one_product_from_the_diagonal() -> None:
    x = torch.zeros(2, requires_grad=True)
    # |diag(3, 1) (1, 1)| / sqrt(2) = sqrt(10 / 2)
    assert sharpness(lambda: (3 * x[0] ** 2 + x[1] ** 2) / 2, [x], torch.full((2,), 7.0), 1)[0] == pytest.approx(
        math.sqrt(5)
    )


def test_sharpness_through_attention_is_that_of_the_whole_hessian() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(3, 4, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4, dtype=torch.float64)

    def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT / 2).softmax(-1) @ value

    def loss(weight: Tensor, attention: Callable[..., Tensor] = F.scaled_dot_product_attention) -> Tensor:
        return attention(*(x @ part for part in weight)).square().mean()

    whole = torch.autograd.functional.hessian(lambda w: loss(w, by_hand), weight).reshape(48, 48)
    largest = float(torch.linalg.eigvalsh(whole).abs().max())
    weight.requires_grad_()
    size, _ = sharpness(lambda: loss(weight), [weight], torch.randn(48, dtype=torch.float64), 300)
    assert size == pytest.approx(largest, rel=1e-3)


# --- recipes ---


@pytest.mark.parametrize("arm", list(LABELS))
def test_an_arm_is_what_its_recipe_says(arm: str) -> None:
    cfg = config()
    model, recipe = built(cfg, arm), experiment.recipe_of(cfg, arm)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == (3 if arm in ("deit", "weight_norm") else 0)
    assert (model.warmup, model.weight_decay) == ((0.1, 0.05) if arm == "deit" else (0.0, 0.0))
    assert isinstance(model, LarsClassifier) == (recipe["optimizer"] == "lars") == (arm not in ("deit", "weight_norm"))
    names = [name for name, _ in model.named_parameters()]
    # patches, query-key-value, projection, two of the MLP, head
    assert sum(name.endswith("original1") for name in names) == (6 if "weight_norm" in arm else 0)
    gains = [parameter for name, parameter in model.named_parameters() if name.endswith(".gain")]
    assert len(gains) == (6 if arm == "spectral_norm" else 0)
    assert not any(gain.requires_grad for gain in gains)


def test_plain_spectral_norm_keeps_every_weight_at_one() -> None:
    net = built(config(), "spectral_norm").net
    query, key, value = net.blocks[0].attn.qkv.weight.chunk(3)
    for weight in (query, key, value, net.patch_embed.proj.weight, net.head.weight):
        assert float(spectral_norm(weight)) == pytest.approx(1.0, abs=1e-4)


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="`arms` may hold deit, sigma_reparam, .*, no_norm, got 'layer_norm'"):
        experiment.recipe_of(config(), "layer_norm")


def test_a_step_of_lars_is_a_share_of_the_norm() -> None:
    model = LarsClassifier(nn.Linear(2, 1, bias=False), learning_rate=10.0, weight_decay=0.0, warmup=0.0)
    model._trainer = SimpleNamespace(estimated_stepping_batches=5)
    optimizer = model.configure_optimizers()["optimizer"]
    model.net.weight.data = torch.tensor([[3.0, 4.0]])
    model.net.weight.grad = torch.tensor([[0.0, 0.2]])
    optimizer.step()
    # 10 times a thousandth of |W| = 5, along the gradient
    torch.testing.assert_close(model.net.weight.data, torch.tensor([[3.0, 3.95]]))


@pytest.mark.parametrize(("arm", "rate"), [("sigma_reparam", 0.5), ("sigma_reparam_slow_gains", 0.05)])
def test_gains_have_the_rate_of_their_arm(arm: str, rate: float) -> None:
    model = built(config(), arm)
    apply_sigma_reparam(model)
    model._trainer = SimpleNamespace(estimated_stepping_batches=5)
    rates = {id(p): group["lr"] for group in model.configure_optimizers()["optimizer"].param_groups
             for p in group["params"]}  # fmt: skip
    found = {name.endswith(".gain"): rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {True: pytest.approx(rate), False: 0.5}
    assert len(rates) == len(list(model.parameters()))


# --- data ---


def test_batches_hold_everything_once() -> None:
    images, labels = torch.arange(10.0)[:, None], torch.arange(10)
    plain = list(Batches(images, labels, 4))
    assert [batch[1].tolist() for batch in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = Batches(images, labels, 4, shuffle=True, drop_last=True)
    assert len(shuffled) == 2
    torch.manual_seed(0)
    first, second = (torch.cat([batch[1] for batch in shuffled]).tolist() for _ in range(2))
    assert first != second
    assert all(len(set(order)) == 8 for order in (first, second))
    assert all((images[:, 0] == labels).all() for images, labels in shuffled)


def test_missing_data_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(root: Path) -> Path:
        raise RuntimeError("not there")

    monkeypatch.setattr(fashion_mnist, "find_files", missing)
    with pytest.raises(MissingData, match="Install it with `sudo apt-get install -y dataset-fashion-mnist`"):
        ResidentFashionMNIST().read()


# --- results ---


def record(arm: str, rate: float, seed: int, val: float, test: float = 0.0, stopped: int | None = None) -> Record:
    recipe = {"method": arm, "layer_norm": False, "warmup": 0.0, "weight_decay": 0.0, "optimizer": "lars"}
    result = {
        "val_accuracy": val, "test_accuracy": test, "stopped": stopped, "steps": 100, "batch_size": 550,
        "recipe": recipe, "precision": "32-true", "width": 8, "depth": 1, "loss": [[2, 1.0]],
        "entropy_mean": [[2, 0.5], [4, 0.25]], "entropy_min": [[2, 0.125], [4, None]],
        "sharpness": [[0, 2.0], [4, 8.0]],
    }  # fmt: skip
    settings = {"arm": arm, "learning_rate": rate, "seed": seed}
    return {"settings": settings, "result": result, "seconds": 1.0, "info": {}}


RECORDS = [
    *(record("sigma_reparam", rate, 0, val) for rate, val in ((0.1, 0.79), (1.0, 0.83), (10.0, 0.84), (100.0, 0.7))),
    record("sigma_reparam", 10.0, 1, 0.8, 0.82),
    record("sigma_reparam", 10.0, 2, 0.8, 0.84),
    record("sigma_reparam", 1.0, 2, 0.9, 0.99),  # of another learning rate
    *(record("deit", rate, 0, val) for rate, val in ((0.1, 0.9), (1.0, 0.9), (10.0, 0.1))),
    record("deit", 0.1, 1, 0.8, 0.80),
    record("deit", 0.1, 2, 0.8, 0.81),
]


def test_the_chosen_rate_and_the_range_around_it_by_hand() -> None:
    arms = arms_of(RECORDS, tuning_seed=0)
    assert list(arms) == ["deit", "sigma_reparam"]
    assert best_rate(arms["deit"].tuning) == 0.1  # the lower of two alike
    assert (arms["deit"].trains(), arms["deit"].at_edge()) == ((0.1, 1.0), True)
    # 79 is 5 points below 84, 70 is more
    assert (arms["sigma_reparam"].trains(), arms["sigma_reparam"].at_edge()) == ((0.1, 10.0), False)
    assert arms["sigma_reparam"].by_seed() == pytest.approx({1: 82.0, 2: 84.0})


def test_a_gap_ends_the_range() -> None:
    rates = [record("deit", rate, 0, val) for rate, val in ((0.1, 0.9), (1.0, 0.5), (10.0, 0.89))]
    assert arms_of(rates, 0)["deit"].trains() == (0.1, 0.1)


def test_differences_are_paired_by_seed() -> None:
    found = ours(arms_of(RECORDS, 0), "sigma_reparam")
    # 2 and 3 points; 12.7062 / sqrt(2) times the deviation sqrt(1/2)
    assert (found.mean, found.half, found.count) == (pytest.approx(2.5), pytest.approx(6.3531, abs=1e-3), 2)


@pytest.mark.parametrize(
    ("mean", "half", "count", "wanted", "said"),
    [
        (-3.0, 1.0, 3, "<", "reproduced"),
        (3.0, 1.0, 3, "<", "not reproduced"),
        (-3.0, 4.0, 3, "<", "not told apart"),
        (3.0, 1.0, 3, ">=", "reproduced"),
        (-3.0, 1.0, 3, ">=", "not reproduced"),
        (-3.0, 4.0, 3, ">=", "not told apart"),
        (-3.0, math.nan, 1, "<", "one seed, no verdict"),
    ],
)
def test_verdicts(mean: float, half: float, count: int, wanted: str, said: str) -> None:
    assert verdict(Interval(mean, half, count), wanted) == said


def test_the_page_says_what_the_runs_hold(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for item in RECORDS:
        store.write(item["settings"], item["result"], 1.0)
    broken = store.path({"arm": "deit", "learning_rate": 0.1, "seed": 3})
    broken.write_text('{"settings"')
    page = write_results(store, tmp_path, tuning_seed=0).read_text()
    assert "| sigma-Reparam | no | no | no | LARS | 10 | 83.00 ± 12.71 | 2 | +2.50 ± 6.35 | 82.2 | +0.4 |" in page
    assert "| sigma-Reparam | 79.0 | 83.0 | 84.0 | 70.0 | 0.1 to 10 (x100) |" in page
    assert "| DeiT's recipe | 90.0 | 90.0 | 10.0 |  | 0.1 to 1 (x10), best at the edge |" in page
    assert "| sigma-Reparam | 0.125 ± 0.000 | 0.250 ± 0.000 | 2 (2 to 2) | 8 (8 to 8) | 8 (8 to 8) |" in page
    assert "- **not told apart**: sigma-Reparam is as good" in page
    assert "100 steps of 550 images (1.0 epochs)" in page
    assert "12 runs, 0 minutes in all" in page
    assert (tmp_path / "sigma_reparam_vit.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "sigma_reparam_vit.csv").read_text().splitlines()))
    assert len(rows) == 12
    assert {(row["learning_rate"], row["test_accuracy"]) for row in rows if row["seed"] == "1"} == {
        ("0.1", "0.8"), ("10.0", "0.82"),
    }  # fmt: skip


def test_no_runs_are_a_page_without_tables(tmp_path: Path) -> None:
    assert "- no runs yet" in write_results(Store(tmp_path), tmp_path, 0).read_text()


# --- end to end ---


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "fashion"
    folder.mkdir()
    write_fashion(folder, train=64, test=20)
    monkeypatch.setattr(fashion_mnist, "find_files", lambda root: folder)
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 16)
    return folder


@pytest.mark.parametrize("arm", ["deit", "sigma_reparam", "spectral_norm"])
def test_a_toy_run(arm: str, fashion: Path) -> None:
    result = experiment.train(config(), {"arm": arm, "learning_rate": 0.01, "seed": 0})
    assert (result["stopped"], [step for step, _ in result["loss"]]) == (None, [2, 4])
    assert [step for step, _ in result["sharpness"]] == [0, 4]
    assert all(value > 0 for _, value in result["sharpness"])
    assert [step for step, _ in result["entropy_mean"]] == [1, 2, 4]
    assert all(0 < low <= mean <= 1 for (_, low), (_, mean) in zip(result["entropy_min"], result["entropy_mean"]))
    assert 0 <= result["test_accuracy"] <= 1
    assert not list(fashion.parent.glob("*.jsonl"))


def test_a_training_that_explodes_ends_early_and_is_at_chance(fashion: Path) -> None:
    result = experiment.train(config(), {"arm": "no_norm", "learning_rate": 1e30, "seed": 0})
    assert result["stopped"] == 2
    assert result["test_accuracy"] == pytest.approx(0.1)  # all are of class 0


def test_each_arm_is_tuned_then_run_with_its_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def train(cfg: DictConfig, run: dict[str, Any]) -> dict[str, Any]:
        seen.append(tuple(run.values()))
        return record(run["arm"], 0, 0, val=run["learning_rate"] == 10.0, test=0.5)["result"]

    monkeypatch.setattr(experiment, "train", train)
    cfg = config("arms=[no_norm]", f"output_dir={tmp_path}")
    experiment.main.__wrapped__(cfg)
    wanted = [("no_norm", 1.0, 0), ("no_norm", 10.0, 0), ("no_norm", 10.0, 1), ("no_norm", 10.0, 2)]
    assert seen == wanted
    experiment.main.__wrapped__(cfg)
    assert seen == wanted
    store = Store(tmp_path)
    store.path({"arm": "no_norm", "learning_rate": 10.0, "seed": 1}).unlink()
    experiment.main.__wrapped__(cfg)
    assert seen == [*wanted, wanted[2]]
