"""Metrics over batches and processes: the functionals with states of sums and counts."""

from lightning_reg.metrics.activation_density import ActivationDensity
from lightning_reg.metrics.attention_entropy import AttentionEntropy
from lightning_reg.metrics.attention_support import AttentionSupport
from lightning_reg.metrics.cett import CETT
from lightning_reg.metrics.chunk_density import ChunkDensity
from lightning_reg.metrics.dead_neurons import DeadNeurons
from lightning_reg.metrics.effective_rank import EffectiveRank
from lightning_reg.metrics.lr_sensitivity import LRSensitivity
from lightning_reg.metrics.massive_activations import MassiveActivations
from lightning_reg.metrics.reuse_ratio import ReuseRatio
from lightning_reg.metrics.spectral_norm import SpectralNorm
from lightning_reg.metrics.weight_sparsity import WeightSparsity

__all__ = [
    "CETT",
    "ActivationDensity",
    "AttentionEntropy",
    "AttentionSupport",
    "ChunkDensity",
    "DeadNeurons",
    "EffectiveRank",
    "LRSensitivity",
    "MassiveActivations",
    "ReuseRatio",
    "SpectralNorm",
    "WeightSparsity",
]
