"""Activation density as a loss: what is added to the functional."""

import pytest
import torch

from lightning_reg.functional import activation_density
from lightning_reg.losses import ActivationDensityLoss


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_loss_is_the_functional(relative: bool) -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    loss = ActivationDensityLoss(0.1, relative=relative)
    assert torch.equal(loss(x), activation_density(x, epsilon=0.1, relative=relative))
    assert torch.equal(loss(x, mask=mask), activation_density(x, epsilon=0.1, mask=mask, relative=relative))


def test_default_epsilon_is_that_of_the_public_code() -> None:
    x = torch.tensor([[3e-4, 1e-3]])
    torch.testing.assert_close(ActivationDensityLoss()(x), (x**2 / (x**2 + 1e-7)).mean())


def test_minimising_it_lowers_the_density() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    loss = ActivationDensityLoss(0.1)
    optimizer = torch.optim.SGD([x], lr=1.0)
    before = loss(x)
    before.backward()
    optimizer.step()
    assert loss(x) < before
    assert before > 0


def test_tap_gives_value_penalty_and_detached_density() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    passed, penalty, value = ActivationDensityLoss(0.1).tap(x, torch.tensor([True, False]))
    assert torch.equal(passed, x)
    assert penalty.requires_grad
    assert not value.requires_grad
    assert torch.equal(penalty, value)
    penalty.backward()
    assert x.grad[0].ne(0).all()
    assert x.grad[1].eq(0).all()


def test_epsilon_is_checked_and_shown() -> None:
    with pytest.raises(ValueError, match="`epsilon` must be finite and > 0, got 0"):
        ActivationDensityLoss(0)
    assert repr(ActivationDensityLoss(0.1)) == "ActivationDensityLoss(epsilon=0.1, relative=False)"
    assert not ActivationDensityLoss().state_dict()
