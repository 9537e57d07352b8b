"""The image classifier trained by LARS, as sigma-Reparam's ViT is."""

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import Lars

from experiments.models.classifier import ImageClassifier, cosine

MOMENTUM = 0.9


class LarsClassifier(ImageClassifier):
    """As ``ImageClassifier``, with LARS on every parameter: the step of each tensor is in units of its own norm."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # gains and biases too: left to plain steps, gains diverge at learning rates that hardly move the matrices
        optimizer = Lars(
            self.parameters(), lr=self.learning_rate, momentum=MOMENTUM, weight_decay=self.weight_decay,
            always_adapt=True,
        )  # fmt: skip
        total, floor = int(self.trainer.estimated_stepping_batches), self.minimum / self.learning_rate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total, self.warmup, floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
