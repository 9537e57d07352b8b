"""Kernels run on the GPU where there is one, otherwise in Triton's interpreter.

With `pytest -n 8 --dist loadgroup` the tests that fill a GPU's memory run one after the other.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lightning_reg import kernels
from lightning_reg.kernels import operators

LARGE = 2**31  # bytes


@pytest.fixture
def device() -> Iterator[str]:
    """A device on which kernels run; no kernel may have failed there behind a warning."""
    operators._failed.clear()
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with kernels.interpreted(), np.errstate(all="ignore"):  # the interpreter's inf - inf is masked afterwards
            yield "cpu"
    assert not operators._failed
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > LARGE:
        torch.cuda.empty_cache()  # tests in other processes use the same GPU
