"""Functionals with a sign and a reduction: modules on explicit tensors, always minimised."""

from lightning_reg.losses.activation_density import ActivationDensityLoss
from lightning_reg.losses.activation_hoyer import ActivationHoyerLoss
from lightning_reg.losses.activation_l1 import ActivationL1Loss
from lightning_reg.losses.activation_locality import ActivationLocalityLoss
from lightning_reg.losses.attention_entropy import AttentionEntropyLoss
from lightning_reg.losses.attention_logits import AttentionLogitLoss
from lightning_reg.losses.chunk_density import ChunkDensityLoss
from lightning_reg.losses.entropy_guided import EntropyGuidedLoss
from lightning_reg.losses.prediction_entropy import PredictionEntropyLoss
from lightning_reg.losses.temporal_delta import TemporalDeltaLoss
from lightning_reg.losses.z_loss import ZLoss

__all__ = [
    "ActivationDensityLoss",
    "ActivationHoyerLoss",
    "ActivationL1Loss",
    "ActivationLocalityLoss",
    "AttentionEntropyLoss",
    "AttentionLogitLoss",
    "ChunkDensityLoss",
    "EntropyGuidedLoss",
    "PredictionEntropyLoss",
    "TemporalDeltaLoss",
    "ZLoss",
]
