"""Metrics over batches and processes: the functionals with states of sums and counts."""

from lightning_reg.metrics.activation_density import ActivationDensity
from lightning_reg.metrics.attention_entropy import AttentionEntropy
from lightning_reg.metrics.cett import CETT
from lightning_reg.metrics.chunk_density import ChunkDensity
from lightning_reg.metrics.dead_neurons import DeadNeurons
from lightning_reg.metrics.reuse_ratio import ReuseRatio
from lightning_reg.metrics.spectral_norm import SpectralNorm
from lightning_reg.metrics.weight_sparsity import WeightSparsity

__all__ = [
    "CETT",
    "ActivationDensity",
    "AttentionEntropy",
    "ChunkDensity",
    "DeadNeurons",
    "ReuseRatio",
    "SpectralNorm",
    "WeightSparsity",
]
