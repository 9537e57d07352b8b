"""What the image data sets share: standardised tensors in memory, random shifts, loaders."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Part = tuple[Tensor, Tensor]


class Images(pl.LightningDataModule):
    """Base of the data sets: small enough to stay in memory.

    Args:
        batch_size: Images in a batch.
        shift: Training images are moved by up to this many pixels in each direction.
        split_seed: Of the random split, apart from the training's seed, so that seeds share their test images.
    """

    def __init__(self, batch_size: int = 64, shift: int = 0, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.shift, self.split_seed = batch_size, shift, split_seed
        self.parts: dict[str, Part] = {}

    def read(self) -> dict[str, Part]:
        """Images (count, height, width) as numbers from 0 to 1 and labels, for train, val and test."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        if self.parts:
            return
        parts = self.read()
        pixels = parts["train"][0]
        mean, deviation = pixels.mean(), pixels.std()
        self.parts = {
            name: (((images - mean) / deviation).unsqueeze(1), labels) for name, (images, labels) in parts.items()
        }

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Part, dataloader_idx: int) -> Part:
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return (random_shift(images, self.shift), labels) if training and self.shift else (images, labels)

    def _loader(self, part: str, **kwargs: Any) -> DataLoader:
        return DataLoader(TensorDataset(*self.parts[part]), batch_size=self.batch_size, **kwargs)


def split(part: Part, counts: dict[str, int], seed: int) -> dict[str, Part]:
    """Disjoint random parts of ``part``; the counts must add up to its length."""
    images, labels = part
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = zip(counts, order.split(list(counts.values())), strict=True)
    return {name: (images[index], labels[index]) for name, index in chosen}


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Each image (batch, channels, height, width) moved by up to ``pixels``; its border grows into the gap."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    top, left = torch.randint(2 * pixels + 1, (2, len(images), 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=images.device))[:, None, None, :]
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[batch, channels, rows, columns]
