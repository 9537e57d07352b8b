"""Hoyer-square as a loss: what is added to the functional."""

import pytest
import torch

from lightning_reg.functional import activation_hoyer
from lightning_reg.losses import ActivationHoyerLoss


@pytest.mark.parametrize("floor", [None, -10.0])
def test_loss_is_the_functional_and_tap_joins_it(floor: float | None) -> None:
    x, mask = torch.randn(2, 3, requires_grad=True), torch.tensor([True, False])
    loss = ActivationHoyerLoss(floor=floor)
    assert torch.equal(loss(x, mask=mask), activation_hoyer(x, mask=mask, floor=floor))
    passed, penalty, value = loss.tap(x, mask)
    assert torch.equal(passed, x)
    assert penalty.requires_grad
    assert not value.requires_grad
    (passed.sum() + penalty).backward()
    assert x.grad[0].ne(1).all()
    assert x.grad[1].eq(1).all()
    assert repr(loss) == f"ActivationHoyerLoss(floor={floor})"
