"""Metrics over batches and processes: the functionals with states of sums and counts."""

from lightning_reg.metrics.activation_density import ActivationDensity
from lightning_reg.metrics.attention_entropy import AttentionEntropy
from lightning_reg.metrics.spectral_norm import SpectralNorm

__all__ = ["ActivationDensity", "AttentionEntropy", "SpectralNorm"]
