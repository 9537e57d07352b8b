"""Hoyer-square as a loss: what is added to the functional."""

import torch

from lightning_reg.functional import activation_hoyer
from lightning_reg.losses import ActivationHoyerLoss


def test_loss_is_the_functional_and_tap_joins_it() -> None:
    x, mask = torch.randn(2, 3, requires_grad=True), torch.tensor([True, False])
    loss = ActivationHoyerLoss()
    assert torch.equal(loss(x, mask=mask), activation_hoyer(x, mask=mask))
    passed, penalty, value = loss.tap(x, mask)
    assert torch.equal(passed, x)
    assert penalty.requires_grad
    assert not value.requires_grad
    (passed.sum() + penalty).backward()
    assert x.grad[0].ne(1).all()
    assert x.grad[1].eq(1).all()
