"""A causal language model of Hugging Face, trained as it is."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from experiments.models.classifier import cosine


class LanguageModel(pl.LightningModule):
    """Next-token cross-entropy in nats, AdamW, linear warm-up and cosine decay.

    Args:
        net: From tokens (batch, length) to an output with ``logits`` (batch, length, vocabulary).
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW, on matrices only.
        warmup: Share of the training in which the learning rate rises.
    """

    def __init__(
        self, net: nn.Module, learning_rate: float = 1e-3, weight_decay: float = 0.1, warmup: float = 0.05
    ) -> None:
        super().__init__()
        self.net = net
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup

    def forward(self, batch: Tensor) -> Tensor:
        """Loss of a batch of tokens (batch, length + 1)."""
        logits = self.net(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self(batch), prog_bar=True, batch_size=len(batch))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=(0.9, 0.95), fused=self.device.type == "cuda"
        )
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
