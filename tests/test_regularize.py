"""A hand-written loop with `regularize`."""

import pytest
import torch

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer, SigmaReparam
from tests import tiny
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


def test_sigma_reparam_joins_a_hand_written_loop() -> None:
    torch.manual_seed(0)
    net = tiny.Net()
    names = list(net.state_dict())
    with regularize(net, [SigmaReparam(), *tiny.regularizers()]) as reg:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        gains = [parameter for name, parameter in net.named_parameters() if name.endswith("gain")]
        start = [gain.detach().clone() for gain in gains]
        for (x,) in tiny.loader(4):
            optimizer.zero_grad()
            reg.add((net(x) - x.roll(1, 1)).square().mean()).backward()
            optimizer.step()
        assert gains
        assert all(not torch.equal(gain, before) for gain, before in zip(gains, start, strict=True))
        net.eval()
        trained = net(x)
    assert list(net.state_dict()) == names
    assert torch.equal(net(x), trained)


def test_sigma_reparam_alone_leaves_the_loss() -> None:
    with regularize(tiny.Net(), [SigmaReparam()]) as reg:
        loss = torch.ones((), requires_grad=True)
        assert reg.add(loss) is loss


def test_failed_start_leaves_nothing_behind() -> None:
    net = tiny.Net()
    names = list(net.state_dict())
    with pytest.raises(ValueError, match="matches no module"):
        regularize(
            net,
            [SigmaReparam(), *tiny.regularizers(), AttentionEntropyRegularizer(1.0, name="b", targets="nothing")],
        ).__enter__()
    assert list(net.state_dict()) == names
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_second_registration_is_refused() -> None:
    net = tiny.Net()
    with regularize(net, tiny.regularizers()), pytest.raises(RuntimeError, match="already regularized"):
        regularize(net, tiny.regularizers()).__enter__()
    twice = AttentionEntropyRegularizer(1.0)
    with pytest.raises(
        ValueError, match="`name` must differ between regularizers of one model, got 'attention_entropy'"
    ):
        regularize(net, [twice, AttentionEntropyRegularizer(1.0)]).__enter__()
    with pytest.raises(ValueError, match="`callbacks` must hold at least one"):
        regularize(net, [])
