"""LightningModules of the experiments."""

from experiments.models.classifier import ImageClassifier

__all__ = ["ImageClassifier"]
