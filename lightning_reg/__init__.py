"""Training-time regularization for any LightningModule."""

from lightning_reg.engine import regularize

__version__ = "0.1.0"
__all__ = ["regularize"]
