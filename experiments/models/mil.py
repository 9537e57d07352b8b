"""Multiple-instance models, gated ABMIL and DSMIL of torchmil and an encoder with a class token, and their training."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from experiments.evidence import MissingData
from experiments.models.classifier import cosine
from lightning_reg.functional import attention_entropy_from_probs
from lightning_reg.mil import ADAPTERS, MilAdapter

COMMAND = "pip install torchmil"
MODELS = ("abmil", "dsmil", "transformer")
ADAPTER = {
    "abmil": ADAPTERS["torchmil"],
    # torchmil's DSMIL returns weights (bags, instances, 1)
    "dsmil": MilAdapter(path=1, kind="probs", instance_axis=1, bag_axis=0, needs_mask=True),
}

Batch = dict[str, Tensor]


class BagClassifier(pl.LightningModule):
    """Binary cross-entropy, AdamW, cosine decay; it knows nothing of regularizers.

    Args:
        name: One of ``MODELS``.
        features: Of an instance.
        width: Of the layer that every model begins with, and of its attention.
        dropout: After that layer.
        learning_rate: At the start.
        weight_decay: Of AdamW.
    """

    def __init__(
        self, name: str, features: int, width: int = 64, dropout: float = 0.0, learning_rate: float = 1e-3,
        weight_decay: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.net = name, build_net(name, features, width, dropout)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def forward(self, batch: Batch) -> Any:
        """Output of the net: bag logits (bags,) first."""
        asked: dict[str, dict[str, bool]] = {
            "abmil": {"return_att": True}, "dsmil": {"return_att": True, "return_inst_pred": True}, "transformer": {},
        }  # fmt: skip
        return self.net(batch["instances"], batch["mask"], **asked[self.name])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = [F.binary_cross_entropy_with_logits(logits, batch["label"]) for logits in self.streams(batch)[1]]
        return torch.stack(losses).mean()

    def streams(self, batch: Batch) -> tuple[Any, list[Tensor]]:
        """Output of the net, and bag logits of each of its streams: DSMIL has that of the highest instance too."""
        output = self(batch)
        if self.name != "dsmil":
            return output, [output[0]]
        return output, [output[0], output[2].masked_fill(~batch["mask"], -torch.inf).amax(1)]

    def look(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (bags,), entropy of the attention in [0, 1] (bags,), what it gives to instances (bags, instances)."""
        output, streams = self.streams(batch)
        mask, logits = batch["mask"], torch.stack(streams).mean(0)
        if isinstance(self.net, ClassTokenTransformer):
            rows = self.net.attention(batch["instances"], mask)
            entropy = attention_entropy_from_probs(rows, mask=with_token(mask)[:, None], normalize=True)
            return logits, entropy.mean(1), rows.mean(1)[:, 1:]
        entropy = ADAPTER[self.name].entropy(output, mask=mask, normalize=True)[:, 0]
        return logits, entropy, output[1].reshape(mask.shape)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ClassTokenTransformer(nn.Module):
    """PyTorch's encoder layer over the instances and a class token, from which the bag is read.

    Args:
        first: From instances to ``width``.
        width: Of the encoder.
        heads: Of its attention.
    """

    def __init__(self, first: nn.Module, width: int, heads: int = 4) -> None:
        super().__init__()
        self.first = first
        self.token = nn.Parameter(torch.randn(width) / width**0.5)
        self.encoder = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, instances: Tensor, mask: Tensor) -> tuple[Tensor]:
        """Bag logits (bags,)."""
        encoded = self.encoder(self.tokens(instances), src_key_padding_mask=~with_token(mask))
        return (self.head(self.norm(encoded[:, 0]))[:, 0],)

    def tokens(self, instances: Tensor) -> Tensor:
        """The class token before the instances."""
        return torch.cat([self.token.expand(len(instances), 1, -1), self.first(instances)], 1)

    def attention(self, instances: Tensor, mask: Tensor) -> Tensor:
        """What the class token gives to itself and to the instances (bags, heads, 1 + instances)."""
        normed = self.encoder.norm1(self.tokens(instances))
        hidden = ~with_token(mask)
        found: Tensor = self.encoder.self_attn(
            normed[:, :1], normed, normed, key_padding_mask=hidden, average_attn_weights=False
        )[1]
        return found[:, :, 0]


def with_token(mask: Tensor) -> Tensor:
    """Mask of the class token and the instances."""
    return torch.cat([mask.new_ones(len(mask), 1), mask], 1)


def token_row(batch: Batch) -> Tensor:
    """Mask of queries that leaves only the class token's."""
    mask = torch.zeros_like(with_token(batch["mask"]))
    mask[:, 0] = True
    return mask


def build_net(name: str, features: int, width: int, dropout: float) -> nn.Module:
    """A model on instances of so many features.

    Raises:
        MissingData: If torchmil is not installed.
        ValueError: If there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"`models` may hold {', '.join(MODELS)}, got {name!r}.")
    first = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout))
    if name == "transformer":
        return ClassTokenTransformer(first, width)
    try:
        from torchmil import models
    except ImportError as error:
        raise MissingData("torchmil", COMMAND) from error
    if name == "abmil":
        return models.ABMIL((features,), att_dim=width, gated=True, feat_ext=first)
    return models.DSMIL((features,), att_dim=width, feat_ext=first)
