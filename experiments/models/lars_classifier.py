"""The image classifier trained by LARS, as sigma-Reparam's ViT is."""

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import Lars
from torch import nn

from experiments.models.classifier import ImageClassifier, cosine

MOMENTUM = 0.9


class LarsClassifier(ImageClassifier):
    """As ``ImageClassifier``, with LARS on every parameter: the step of each tensor is in units of its own norm.

    Args:
        gain_rate: Factor on the learning rate of sigma-Reparam's gains: of a scalar only the sign of its gradient is
            left, and noise makes the same step as a slope.
    """

    def __init__(self, net: nn.Module, *args: Any, gain_rate: float = 1.0, **kwargs: Any) -> None:
        super().__init__(net, *args, **kwargs)
        self.gain_rate = gain_rate

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # gains and biases too: left to plain steps, gains diverge at learning rates that hardly move the matrices
        gains = [parameter for name, parameter in self.named_parameters() if name.endswith(".gain")]
        others = [parameter for name, parameter in self.named_parameters() if not name.endswith(".gain")]
        groups = [{"params": others}, {"params": gains, "lr": self.gain_rate * self.learning_rate}]
        optimizer = Lars(
            [group for group in groups if group["params"]], lr=self.learning_rate, momentum=MOMENTUM,
            weight_decay=self.weight_decay, always_adapt=True,
        )  # fmt: skip
        total, floor = int(self.trainer.estimated_stepping_batches), self.minimum / self.learning_rate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total, self.warmup, floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
