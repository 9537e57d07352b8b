"""Callbacks for the Lightning Trainer: when, where and how strong. No formula."""

from lightning_reg.callbacks.activation_density import ActivationDensityRegularizer
from lightning_reg.callbacks.attention_entropy import AttentionEntropyRegularizer
from lightning_reg.callbacks.regularizer import Regularizer

__all__ = ["ActivationDensityRegularizer", "AttentionEntropyRegularizer", "Regularizer"]
