"""Change from token to token as a loss: what is added to the functional."""

import pytest
import torch

from lightning_reg.functional import temporal_delta
from lightning_reg.losses import TemporalDeltaLoss


@pytest.mark.parametrize("way", [{}, {"theta": 0.01}, {"theta": 0.01, "relative": True}], ids=str)
def test_loss_is_the_functional_and_tap_joins_it(way: dict) -> None:
    x, documents = torch.randn(2, 4, 3, requires_grad=True), torch.tensor([[1, 1, 2, 2], [1, 0, 2, 0]])
    loss = TemporalDeltaLoss(**way)
    assert torch.equal(loss(x, documents=documents), temporal_delta(x, documents=documents, **way))
    passed, penalty, value = loss.tap(x, documents)
    assert torch.equal(passed, x)
    assert penalty.requires_grad
    assert not value.requires_grad
    (passed.sum() + penalty).backward()
    assert x.grad[0].ne(1).all()
    assert x.grad[1].eq(1).all()


def test_repr_and_bad_arguments() -> None:
    assert repr(TemporalDeltaLoss(0.1)) == "TemporalDeltaLoss(theta=0.1, relative=False)"
    with pytest.raises(ValueError, match=r"`theta` must be finite and > 0, or None for no rounding, got 0"):
        TemporalDeltaLoss(0.0)
