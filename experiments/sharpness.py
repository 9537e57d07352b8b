"""Sharpness: the largest magnitude of an eigenvalue of the loss's Hessian, during training.

``|lambda|_max`` by power iteration ``v <- H v / |H v|``, exact products with the Hessian by a second backward pass. The
parameters are those that the optimizer trains: under a reparametrization the raw ones, with the singular vectors held
fixed as in its gradient. Approached from below.
"""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TINY = 1e-30


def sharpness(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], vector: Tensor, iterations: int
) -> tuple[float, Tensor]:
    """``|H v|`` after ``iterations`` products, and the unit vector it was reached with.

    Args:
        loss: Of the parameters, twice differentiable.
        parameters: Trained tensors.
        vector: Start (elements of all parameters,), of any length but 0.
        iterations: Products with the Hessian.
    """
    # no other kernel of attention has a second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(loss(), parameters, create_graph=True)
        flat, size = torch.cat([grad.flatten() for grad in grads]), torch.zeros(())
        for _ in range(iterations):
            unit = vector / vector.norm().clamp_min(TINY)
            products = torch.autograd.grad(flat, parameters, unit, retain_graph=True, materialize_grads=True)
            vector = torch.cat([product.flatten() for product in products])
            size = vector.norm()
    return float(size), vector.detach()


class Sharpness(pl.Callback):
    """Measures the sharpness of an image classifier on a fixed batch, evenly over training; each start is the last end.

    Args:
        images: Of the batch, the first of the training data.
        points: Measurements, the first before training, the last after it.
        iterations: Products with the Hessian, for each.
    """

    def __init__(self, images: int, points: int, iterations: int) -> None:
        self.images, self.points, self.iterations = images, points, iterations
        self.curve: list[tuple[int, float]] = []
        self.vector = torch.empty(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sizes = sum(parameter.numel() for parameter in self._parameters(pl_module))
        start = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        self.vector = start.to(pl_module.device)
        self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = [round(place * trainer.max_steps / (self.points - 1)) for place in range(1, self.points)]
        if trainer.global_step in due:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, pl_module: Any) -> None:
        images, labels = (part[: self.images] for part in trainer.datamodule.parts["train"])  # type: ignore[attr-defined]
        size, vector = sharpness(
            lambda: F.cross_entropy(pl_module.net(images), labels), self._parameters(pl_module), self.vector,
            self.iterations,
        )  # fmt: skip
        self.curve.append((trainer.global_step, size))
        if bool(vector.isfinite().all()) and size > 0:
            self.vector = vector

    @staticmethod
    def _parameters(pl_module: pl.LightningModule) -> list[Tensor]:
        return [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
