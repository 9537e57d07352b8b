"""A plain image classifier: it knows nothing of regularizers, which is the point."""

import math

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from experiments.models.sharded import Sharded

Batch = tuple[Tensor, Tensor]


class ImageClassifier(Sharded):
    """Cross-entropy, AdamW, linear warm-up and cosine decay.

    Args:
        net: From images (batch, channels, height, width) to logits (batch, classes).
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW, on matrices only.
        warmup: Share of the training in which the learning rate rises.
        betas: Of AdamW.
        minimum: Learning rate at the end.
        independent_decay: Decay by ``weight_decay`` a step at the peak, whatever the learning rate is there.
    """

    def __init__(
        self, net: nn.Module, learning_rate: float = 1e-3, weight_decay: float = 0.05, warmup: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999), minimum: float = 0.0, independent_decay: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.net = net
        self.learning_rate, self.warmup, self.betas, self.minimum = learning_rate, warmup, betas, minimum
        self.weight_decay = weight_decay / learning_rate if independent_decay else weight_decay

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, "train", prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str, prog_bar: bool = False) -> Tensor:
        images, labels = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = multiclass_accuracy(logits, labels, num_classes=logits.shape[1], average="micro")
        shared = {"batch_size": len(labels), "sync_dist": stage != "train"}
        self.log(f"{stage}/loss", loss, prog_bar=prog_bar, **shared)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=stage == "val", **shared)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=tuple(self.betas))
        total, floor = int(self.trainer.estimated_stepping_batches), self.minimum / self.learning_rate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total, self.warmup, floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine(step: int, total: int, warmup: float, floor: float = 0.0) -> float:
    """Learning rate at ``step`` relative to its peak: rises for a share ``warmup``, then half a cosine to ``floor``."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2
