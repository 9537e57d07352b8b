"""Handwritten digits, 8x8, from the UCI repository as shipped in scikit-learn's wheel."""

import torch
from sklearn.datasets import load_digits

from experiments.data.images import Images, Part, split

COUNTS = {"train": 1257, "val": 180, "test": 360}
BRIGHTEST = 16.0  # the pixels are counts from 0 to 16


class Digits(Images):
    """1797 images, split at random into 1257 for training, 180 for validation and 360 for the test."""

    def read(self) -> dict[str, Part]:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / BRIGHTEST
        return split((images, torch.tensor(digits.target)), COUNTS, self.split_seed)
