"""The mathematics: one quantity a file, its card on top. Pure functions on tensors; no sign, no weight, no trainer."""

from lightning_reg.functional.activation_density import activation_density, exact_density
from lightning_reg.functional.activation_hoyer import activation_hoyer
from lightning_reg.functional.activation_l1 import activation_l1
from lightning_reg.functional.attention_entropy import (
    attention_entropy,
    attention_entropy_from_probs,
    attention_entropy_from_scores,
    attention_with_entropy,
)
from lightning_reg.functional.spectral_norm import spectral_norm, spectral_reparam

__all__ = [
    "activation_density",
    "activation_hoyer",
    "activation_l1",
    "attention_entropy",
    "attention_entropy_from_probs",
    "attention_entropy_from_scores",
    "attention_with_entropy",
    "exact_density",
    "spectral_norm",
    "spectral_reparam",
]
