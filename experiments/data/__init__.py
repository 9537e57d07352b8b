"""Data sets that need no account: one ships in a wheel, one in a Debian package."""

from experiments.data.digits import Digits
from experiments.data.fashion_mnist import FashionMNIST

__all__ = ["Digits", "FashionMNIST"]
