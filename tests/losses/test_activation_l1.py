"""Activation L1 as a loss: what is added to the functional."""

import pytest
import torch

from lightning_reg.functional import activation_l1
from lightning_reg.losses import ActivationL1Loss


@pytest.mark.parametrize("floor", [None, -10.0])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_loss_is_the_functional_and_tap_joins_it(relative: bool, floor: float | None) -> None:
    x, mask = torch.randn(2, 3, requires_grad=True), torch.tensor([True, False])
    loss = ActivationL1Loss(relative=relative, floor=floor)
    assert torch.equal(loss(x, mask=mask), activation_l1(x, mask=mask, relative=relative, floor=floor))
    passed, penalty, value = loss.tap(x, mask)
    assert torch.equal(passed, x)
    assert penalty.requires_grad
    assert not value.requires_grad
    (passed.sum() + penalty).backward()
    assert x.grad[0].ne(1).all()
    assert x.grad[1].eq(1).all()
    assert repr(loss) == f"ActivationL1Loss(relative={relative}, floor={floor})"
