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
from lightning_reg.functional.attention_logits import max_attention_logit, max_attention_logit_from_scores
from lightning_reg.functional.attention_support import attention_support, effective_keys, largest_weight
from lightning_reg.functional.cett import cett, cett_threshold
from lightning_reg.functional.chunk_density import chunk_density
from lightning_reg.functional.dead_neurons import dead_neurons
from lightning_reg.functional.effective_rank import effective_rank
from lightning_reg.functional.entropy_floor import entropy_floor, entropy_floor_from_scores
from lightning_reg.functional.entropy_guided import entropy_guided
from lightning_reg.functional.gradient_rms import gradient_rms
from lightning_reg.functional.layer_norm_scaling import layer_norm_scaling
from lightning_reg.functional.logit_growth import predict_crossing
from lightning_reg.functional.lr_sensitivity import lr_sensitivity
from lightning_reg.functional.massive_activations import massive_activations
from lightning_reg.functional.prediction_entropy import prediction_entropy
from lightning_reg.functional.qk_clip import qk_clip_factors
from lightning_reg.functional.qk_norm import qk_norm
from lightning_reg.functional.reuse_ratio import reuse_ratio
from lightning_reg.functional.softcap import softcap, softcapped_attention
from lightning_reg.functional.sparse_activations import drelu, fatrelu, relu2, shifted_relu, statistical_topk, topk
from lightning_reg.functional.spectral_norm import spectral_norm, spectral_reparam
from lightning_reg.functional.stochastic_attention import stochastic_attention
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
from lightning_reg.functional.z_loss import z_loss

__all__ = [
    "activation_density",
    "activation_hoyer",
    "activation_l1",
    "activation_locality",
    "attention_entropy",
    "attention_entropy_from_probs",
    "attention_entropy_from_scores",
    "attention_support",
    "attention_with_entropy",
    "cett",
    "cett_threshold",
    "chunk_density",
    "dead_neurons",
    "drelu",
    "effective_keys",
    "effective_rank",
    "entropy_floor",
    "entropy_floor_from_scores",
    "entropy_guided",
    "erk_densities",
    "exact_chunk_density",
    "exact_density",
    "fatrelu",
    "gradient_rms",
    "largest_weight",
    "layer_norm_scaling",
    "lr_sensitivity",
    "magnitude_mask",
    "massive_activations",
    "max_attention_logit",
    "max_attention_logit_from_scores",
    "n_m_mask",
    "predict_crossing",
    "prediction_entropy",
    "qk_clip_factors",
    "qk_norm",
    "random_mask",
    "relu2",
    "reuse_ratio",
    "rigl_mask",
    "rigl_share",
    "shifted_relu",
    "softcap",
    "softcapped_attention",
    "spectral_norm",
    "spectral_reparam",
    "statistical_topk",
    "stochastic_attention",
    "temporal_delta",
    "topk",
    "weight_sparsity",
    "z_loss",
]
