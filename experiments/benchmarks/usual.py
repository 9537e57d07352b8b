"""The usual way to get the same terms: hooks on materialised tensors and torch's own spectral norm, for comparison."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from experiments.models import ImageClassifier

TINY = 1e-8  # keeps log finite, as public code does


class HookedClassifier(ImageClassifier):
    """Collects a penalty in forward hooks and adds its mean to the loss in ``training_step``."""

    def __init__(self, net: nn.Module, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.terms: list[tuple[float, list[Tensor]]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for weight, collected in self.terms:
            loss = loss + weight * torch.stack(collected).mean()
            collected.clear()
        return loss


def add_entropy(model: HookedClassifier, weight: float) -> None:
    """Attention without the fused kernel, so that its probabilities can be hooked; normalised entropy, maximised."""

    def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
        probs = args[0]
        entropy = -(probs * (probs + TINY).log()).sum(-1)
        collected.append(-entropy.mean() / torch.tensor(probs.shape[-1]).log())

    collected = _term(model, weight)
    for block in model.net.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(_training_only(collect))


def add_density(model: HookedClassifier, weight: float, epsilon: float) -> None:
    """DEFT's public code: ``x^2 / (x^2 + epsilon)`` of the activation's output."""

    def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
        square = args[0].square()
        collected.append((square / (square + epsilon)).mean())

    collected = _term(model, weight)
    for block in model.net.blocks:  # type: ignore[union-attr]
        block.mlp.fc2.register_forward_pre_hook(_training_only(collect))


def add_spectral_norm(model: HookedClassifier) -> None:
    """``torch.nn.utils.parametrizations.spectral_norm`` on every matrix: no gain, a power iteration in each forward."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            spectral_norm(module)


def _term(model: HookedClassifier, weight: float) -> list[Tensor]:
    collected: list[Tensor] = []
    model.terms.append((weight, collected))
    return collected


def _training_only(hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: hook(module, args) if module.training else None
