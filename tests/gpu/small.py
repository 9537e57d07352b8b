"""A small transformer whose shapes kernels take, and every penalty of the library written by hand."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.callbacks import (
    ActivationDensityRegularizer,
    ActivationHoyerRegularizer,
    ActivationL1Regularizer,
    AttentionEntropyRegularizer,
    PredictionEntropyRegularizer,
    SigmaReparam,
    ZLossRegularizer,
)
from tests import tiny

TOKENS, WIDTH, HEADS, HIDDEN, CLASSES, BATCH = 33, 64, 2, 128, 97, 4
EPSILON = 0.1

WEIGHTS = {  # by the name of the quantity
    "attention_entropy": 15.0,
    "activation_density": 20.0,
    "activation_l1": 15.0,
    "activation_hoyer": 20.0,
    "z_loss": 0.1,
    "prediction_entropy": 10.0,
}
SIGMA = "sigma_reparam"
NAMES = (*WEIGHTS, SIGMA)


def callbacks(names: Iterable[str] = NAMES, scale: float = 1.0) -> list[pl.Callback]:
    """The library's, with weights times ``scale``."""
    weight = {name: scale * number for name, number in WEIGHTS.items()}
    made: dict[str, Any] = {
        "attention_entropy": lambda: AttentionEntropyRegularizer(weight["attention_entropy"]),
        "activation_density": lambda: ActivationDensityRegularizer(weight["activation_density"], epsilon=EPSILON),
        "activation_l1": lambda: ActivationL1Regularizer(weight["activation_l1"]),
        "activation_hoyer": lambda: ActivationHoyerRegularizer(weight["activation_hoyer"]),
        "z_loss": lambda: ZLossRegularizer(weight["z_loss"]),
        "prediction_entropy": lambda: PredictionEntropyRegularizer(weight["prediction_entropy"]),
        SIGMA: SigmaReparam,
    }
    return [made[name]() for name in names]


# --- penalties by hand, from their definitions -----------------------------------------------------------------------


def exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def entropy_of(scores: Tensor) -> Tensor:
    """Mean entropy of softmax rows (..., keys), normalised."""
    log_p = scores.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean() / math.log(scores.shape[-1])


