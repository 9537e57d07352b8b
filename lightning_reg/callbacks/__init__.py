"""Callbacks for the Lightning Trainer: when, where and how strong. No formula."""

from lightning_reg.callbacks.activation_density import ActivationDensityRegularizer
from lightning_reg.callbacks.activation_hoyer import ActivationHoyerRegularizer
from lightning_reg.callbacks.activation_l1 import ActivationL1Regularizer
from lightning_reg.callbacks.activation_locality import ActivationLocalityRegularizer
from lightning_reg.callbacks.attention_entropy import AttentionEntropyRegularizer
from lightning_reg.callbacks.attention_logits import AttentionLogitRegularizer
from lightning_reg.callbacks.chunk_density import ChunkDensityRegularizer
from lightning_reg.callbacks.entropy_guided import EntropyGuidedRegularizer
from lightning_reg.callbacks.guard import Guard
from lightning_reg.callbacks.layer_norm_scaling import LayerNormScaling
from lightning_reg.callbacks.monitor import RegMonitor
from lightning_reg.callbacks.prediction_entropy import PredictionEntropyRegularizer
from lightning_reg.callbacks.progressive_sparsity import ProgressiveSparsity
from lightning_reg.callbacks.qk_clip import QKClip
from lightning_reg.callbacks.qk_norm import QKNorm
from lightning_reg.callbacks.regularizer import Regularizer
from lightning_reg.callbacks.softcap import SoftCap, load_softcap, remove_softcap
from lightning_reg.callbacks.sparse_activations import ActivationSubstitution
from lightning_reg.callbacks.spectral_norm import SigmaReparam
from lightning_reg.callbacks.stability import StabilityMonitor
from lightning_reg.callbacks.stochastic_attention import StochasticAttention
from lightning_reg.callbacks.temporal_delta import TemporalDeltaRegularizer
from lightning_reg.callbacks.weight_sparsity import WeightSparsity
from lightning_reg.callbacks.z_loss import ZLossRegularizer
from lightning_reg.reparam import apply_sigma_reparam, fold_checkpoint, merge_sigma_reparam, update_sigma_reparam

__all__ = [
    "ActivationDensityRegularizer",
    "ActivationHoyerRegularizer",
    "ActivationL1Regularizer",
    "ActivationLocalityRegularizer",
    "ActivationSubstitution",
    "AttentionEntropyRegularizer",
    "AttentionLogitRegularizer",
    "ChunkDensityRegularizer",
    "EntropyGuidedRegularizer",
    "Guard",
    "LayerNormScaling",
    "PredictionEntropyRegularizer",
    "ProgressiveSparsity",
    "QKClip",
    "QKNorm",
    "RegMonitor",
    "Regularizer",
    "SigmaReparam",
    "SoftCap",
    "StabilityMonitor",
    "StochasticAttention",
    "TemporalDeltaRegularizer",
    "WeightSparsity",
    "ZLossRegularizer",
    "apply_sigma_reparam",
    "fold_checkpoint",
    "load_softcap",
    "merge_sigma_reparam",
    "remove_softcap",
    "update_sigma_reparam",
]
