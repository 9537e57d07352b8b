"""Chunk density as a loss: what is added to the functional."""

import pytest
import torch

from lightning_reg.functional import chunk_density
from lightning_reg.losses import ChunkDensityLoss

WAYS = [
    {"chunk": 2, "epsilon": 0.5},
    {"chunk": 3, "epsilon": 2.0, "relative": True},
    {"chunk": 2, "probability": "share"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_loss_is_the_functional_and_tap_joins_it(way: dict) -> None:
    x, documents = torch.randn(2, 4, 3, requires_grad=True), torch.tensor([[1, 1, 2, 2], [0, 0, 0, 0]])
    loss = ChunkDensityLoss(**way)
    assert torch.equal(loss(x, documents=documents), chunk_density(x, documents=documents, **way))
    passed, penalty, value = loss.tap(x, documents)
    assert torch.equal(passed, x)
    assert penalty.requires_grad
    assert not value.requires_grad
    (passed.sum() + penalty).backward()
    assert x.grad[0].ne(1).all()
    assert x.grad[1].eq(1).all()


def test_repr_and_bad_arguments() -> None:
    assert repr(ChunkDensityLoss(8)) == (
        "ChunkDensityLoss(chunk=8, probability='density', epsilon=1e-07, relative=False)"
    )
    for bad, message in (
        ({"chunk": 0}, r"`chunk` must be"),
        ({"epsilon": -1.0}, r"`epsilon` must be"),
        ({"probability": "norm"}, r"`probability` must be"),
        ({"probability": "share", "relative": True}, r"`relative=True` scales"),
    ):
        with pytest.raises(ValueError, match=message):
            ChunkDensityLoss(**bad)
