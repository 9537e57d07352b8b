"""Activation locality as a loss: what is added to the functional."""

import pytest
import torch

from lightning_reg.functional import activation_locality
from lightning_reg.losses import ActivationLocalityLoss


def test_loss_is_the_functional_and_tap_joins_it() -> None:
    x, documents = torch.randn(2, 4, 3, requires_grad=True), torch.tensor([[1, 1, 2, 2], [1, 0, 2, 0]])
    loss = ActivationLocalityLoss(3.0)
    assert torch.equal(loss(x, documents=documents), activation_locality(x, documents=documents, alpha=3.0))
    passed, penalty, value = loss.tap(x, documents)
    assert torch.equal(passed, x)
    assert penalty.requires_grad
    assert not value.requires_grad
    (passed.sum() + penalty).backward()
    assert x.grad[0].ne(1).all()
    assert x.grad[1].eq(1).all()


def test_repr_and_bad_arguments() -> None:
    assert repr(ActivationLocalityLoss()) == "ActivationLocalityLoss(alpha=100.0)"
    with pytest.raises(ValueError, match=r"`alpha` must be finite and > 0, got -1"):
        ActivationLocalityLoss(-1)
