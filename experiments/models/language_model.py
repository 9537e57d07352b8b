"""A causal language model of Hugging Face, trained as it is."""

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from experiments.models.classifier import cosine
from experiments.models.sharded import Sharded


class LanguageModel(Sharded):
    """Next-token cross-entropy in nats, AdamW, linear warm-up and cosine decay.

    Args:
        net: From tokens (batch, length) to an output with ``logits`` (batch, length, vocabulary).
        learning_rate: Peak of the schedule.
        weight_decay: Of AdamW, on matrices only.
        warmup: Share of the training in which the learning rate rises.
        betas: Of AdamW.
        minimum: Learning rate at the end.
        independent_decay: Decay by ``weight_decay`` a step at the peak, whatever the learning rate is there.
    """

    def __init__(
        self, net: nn.Module, learning_rate: float = 1e-3, weight_decay: float = 0.1, warmup: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95), minimum: float = 0.0, independent_decay: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.net = net
        self.learning_rate, self.warmup, self.betas, self.minimum = learning_rate, warmup, betas, minimum
        self.weight_decay = weight_decay / learning_rate if independent_decay else weight_decay

    def forward(self, batch: Tensor) -> Tensor:
        """Loss of a batch of tokens (batch, length + 1)."""
        logits = self.net(batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self(batch), prog_bar=True, batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        # Lightning clips no gradients in mixed precision where the optimizer is fused
        fused = self.device.type == "cuda" and not self.trainer.gradient_clip_val
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=tuple(self.betas), fused=fused)
        total, floor = int(self.trainer.estimated_stepping_batches), self.minimum / self.learning_rate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total, self.warmup, floor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
