"""Kernels run on the GPU where there is one, otherwise in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch

from lightning_reg import kernels


@pytest.fixture
def device() -> Iterator[str]:
    """A device on which kernels run."""
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with kernels.interpreted():
            yield "cpu"
