"""Windows of tokens of Python's documentation, kept on the device that trains."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from experiments.data.python_docs import DEBIAN, read
from experiments.evidence import MissingData

COMMAND = "sudo apt-get install -y --no-install-recommends python3.11-doc"
PIECE = 200_000  # characters that are tokenised together, up to the end of a line

Encode = Callable[[list[str]], list[list[int]]]


class TokenWindows(pl.LightningDataModule):
    """Windows at random places for training; the held-out files, cut evenly, for validation.

    Args:
        seed: Of the places.
        encode: From texts to their tokens; bytes when left out.
        length: Tokens of a window; a batch has one more, the last target.
        batch_size: Windows in a batch.
        steps: Batches of the training.
        val_windows: Windows of the held-out text, always the same; a multiple of the batch size.
        root: As for ``PythonDocs``.
        cache: File that keeps the tokens, for the next process; the text is not looked for where it exists.
    """

    def __init__(
        self, seed: int, encode: Encode | None, *, length: int, batch_size: int, steps: int, val_windows: int,
        root: str | None = None, cache: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if val_windows % batch_size:
            raise ValueError(f"`val_windows` must be a multiple of `batch_size={batch_size}`, got {val_windows}.")
        self.seed, self.encode, self.length, self.batch_size = seed, encode, length, batch_size
        self.steps, self.val_windows = steps, val_windows
        self.root, self.cache = Path(root) if root else DEBIAN, Path(cache) if cache else None
        self.parts: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        tokens = cached(self.cache, self.encode, self.root)
        needed = {"train": self.length + 1, "val": self.val_windows * self.length + 1}
        short = [name for name, part in tokens.items() if len(part) < needed[name]]
        if short:
            name = short[0]
            raise ValueError(f"the text has {len(tokens[name])} tokens for {name}, {needed[name]} are needed.")
        self.parts = {name: part.to(device) for name, part in tokens.items()}

    def train_dataloader(self) -> "Batches":
        text = self.parts["train"]
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(0, len(text) - self.length, (self.steps * self.batch_size,), generator=generator)
        return Batches(text, starts, self.length, self.batch_size)

    def val_dataloader(self) -> "Batches":
        text = self.parts["val"]
        starts = torch.linspace(0, len(text) - self.length - 1, self.val_windows, dtype=torch.float64).long()
        return Batches(text, starts, self.length, self.batch_size)


class Batches:
    """Batches (batch, length + 1) cut from a text that is already on its device."""

    def __init__(self, text: Tensor, starts: Tensor, length: int, batch_size: int) -> None:
        self.text, self.batch_size = text, batch_size
        self.starts, self.places = starts.to(text.device), torch.arange(length + 1, device=text.device)

    def __len__(self) -> int:
        return len(self.starts) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for place in range(len(self)):
            starts = self.starts[place * self.batch_size : (place + 1) * self.batch_size]
            yield self.text[starts[:, None] + self.places].long()


def cached(cache: Path | None, encode: Encode | None, root: Path) -> dict[str, Tensor]:
    """Tokens of both parts, from a file where it exists; else they are written to it.

    Raises:
        MissingData: If there is no text; names the command that installs it.
    """
    if cache is not None and cache.exists():
        with np.load(cache) as stored:
            return {name: torch.from_numpy(stored[name].astype(np.int32)) for name in ("train", "val")}
    try:
        train, val = read(root)
    except RuntimeError as error:
        raise MissingData(f"The documentation of Python is not in {root} and", COMMAND) from error
    parts = {"train": tokens_of(train, encode), "val": tokens_of(val, encode)}
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **{name: part.numpy().astype(np.uint16) for name, part in parts.items()})
        temporary.replace(cache)
    return parts


def tokens_of(text: Tensor, encode: Encode | None) -> Tensor:
    """Tokens of a text of bytes, int32."""
    if encode is None:
        return text.int()
    lines = bytes(text.numpy()).decode("utf-8", errors="replace").splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    cuts = [*np.flatnonzero(np.diff(ends // PIECE)) + 1, len(lines)]  # lines that begin a piece, and the end
    pieces = ["".join(lines[start:end]) for start, end in zip([0, *cuts], cuts)]
    return torch.tensor([token for tokens in encode(pieces) for token in tokens]).int()
