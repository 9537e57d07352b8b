"""z-loss as a loss: labels, masks and the tap."""

import pytest
import torch

from lightning_reg.functional import z_loss
from lightning_reg.losses import ZLoss


def test_loss_is_the_functional_and_tap_joins_it() -> None:
    x, mask = torch.randn(2, 3, requires_grad=True), torch.tensor([True, False])
    loss = ZLoss()
    assert torch.equal(loss(x, mask=mask), z_loss(x, mask=mask))
    passed, penalty, value = loss.tap(x, mask)
    assert torch.equal(passed, x)
    assert penalty.requires_grad
    assert not value.requires_grad
    (passed.sum() + penalty).backward()
    assert x.grad[0].ne(1).all()
    assert x.grad[1].eq(1).all()
    assert repr(ZLoss(ignore_index=0, shift=True)) == "ZLoss(ignore_index=0, shift=True)"


@pytest.mark.parametrize(
    ("labels", "arguments", "counted"),
    [
        ([[5, -100, 2], [-100, 1, -100]], {}, [(0, 0), (0, 2), (1, 1)]),
        ([[0, 3, 0], [1, 0, 0]], {"ignore_index": 0}, [(0, 1), (1, 0)]),
        ([[5, -100, 2], [-100, 1, -100]], {"shift": True}, [(0, 1), (1, 0)]),
    ],
    ids=["ignored", "other_index", "shifted"],
)
def test_labels_choose_the_positions(labels: list, arguments: dict, counted: list) -> None:
    logits, given = torch.randn(2, 3, 4), torch.tensor(labels)
    wanted = torch.stack([logits[place].exp().sum().log() ** 2 for place in counted]).mean()
    loss = ZLoss(**arguments)
    torch.testing.assert_close(loss(logits, labels=given), wanted)
    # a mask is of the positions of the logits, and not shifted
    mask = torch.ones(2, 3)
    mask[counted[0]] = 0
    wanted = torch.stack([logits[place].exp().sum().log() ** 2 for place in counted[1:]]).mean()
    torch.testing.assert_close(loss(logits, labels=given, mask=mask.long()), wanted)


def test_labels_that_ignore_everything_give_exactly_nothing() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    penalty = ZLoss()(logits, labels=torch.full((2, 3), -100))
    penalty.backward()
    assert penalty.item() == 0
    assert logits.grad.eq(0).all()
