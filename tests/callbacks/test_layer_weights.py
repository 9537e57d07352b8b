"""Factors on the penalties of single layers: against a hand-written loss, in every spelling."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg import regularize
from lightning_reg.callbacks import ActivationDensityRegularizer, ActivationL1Regularizer, AttentionEntropyRegularizer
from lightning_reg.callbacks.regularizer import layer_factors
from tests import tiny
from tests.test_engine import assert_untouched

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


SITES = ["net.blocks.0.fc2", "net.blocks.1.fc2", "net.head"]


@pytest.mark.parametrize(
    ("weights", "factors"),
    [
        (None, {}),
        ([0.5, 2], [0.5, 2.0, 1.0]),
        ({"fc2": 3.0}, [3.0, 3.0, 1.0]),
        ({"blocks.1": 3.0}, [1.0, 3.0, 1.0]),
        ({r"blocks\.1": 0, "net": 2.0}, [2.0, 2.0, 2.0]),
        ({".*": 2.0, "blocks.1.fc2": 0}, [2.0, 0.0, 2.0]),
        (lambda name: np.float32(0.5), [0.5, 0.5, 0.5]),
    ],
    ids=["none", "list", "ending", "what_is_around", "last_wins", "last_wins_too", "numpy"],
)
def test_factors_of_layers(weights: Any, factors: Any) -> None:
    wanted = factors if isinstance(factors, dict) else dict(zip(SITES, factors, strict=True))
    assert layer_factors(weights, SITES) == wanted


def test_the_number_that_differs_is_that_of_the_block() -> None:
    assert layer_factors([1.0, 0.5], ["0.blocks.0.fc", "0.blocks.1.fc"]) == {"0.blocks.0.fc": 1.0, "0.blocks.1.fc": 0.5}
    assert layer_factors([0.5], ["blocks.0.fc"]) == {"blocks.0.fc": 0.5}


@pytest.mark.parametrize(
    ("weights", "sites", "message"),
    [
        ([1.0], SITES, "`layer_weights` has 1 factors, but the layers are in 2 blocks"),
        ([1.0, 0.5, 0.2], SITES, "has 3 factors, but the layers are in 2 blocks"),
        ([1.0], ["net"], "has 1 factors, but the layers are in 0 blocks"),
        ([1.0, 1.0], ["layers.0.blocks.0.fc", "layers.1.blocks.1.fc"], "needs one number that differs"),
        ({"blocks.9": 0.0}, SITES, "`layer_weights` key 'blocks.9' matches no layer; there are net.blocks.0.fc2"),
        ({"fc": 3.0}, SITES, "`layer_weights` key 'fc' matches no layer"),
        ([0, 0], SITES[:2], "are 0 for every layer"),
        ({".*": 0.0}, SITES, "are 0 for every layer"),
        (lambda name: 0.0, SITES, "are 0 for every layer"),
        (lambda name: None, SITES, r"`layer_weights\('net.blocks.0.fc2'\)` must be a finite number"),
        (lambda name: True, SITES, "must be a finite number >= 0, got True"),
    ],
    ids=[
        "few",
        "many",
        "no_block",
        "two_numbers",
        "typo",
        "part_of_a_name",
        "list_of_0",
        "all_0",
        "function_0",
        "none",
        "bool",
    ],
)
def test_factors_that_fit_no_layer(weights: Any, sites: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_factors(weights, sites)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([], ValueError, "`layer_weights` must hold finite numbers >= 0, got"),
        ([1.0, -0.1], ValueError, r"got \[1.0, -0.1\]; 0 leaves a layer out"),
        ({"fc2": math.inf}, ValueError, "must hold finite numbers"),
        (["a"], ValueError, "must hold finite numbers"),
        ({"(": 1.0}, ValueError, r"key '\(' is not a valid regular expression"),
        ([True], ValueError, "must hold finite numbers"),
        ("fc2", TypeError, "`layer_weights` must be a mapping"),
        (0.5, TypeError, "or a function of the layer's name, got 0.5"),
    ],
    ids=["empty", "negative", "infinite", "text_in_a_list", "expression", "bool", "text", "number"],
)
def test_bad_factors(weights: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ActivationL1Regularizer(1.0, layer_weights=weights)


def test_a_wrong_factor_leaves_the_model_as_it_was() -> None:
    module = tiny.Tiny()
    with pytest.raises(ValueError, match="`layer_weights` key 'nowhere' matches no layer"):
        tiny.fit(module, [ActivationL1Regularizer(1.0, layer_weights={"nowhere": 1.0})])
    assert_untouched(module)


def test_hydra_s_lists_and_mappings_are_taken() -> None:
    from omegaconf import OmegaConf

    assert ActivationL1Regularizer(1.0, layer_weights=OmegaConf.create([1.0, 0.5])).layer_weights == [1.0, 0.5]
    assert ActivationL1Regularizer(1.0, layer_weights=OmegaConf.create({"fc2": 2.0})).layer_weights == {"fc2": 2.0}
