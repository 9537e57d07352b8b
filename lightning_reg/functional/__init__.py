"""The mathematics: one quantity a file, its card on top. Pure functions on tensors; no sign, no weight, no trainer."""

from lightning_reg.functional.activation_density import activation_density, exact_chunk_density, exact_density
from lightning_reg.functional.activation_hoyer import activation_hoyer
from lightning_reg.functional.activation_l1 import activation_l1
from lightning_reg.functional.activation_locality import activation_locality
from lightning_reg.functional.attention_entropy import (
    attention_entropy,
    attention_entropy_from_probs,
    attention_entropy_from_scores,
    attention_with_entropy,
)
from lightning_reg.functional.cett import cett, cett_threshold
from lightning_reg.functional.chunk_density import chunk_density
from lightning_reg.functional.dead_neurons import dead_neurons
from lightning_reg.functional.reuse_ratio import reuse_ratio
from lightning_reg.functional.sparse_activations import drelu, fatrelu, relu2, shifted_relu, statistical_topk, topk
from lightning_reg.functional.spectral_norm import spectral_norm, spectral_reparam
from lightning_reg.functional.temporal_delta import temporal_delta
from lightning_reg.functional.weight_sparsity import (
    erk_densities,
    magnitude_mask,
    n_m_mask,
    random_mask,
    rigl_mask,
    rigl_share,
    weight_sparsity,
)

__all__ = [
    "activation_density",
    "activation_hoyer",
    "activation_l1",
    "activation_locality",
    "attention_entropy",
    "attention_entropy_from_probs",
    "attention_entropy_from_scores",
    "attention_with_entropy",
    "cett",
    "cett_threshold",
    "chunk_density",
    "dead_neurons",
    "drelu",
    "erk_densities",
    "exact_chunk_density",
    "exact_density",
    "fatrelu",
    "magnitude_mask",
    "n_m_mask",
    "random_mask",
    "relu2",
    "reuse_ratio",
    "rigl_mask",
    "rigl_share",
    "shifted_relu",
    "spectral_norm",
    "spectral_reparam",
    "statistical_topk",
    "temporal_delta",
    "topk",
    "weight_sparsity",
]
