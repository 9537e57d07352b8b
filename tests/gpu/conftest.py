"""Which kernels ran, and compiled code of other tests out of the way."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_reg.kernels import operators


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that are chosen during the test."""
    names: set[str] = set()
    choose = operators._launcher

    def noting(kernel: str, *args: Any) -> object:
        launch = choose(kernel, *args)
        if launch is not None:
            names.add(kernel)
        return launch

    monkeypatch.setattr(operators, "_launcher", noting)
    return names


@pytest.fixture
def compiling() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()
