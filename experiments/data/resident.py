"""Fashion-MNIST kept on the device that trains: small models are done with a batch before a DataLoader has the next."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.data.fashion_mnist import FashionMNIST
from experiments.data.images import Part
from experiments.evidence import MissingData


class ResidentFashionMNIST(FashionMNIST):
    """As ``FashionMNIST``, for a Trainer, with every batch cut from tensors on its device."""

    def read(self) -> dict[str, Part]:
        try:
            return super().read()
        except RuntimeError as error:
            raise MissingData("Fashion-MNIST", "sudo apt-get install -y dataset-fashion-mnist") from error

    def setup(self, stage: str) -> None:
        super().setup(stage)
        device = self.trainer.strategy.root_device  # type: ignore[union-attr]
        self.parts = {name: (images.to(device), labels.to(device)) for name, (images, labels) in self.parts.items()}

    def _loader(self, part: str, **kwargs: Any) -> Any:
        return Batches(*self.parts[part], self.batch_size, **kwargs)


class Batches:
    """Batches of tensors that share their first axis; in a new order at each pass where shuffled.

    Args:
        images: (count, ...).
        labels: (count,).
        batch_size: Of all batches but the last.
        shuffle: By torch's generator of the device.
        drop_last: Leave out what does not fill a batch.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, shuffle: bool = False, drop_last: bool = False
    ) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size if self.drop_last else -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Part]:
        count, device = len(self.labels), self.labels.device
        order = torch.randperm(count, device=device) if self.shuffle else torch.arange(count, device=device)
        for place in range(len(self)):
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield self.images[chosen], self.labels[chosen]
