"""A two-block transformer small enough for hundreds of fits, and its hand-written regularized twin."""

import math
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.callbacks import ActivationDensityRegularizer, AttentionEntropyRegularizer

TOKENS, WIDTH, HEADS = 5, 8, 2
ENTROPY_WEIGHT, DENSITY_WEIGHT, EPSILON = 2.0, 0.5, 0.01


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Net(nn.Module):
    """Blocks in a row, optionally under activation checkpointing."""

    def __init__(self, use_reentrant: bool | None = None, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant and self.training and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # a reentrant checkpoint needs an input with gradient
        for block in self.blocks:
            if self.use_reentrant is None or not self.training:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def handwritten_penalty(net: Net, x: Tensor) -> Tensor:
    """The penalty as a user would write it in `training_step`: independent of the library, from the definition."""
    entropies, densities = [], []
    for block in net.blocks:
        batch, tokens, width = x.shape
        q, k, _ = block.attention.qkv(x).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q.to(_exact(q)) @ k.to(_exact(k)).transpose(-1, -2)) / math.sqrt(width // HEADS)
        log_p = scores.log_softmax(-1)
        entropies.append((-(log_p.exp() * log_p).sum(-1) / math.log(tokens)).mean())
        x = x + block.attention(x)
        hidden = torch.tanh(block.fc1(x))
        square = hidden.to(_exact(hidden)) ** 2
        densities.append((square / (square + EPSILON)).mean())
        x = x + block.fc2(hidden)
    return -ENTROPY_WEIGHT * torch.stack(entropies).mean() + DENSITY_WEIGHT * torch.stack(densities).mean()


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Tiny(pl.LightningModule):
    """Automatic optimization.

    Args:
        handwritten: Add the penalty in `training_step`: the reference.
        returns: What `training_step` returns: tensor, dict, or None on every third batch.
        optimizer: sgd, adam or lbfgs.
        iterations: Of lbfgs in a step, each a line search.
    """

    def __init__(
        self,
        handwritten: bool = False,
        use_reentrant: bool | None = None,
        returns: str = "tensor",
        optimizer: str = "sgd",
        batches: int = 8,
        iterations: int = 3,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(use_reentrant)
        self.handwritten, self.returns, self.optimizer, self.batches = handwritten, returns, optimizer, batches
        self.iterations = iterations

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor) -> Tensor:
        loss = (self(x) - x.roll(1, 1)).square().mean()
        return loss + handwritten_penalty(self.net, x) if self.handwritten else loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.returns == "none" and batch_idx % 3 == 2:
            return None
        loss = self.loss(batch[0])
        return {"loss": loss, "extra": 1} if self.returns == "dict" else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=self.iterations, line_search_fn="strong_wolfe")
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)

    def train_dataloader(self) -> DataLoader:
        return loader(self.batches)

    def val_dataloader(self) -> DataLoader:
        return loader(2)


class Manual(Tiny):
    """Manual optimization with one optimizer, accumulating two batches."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch[0]))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Adversarial(Tiny):
    """Manual optimization with two toggled optimizers; both networks are regularized in their own step only."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.other = Net()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            loss = (net(x) - x.roll(1, 1)).square().mean()
            if self.handwritten:
                loss = loss + handwritten_penalty(net, x)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.net, self.other)]


def loader(batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(4 * batches, TOKENS, WIDTH, generator=generator)), batch_size=4)


def regularizers() -> list[pl.Callback]:
    return [
        AttentionEntropyRegularizer(ENTROPY_WEIGHT),
        ActivationDensityRegularizer(DENSITY_WEIGHT, epsilon=EPSILON),
    ]


def trainer(callbacks: list[pl.Callback] | None = None, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = dict(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=callbacks or [],
        # where a monitor without a logger leaves its history
        default_root_dir=tempfile.mkdtemp() if Path.cwd() == Path(__file__).parents[1] else None,
    )  # fmt: skip
    return pl.Trainer(**{**settings, **kwargs})


def fit(module: pl.LightningModule, callbacks: list[pl.Callback] | None = None, **kwargs: Any) -> Tensor:
    """Parameters after training, as one float64 vector."""
    trainer(callbacks, **kwargs).fit(module)
    return parameters(module)


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
