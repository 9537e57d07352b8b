"""Data sets that need no account: one ships in a wheel, two in Debian packages."""

from experiments.data.digits import Digits
from experiments.data.fashion_mnist import FashionMNIST
from experiments.data.python_docs import PythonDocs

__all__ = ["Digits", "FashionMNIST", "PythonDocs"]