def of_attention(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        scores = exact(query) @ exact(key).mT / math.sqrt(query.shape[-1])
        return {"attention_entropy": -entropy_of(scores)}


def of_hidden(hidden: Tensor) -> dict[str, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        x = exact(hidden)
        square = x.square()
        return {
            "activation_density": (square / (square + EPSILON)).mean(),
            "activation_l1": x.abs().mean(),
            "activation_hoyer": (x.abs().sum(-1).square() / square.sum(-1)).mean() / x.shape[-1],
        }


def of_logits(logits: Tensor) -> dict[str, Tensor]:
    with torch.autocast(logits.device.type, enabled=False):
        x = exact(logits)
        return {"z_loss": x.logsumexp(-1).square().mean(), "prediction_entropy": -entropy_of(x)}


class SpectralLinear(nn.Linear):
    """``(gain / sigma) W`` in place of W by hand; ``parts`` row blocks have a gain each."""

    def __init__(self, linear: nn.Linear, parts: int) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        left, sigma, right = torch.linalg.svd(self.weight.detach().double().view(parts, -1, linear.in_features))
        self.gain = nn.Parameter(sigma[:, 0].float())
        self.register_buffer("u", left[:, :, 0].float())
        self.register_buffer("v", right[:, 0].float())

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        kept = {name: getattr(self, name) for name in ("gain", "u", "v")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():  # in float32 at least, as the library keeps them
            moved = getattr(self, name)
            if moved.dtype in (torch.float16, torch.bfloat16):
                moved.data = tensor.data.to(moved.device)
        return self

    def in_use(self) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            blocks = exact(self.weight).view(len(self.gain), -1, self.in_features)
            sigma = (self.u * (blocks @ self.v[:, :, None])[:, :, 0]).sum(-1)
            return ((self.gain / sigma)[:, None, None] * blocks).reshape(self.weight.shape).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.in_use(), self.bias)

    @torch.no_grad()
    def update(self) -> None:
        blocks = exact(self.weight).view(len(self.gain), -1, self.in_features)
        self.u.copy_(F.normalize((blocks @ self.v[:, :, None])[:, :, 0], dim=-1))
        self.v.copy_(F.normalize((blocks.mT @ self.u[:, :, None])[:, :, 0], dim=-1))


# --- model -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.terms: dict[str, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        if self.terms is not None:
            self.terms |= of_attention(q, k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """``terms``, where it is not None, takes the penalties of this block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.terms: dict[str, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        # of both signs, but none near 0, where rounding would decide on the slope of a magnitude
        first, second = (0.6 + 0.5 * torch.tanh(self.fc1(x))).chunk(2, -1)
        hidden = torch.cat([first, -second], -1)
        if self.terms is not None:
            self.terms |= of_hidden(hidden)
        return x + self.fc2(hidden)


class Net(nn.Module):
    def __init__(self, use_reentrant: bool | None, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.use_reentrant = use_reentrant
        self.terms: dict[str, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        checkpointed = self.use_reentrant is not None and self.training and torch.is_grad_enabled()
        if checkpointed and self.use_reentrant:
            x = x.detach().requires_grad_()  # a reentrant checkpoint needs an input with gradient
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if checkpointed else block(x)
        logits = self.head(x)
        if self.terms is not None:
            self.terms |= of_logits(logits)
        return logits


class Small(pl.LightningModule):
    """Automatic optimization.

    Args:
        by_hand: Names of the penalties, and of the reparametrization, that this module computes itself.
        use_reentrant: Kind of the activation checkpoint around each block, None for no checkpoint.
        optimizer: sgd or adam.
        batches: Of an epoch.
        depth: Blocks.
    """

    def __init__(
        self,
        by_hand: Iterable[str] = (),
        use_reentrant: bool | None = None,
        optimizer: str = "sgd",
        batches: int = 8,
        depth: int = 2,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(use_reentrant, depth)
        for linear in (part for part in self.net.modules() if isinstance(part, nn.Linear)):
            linear.weight.data *= 2.0  # attention that has a choice
        self.by_hand, self.optimizer, self.batches = tuple(by_hand), optimizer, batches
        if SIGMA in self.by_hand:
            for name, linear in list(self.net.named_modules()):
                if isinstance(linear, nn.Linear):
                    self.net.set_submodule(name, SpectralLinear(linear, 3 if name.endswith("qkv") else 1))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        parts = [part for part in self.net.modules() if isinstance(part, (Attention, Block, Net))]
        for part in parts:
            part.terms = {} if self.by_hand else None
        loss = F.cross_entropy(self(x).flatten(0, 1), labels.flatten())
        for name in self.by_hand:
            if name != SIGMA:
                loss = loss + WEIGHTS[name] * torch.stack([p.terms[name] for p in parts if name in p.terms]).mean()
        for part in parts:
            part.terms = None
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch)

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step != self.steps:
            self.steps = self.trainer.global_step
            self.update()

    def update(self) -> None:
        """Power iteration of the hand-written reparametrization."""
        for part in self.net.modules():
            if isinstance(part, SpectralLinear):
                part.update()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.5)

    def train_dataloader(self) -> DataLoader:
        return loader(self.batches)


class Manual(Small):
    """Manual optimization with one optimizer, accumulating two batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(*batch))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


def data(batches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * batches, TOKENS, WIDTH, generator=generator)
    return x, torch.randint(0, CLASSES, x.shape[:2], generator=generator)


def loader(batches: int) -> DataLoader:
    return DataLoader(TensorDataset(*data(batches)), batch_size=BATCH)


# --- trainings -------------------------------------------------------------------------------------------------------


def device_settings() -> dict[str, Any]:
    return {"accelerator": "gpu" if torch.cuda.is_available() else "cpu", "devices": 1}


def trainer(callbacks: list[pl.Callback] | None = None, **settings: Any) -> pl.Trainer:
    return tiny.trainer(callbacks, **{**device_settings(), **settings})


def fit(module: Small, callbacks: list[pl.Callback] | None = None, **settings: Any) -> Tensor:
    """Weights in use after training, as one float64 vector."""
    trainer(callbacks, **settings).fit(module)
    return weights(module)


def weights(module: Small) -> Tensor:
    """Weights in use and biases, as one float64 vector on the CPU."""
    return torch.cat([tensor.detach().double().cpu().flatten() for tensor in weights_by_name(module).values()])


def weights_by_name(module: Small) -> dict[str, Tensor]:
    linear = {name: part for name, part in module.net.named_modules() if isinstance(part, nn.Linear)}
    own = {name: part.in_use() if isinstance(part, SpectralLinear) else part.weight for name, part in linear.items()}
    return {f"{name}.{kind}": own[name] if kind == "weight" else linear[name].bias for name in linear
            for kind in ("weight", "bias")}  # fmt: skip


def rms(vector: Tensor) -> float:
    return vector.square().mean().sqrt().item()
