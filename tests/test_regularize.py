"""A hand-written loop with `regularize`."""

import pytest
import torch
from tests import tiny

from lightning_reg import regularize
from tests.test_engine import EXACT


def train(net: tiny.Net, regularized: bool) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

    def steps(add) -> None:
        for (x,) in tiny.loader(4):
            loss = add((net(x) - x.roll(1, 1)).square().mean(), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if not regularized:
        steps(lambda loss, x: loss + tiny.handwritten_penalty(net, x))
        return
    with regularize(net, tiny.regularizers()) as reg:
        steps(lambda loss, x: reg.add(loss))
        assert reg.step == 4


def test_hand_written_loop_equals_the_handwritten_loss() -> None:
    torch.manual_seed(0)
    net = tiny.Net()
    twin = tiny.Net()
    twin.load_state_dict(net.state_dict())
    train(net, regularized=True)
    train(twin, regularized=False)
    assert tiny.distance(tiny.parameters(net), tiny.parameters(twin)) <= EXACT
    for part in net.modules():
        assert not part._forward_pre_hooks


def test_add_outside_the_block_raises() -> None:
    with pytest.raises(RuntimeError, match="inside the `with regularize"):
        regularize(tiny.Net(), tiny.regularizers()).add(torch.zeros(()))
