"""Factors on the penalties of single layers: against a hand-written loss, in every spelling."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_reg import regularize
from lightning_reg.callbacks import ActivationDensityRegularizer, ActivationL1Regularizer, AttentionEntropyRegularizer
from lightning_reg.callbacks.regularizer import layer_factor
from tests import tiny

FACTORS = (0.25, 1.5)


class Weighted(tiny.Tiny):
    """The penalties by hand, each layer's times its factor, and the mean over layers with its own denominator."""

    def loss(self, x: Tensor) -> Tensor:
        loss = (self(x) - x.roll(1, 1)).square().mean()
        total = x.new_zeros(())
        for factor, block in zip(FACTORS, self.net.blocks, strict=True):
            batch, tokens, width = x.shape
            q, k, _ = block.attention.qkv(x).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            log_p = (q @ k.mT / math.sqrt(width // 2)).log_softmax(-1)
            total = total + 2.0 * factor * (log_p.exp() * log_p).sum(-1).mean() / math.log(tokens)
            x = x + block.attention(x)
            hidden = torch.tanh(block.fc1(x))
            total = total + 0.5 * factor * (hidden**2 / (hidden**2 + 0.01)).mean()
            x = x + block.fc2(hidden)
        return loss + total / 2


def regularizers(weights: Any) -> list[Any]:
    return [
        AttentionEntropyRegularizer(2.0, layer_weights=weights),
        ActivationDensityRegularizer(0.5, epsilon=0.01, layer_weights=weights),
    ]


SPELLINGS: dict[str, Any] = {
    "list": list(FACTORS),
    "mapping": {r"net\.blocks\.0\..*": 0.25, r"blocks\.1\..*": 1.5},
    "function": lambda name: FACTORS["blocks.1" in name],
}


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_training_equals_the_handwritten_loss(spelling: str, use_reentrant: bool | None) -> None:
    wanted = tiny.fit(Weighted())
    got = tiny.fit(tiny.Tiny(use_reentrant=use_reentrant), regularizers(SPELLINGS[spelling]))
    assert tiny.distance(got, wanted) <= 1e-6
    assert tiny.distance(tiny.fit(tiny.Tiny(), regularizers(None)), wanted) > 1e-3


def test_factor_zero_leaves_a_layer_out_and_the_logged_value_alone() -> None:
    torch.manual_seed(0)
    net, x = tiny.Net(), torch.randn(3, tiny.TOKENS, tiny.WIDTH)
    gradients, values = [], []
    for weights in ([1.0, 0.0], None):
        net.zero_grad()
        with regularize(net, [ActivationL1Regularizer(1.0, layer_weights=weights)]) as reg:
            reg.add(0.0 * net(x).sum()).backward()
            values.append(reg.values["activation_l1/value"])
        gradients.append([block.fc1.weight.grad.clone() for block in net.blocks])
    assert gradients[0][1].abs().max() == 0
    assert gradients[0][0].abs().max() > 0
    assert gradients[1][1].abs().max() > 0
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize(
    ("weights", "name", "factor"),
    [
        (None, "net.blocks.0.fc2", 1.0),
        ([0.5, 2], "net.blocks.1.fc2", 2.0),
        ([0.5, 2], "net.head", 1.0),
        ({"fc2": 3.0}, "net.blocks.1.fc2", 3.0),
        ({"fc": 3.0}, "net.blocks.1.fc2", 1.0),
        ({".*": 2.0, "fc2": 0}, "net.blocks.1.fc2", 0.0),
        ({"fc2": 0, ".*": 2.0}, "net.blocks.1.fc2", 2.0),
    ],
    ids=["none", "list", "outside_the_blocks", "ending", "part_of_a_name", "last_wins", "last_wins_too"],
)
def test_factor_of_a_layer(weights: Any, name: str, factor: float) -> None:
    assert layer_factor(weights, name) == factor


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([], ValueError, "`layer_weights` must hold finite numbers >= 0, got"),
        ([1.0, -0.1], ValueError, r"got \[1.0, -0.1\]; 0 leaves a layer out"),
        ({"fc2": math.inf}, ValueError, "must hold finite numbers"),
        (["a"], ValueError, "must hold finite numbers"),
        ("fc2", TypeError, "`layer_weights` must be a mapping"),
        (0.5, TypeError, "or a function of the layer's name, got 0.5"),
    ],
    ids=["empty", "negative", "infinite", "text_in_a_list", "text", "number"],
)
def test_bad_factors(weights: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ActivationL1Regularizer(1.0, layer_weights=weights)


def test_too_few_factors_and_a_function_that_gives_none_are_named() -> None:
    with pytest.raises(ValueError, match=r"`layer_weights` has 1 factors, but 'net.blocks.1.fc2' is in block 1"):
        tiny.fit(tiny.Tiny(), [ActivationL1Regularizer(1.0, layer_weights=[1.0])])
    with pytest.raises(ValueError, match=r"`layer_weights\('net.blocks.0.fc2'\)` must be a finite number"):
        tiny.fit(tiny.Tiny(), [ActivationL1Regularizer(1.0, layer_weights=lambda name: None)])


def test_hydra_s_lists_and_mappings_are_taken() -> None:
    from omegaconf import OmegaConf

    assert ActivationL1Regularizer(1.0, layer_weights=OmegaConf.create([1.0, 0.5])).layer_weights == [1.0, 0.5]
    assert ActivationL1Regularizer(1.0, layer_weights=OmegaConf.create({"fc2": 2.0})).layer_weights == {"fc2": 2.0}
