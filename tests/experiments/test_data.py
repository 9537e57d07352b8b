"""Splits without leakage, the idx reader, and the shift that augments."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from experiments.data import Digits, FashionMNIST, fashion_mnist
from experiments.data.fashion_mnist import find_files, read_idx
from experiments.data.images import random_shift, split
from tests.experiments.fashion import write_fashion, write_idx


def test_digits_are_all_there_once() -> None:
    parts = Digits().read()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {"train": 1257, "val": 180, "test": 360}
    pixels = torch.cat([images.flatten(1) for images, _ in parts.values()])
    assert len(pixels.unique(dim=0)) == len(pixels) == 1797
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert all(len(labels.unique()) == 10 for _, labels in parts.values())


def test_the_split_depends_on_its_own_seed_only() -> None:
    torch.manual_seed(1)
    first = Digits().read()["test"][0]
    torch.manual_seed(2)
    assert torch.equal(first, Digits().read()["test"][0])
    assert not torch.equal(first, Digits(split_seed=1).read()["test"][0])


def test_a_split_keeps_labels_with_their_images() -> None:
    images = torch.arange(10.0).view(10, 1, 1)
    parts = split((images, torch.arange(10)), {"train": 7, "val": 3}, seed=0)
    assert all(torch.equal(part.flatten(), labels.float()) for part, labels in parts.values())
    assert sorted(torch.cat([labels for _, labels in parts.values()]).tolist()) == list(range(10))


def test_a_split_must_add_up() -> None:
    with pytest.raises(RuntimeError, match="sum exactly to 10"):
        split((torch.zeros(10, 1, 1), torch.arange(10)), {"train": 7, "val": 2}, seed=0)


def test_standardised_by_the_training_part() -> None:
    data = Digits(batch_size=1257)
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (1257, 1, 8, 8)
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-4


def test_a_shift_of_nothing_changes_nothing_and_one_moves_by_one() -> None:
    images = torch.randn(64, 1, 8, 8)
    assert torch.equal(random_shift(images, 0), images)
    moved = random_shift(images, 1)
    inner = images[:, :, 2:6, 2:6]
    places = [(top, left) for top in (1, 2, 3) for left in (1, 2, 3)]
    hits = torch.stack([(moved[:, :, t : t + 4, s : s + 4] == inner).flatten(1).all(1) for t, s in places])
    assert (hits.sum(0) == 1).all()
    assert (hits.sum(1) > 0).all()


@pytest.mark.parametrize("zipped", [True, False], ids=["gz", "plain"])
def test_idx_files_are_read(tmp_path: Path, zipped: bool) -> None:
    array = np.arange(24, dtype="u1").reshape(2, 3, 4)
    write_idx(tmp_path / "images", array, zipped)
    assert np.array_equal(read_idx(tmp_path / "images"), array)


def test_a_truncated_idx_file_is_refused(tmp_path: Path) -> None:
    header = bytes([0, 0, 8, 1]) + struct.pack(">I", 5)
    (tmp_path / "labels.gz").write_bytes(gzip.compress(header + bytes(4)))
    with pytest.raises(ValueError, match=r"promises .*5.* holds 4: download it again"):
        read_idx(tmp_path / "labels")


def test_another_file_is_no_idx_file(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="not an idx file of unsigned bytes"):
        read_idx(tmp_path / "labels")


def test_fashion_mnist_splits_training_and_keeps_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path, train=5030, test=20)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    monkeypatch.setattr(fashion_mnist, "find_files", lambda root: tmp_path)
    parts = FashionMNIST().read()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {"train": 30, "val": 5000, "test": 20}
    # the synthetic images carry their number in two pixels
    numbers = [{(int(255 * a), int(255 * b)) for a, b in parts[name][0][:, 0, :2]} for name in ("train", "val")]
    assert numbers[0] & numbers[1] == set()
    assert sum(map(len, numbers)) == 5030


def test_debians_folder_comes_first(tmp_path: Path) -> None:
    assert find_files(tmp_path / "nowhere", debian=tmp_path) == tmp_path


def test_without_files_and_network_the_install_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", unreachable)
    with pytest.raises(RuntimeError, match=r"no route to host.*sudo apt-get install -y dataset-fashion-mnist"):
        find_files(tmp_path, debian=tmp_path / "absent")
