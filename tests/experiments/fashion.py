"""A few images in Fashion-MNIST's format."""

import gzip
import struct
from pathlib import Path

import numpy as np


def write_idx(path: Path, array: np.ndarray, zipped: bool = True) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    if zipped:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, 1))
    else:
        path.write_bytes(content)


def write_fashion(folder: Path, train: int, test: int) -> None:
    """Empty images, numbered in their first two pixels."""
    for part, count in (("train", train), ("t10k", test)):
        images = np.zeros((count, 28, 28), "u1")
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype("u1"))
