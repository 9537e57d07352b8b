"""LightningModules of the experiments."""

from experiments.models.classifier import ImageClassifier
from experiments.models.language_model import LanguageModel

__all__ = ["ImageClassifier", "LanguageModel"]
