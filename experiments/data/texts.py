"""What the text data sets share: tokenised once, split without leakage, kept on the device that trains."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from experiments.data.images import split

Labelled = tuple[list[str], list[int]]
Batch = dict[str, Tensor]


class Texts(pl.LightningDataModule):
    """Base of the data sets: every text is cut or padded to one length.

    Args:
        tokenizer: Folder of a Hugging Face tokenizer.
        seed: Of the order of the training texts.
        length: Tokens of a text, with its special tokens.
        batch_size: Texts in a batch.
        eval_batch_size: Texts in a batch of validation and test.
        val: Texts of the validation, as the class says when left out.
        test: Texts of the test, likewise; the rest is for training.
        split_seed: Of the random split, apart from the training's seed, so that seeds share their test texts.
        packages: Folder of packages that are not installed.
    """

    counts, classes = {"val": 0, "test": 0}, 0

    def __init__(
        self, tokenizer: str, seed: int, *, length: int = 128, batch_size: int = 32, eval_batch_size: int = 256,
        val: int | None = None, test: int | None = None, split_seed: int = 0, packages: str = "data",
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokenizer, self.seed, self.length = str(tokenizer), seed, length
        self.batch_size, self.eval_batch_size, self.split_seed = batch_size, eval_batch_size, split_seed
        own = {"val": val, "test": test}
        self.counts = {part: self.counts[part] if count is None else count for part, count in own.items()}
        self.packages = Path(packages)
        self.parts: dict[str, Batch] = {}

    @staticmethod
    def read(packages: Path) -> Labelled:
        """Texts and their classes, each text once."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        tokens, labels = tokenised(type(self), self.packages, self.tokenizer, self.length)
        counts = {"train": len(labels) - sum(self.counts.values()), **self.counts}
        chosen = split((torch.arange(len(labels)), labels), counts, self.split_seed)
        self.parts = {
            name: {**{key: value[index].to(device) for key, value in tokens.items()}, "labels": own.to(device)}
            for name, (index, own) in chosen.items()
        }

    def train_dataloader(self) -> "Batches":
        return Batches(self.parts["train"], self.batch_size, self.seed)

    def held_out(self, part: str) -> "Batches":
        """The texts of ``val`` or ``test``, in their order."""
        return Batches(self.parts[part], self.eval_batch_size)


class Batches:
    """Batches cut from tensors that share their first axis.

    Args:
        part: Tensors by name.
        batch_size: Of all batches but the last.
        seed: Shuffle, in a new order at each pass, and leave out what does not fill a batch.
    """

    def __init__(self, part: Batch, batch_size: int, seed: int | None = None) -> None:
        self.part, self.batch_size, self.seed = part, batch_size, seed
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        count = len(self.part["labels"])
        return count // self.batch_size if self.seed is not None else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        labels = self.part["labels"]
        order = torch.randperm(len(labels), generator=self.generator) if self.generator else torch.arange(len(labels))
        order = order.to(labels.device)
        for place in range(len(self)):
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield {key: value[chosen] for key, value in self.part.items()}


@cache  # the same for every run of a process
def tokenised(source: type[Texts], packages: Path, tokenizer: str, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """``input_ids`` and ``attention_mask`` (texts, length), and labels."""
    from transformers import AutoTokenizer

    texts, labels = source.read(packages)
    encoded: Any = AutoTokenizer.from_pretrained(tokenizer)(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}, torch.tensor(labels)


def once(texts: list[str], labels: list[int]) -> Labelled:
    """Without repeated texts, so that none is trained on and tested; the first label stays."""
    kept = dict(zip(reversed(texts), reversed(labels), strict=True))
    first = [(text, kept[text]) for text in dict.fromkeys(texts)]
    return [text for text, _ in first], [label for _, label in first]
