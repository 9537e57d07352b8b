"""The documentation of Python as text, from Debian's package: 11 MB of English with code."""

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

DEBIAN = Path("/usr/share/doc/python3.11/html/_sources")
VALIDATION = 0.05  # of the files


class PythonDocs(pl.LightningDataModule):
    """Windows of bytes at random places; whole files are held out, so nothing validated was trained on.

    Args:
        seed: Of the places.
        length: Bytes of a window; a batch has one more, the last target.
        batch_size: Windows in a batch.
        steps: Batches to draw in an epoch.
        val_batches: Batches of the held-out files, always the same.
        root: Folder with the files ``*.rst.txt``, or one text file whose end is held out.
    """

    def __init__(
        self, seed: int, *, length: int = 256, batch_size: int = 64, steps: int = 1000, val_batches: int = 32,
        root: str = str(DEBIAN),
    ) -> None:  # fmt: skip
        super().__init__()
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.val_batches, self.root = val_batches, Path(root)
        self.parts: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        if not self.parts:
            train, val = read(self.root)
            self.parts = {"train": train, "val": val}
            short = [name for name, part in self.parts.items() if len(part) <= self.length]
            if short:
                raise ValueError(f"`root={self.root}` has too little text for `length={self.length}` in {short[0]}.")

    def train_dataloader(self) -> DataLoader:
        windows = Windows(self.parts["train"], self.length, self.steps * self.batch_size, self.seed)
        return DataLoader(windows, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(
            Windows(self.parts["val"], self.length, self.val_batches * self.batch_size, 0), batch_size=self.batch_size
        )


class Windows(Dataset):
    """``count`` windows of ``length + 1`` bytes at places drawn once."""

    def __init__(self, text: Tensor, length: int, count: int, seed: int) -> None:
        self.text, self.length = text, length
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(0, len(text) - length, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + self.length + 1].long()


def read(root: Path) -> tuple[Tensor, Tensor]:
    """Bytes for training and validation.

    Raises:
        RuntimeError: If there are none; says how to install them.
    """
    if root.is_file():
        text = _bytes(root)
        cut = round(len(text) * (1 - VALIDATION))
        return text[:cut], text[cut:]
    files = sorted(root.rglob("*.rst.txt"))
    if not files:
        raise RuntimeError(
            f"Python's documentation is not in {root}. Install it with `sudo apt-get install -y "
            "--no-install-recommends python3.11-doc`, or give `data.datamodule.root=` a folder or a text file."
        )
    every = round(1 / VALIDATION)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index, text in enumerate(_texts(files)):
        parts[index % every == every - 1].append(text)
    return torch.cat(parts[0]), torch.cat(parts[1])


def _texts(files: list[Path]) -> Iterator[Tensor]:
    return (_bytes(path) for path in files)


def _bytes(path: Path) -> Tensor:
    return torch.from_numpy(np.frombuffer(path.read_bytes(), "u1").copy())
