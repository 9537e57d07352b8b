"""Fashion-MNIST, from Debian's package if it is installed, else downloaded by torchvision."""

import gzip
from pathlib import Path

import numpy as np
import torch
import torchvision

from experiments.data.images import Images, Part, split

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IMAGES, LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
VALIDATION = 5000
UNSIGNED_BYTE = 8  # the code of the element type in an idx header


class FashionMNIST(Images):
    """60 000 training images, 5000 of them for validation, and the 10 000 test images.

    Args:
        batch_size: Images in a batch.
        shift: Training images are moved by up to this many pixels in each direction.
        split_seed: Of the random split into training and validation.
        root: Where torchvision keeps its download.
    """

    def __init__(self, batch_size: int = 64, shift: int = 0, split_seed: int = 0, root: str = "data") -> None:
        super().__init__(batch_size, shift, split_seed)
        self.root = Path(root)

    def read(self) -> dict[str, Part]:
        folder = find_files(self.root)
        train = read_part(folder, "train")
        counts = {"train": len(train[1]) - VALIDATION, "val": VALIDATION}
        return {**split(train, counts, self.split_seed), "test": read_part(folder, "t10k")}


def find_files(root: Path, debian: Path = DEBIAN) -> Path:
    """Folder with the four idx files.

    Raises:
        RuntimeError: If they are not installed and cannot be downloaded; says how to install them.
    """
    if debian.is_dir():
        return debian
    try:
        torchvision.datasets.FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"Fashion-MNIST is neither in {debian} nor in `root={root}`, and its download failed ({error}). Install it "
            "with `sudo apt-get install -y dataset-fashion-mnist`, or put torchvision's four files in "
            f"{root / 'FashionMNIST' / 'raw'}."
        ) from error
    return root / "FashionMNIST" / "raw"


def read_part(folder: Path, part: str) -> Part:
    """Images from 0 to 1 and labels of ``train`` or ``t10k``."""
    images, labels = (read_idx(folder / name.format(part)) for name in (IMAGES, LABELS))
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def read_idx(path: Path) -> np.ndarray:
    """Array of an idx file of unsigned bytes, ``path`` itself or gzipped as ``path.gz``.

    Raises:
        ValueError: If the file is not idx, or its length does not match its header.
    """
    content = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    if len(content) < 4 or content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        raise ValueError(f"{path} is not an idx file of unsigned bytes: it starts with {content[:4]!r}.")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    values = np.frombuffer(content, "u1", offset=4 + 4 * axes)
    if values.size != shape.prod():
        raise ValueError(f"{path} promises {tuple(shape)} values and holds {values.size}: download it again.")
    return values.reshape(shape).copy()
