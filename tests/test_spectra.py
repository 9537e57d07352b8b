"""Norms and effective ranks of a model's weights, all at once or in turn."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_reg import spectra
from lightning_reg.spectra import Weights
from tests import tiny


def reference(weight: torch.Tensor) -> tuple[float, float]:
    values = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
    share = values / values.sum()
    return float(values[0]), float(np.exp(-sum(p * math.log(p) for p in share if p > 0)))


def parts(module: nn.Module, label: str) -> list[torch.Tensor]:
    weight = module.get_submodule(label).weight
    return list(weight.chunk(3)) if label.endswith("qkv") else [weight]


def test_small_weights_are_decomposed_at_each_look() -> None:
    net = tiny.Tiny().net
    weights = Weights(net)
    for _ in range(2):
        norms, ranks = weights.spectra()
        assert list(norms) == list(ranks) == list(weights.entries)
        for label in norms:
            wanted = [reference(part) for part in parts(net, label)]
            assert norms[label].tolist() == pytest.approx([norm for norm, _ in wanted], rel=1e-6)
            assert ranks[label].tolist() == pytest.approx([rank for _, rank in wanted], rel=1e-6)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))


def test_small_weights_take_turns_by_quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))
    monkeypatch.setattr(spectra, "MOST_WORK", 8 * 4**3)
    weights = Weights(net)
    before, _ = weights.spectra()  # all of them
    with torch.no_grad():
        for layer in net:
            layer.weight.mul_(3)
    for look in range(1, 5):
        norms, ranks = weights.spectra()
        fresh = [name for name in norms if not torch.equal(norms[name], before[name])]
        assert fresh == [str(number) for number in range(2 * look)]
        for name in fresh:
            norm, rank = reference(net[int(name)].weight)
            assert norms[name].item() == pytest.approx(norm, rel=1e-6)
            assert ranks[name].item() == pytest.approx(rank, rel=1e-6)


def test_large_weights_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "MOST_WORK", 2 * tiny.WIDTH**3)  # two matrices at a look
    net = tiny.Tiny().net
    weights = Weights(net)
    matrices = sum(len(parts(net, label)) for label in weights.entries)
    for look in range(1, matrices):
        norms, ranks = weights.spectra()
        known = sum(int(rank.isfinite().sum()) for rank in ranks.values())
        assert known == min(2 * look, matrices)
    for label in norms:
        wanted = [reference(part) for part in parts(net, label)]
        assert norms[label].amax().item() == pytest.approx(max(norm for norm, _ in wanted), rel=1e-5)
        assert ranks[label].tolist() == pytest.approx([rank for _, rank in wanted], rel=1e-6)


def test_one_that_is_too_large_gets_a_look_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "MOST_WORK", 1)
    weights = Weights(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6)))
    assert [[bool(rank.isfinite()) for rank in weights.spectra()[1].values()] for _ in range(2)] == [
        [True, False], [True, True],
    ]  # fmt: skip


def test_what_is_not_finite_is_nan() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, math.nan)
    norms, ranks = Weights(model).spectra()
    assert norms["0"].isnan()
    assert ranks["0"].isnan()
    assert norms["1"].isfinite()


def test_no_weights_give_nothing() -> None:
    assert Weights(nn.LayerNorm(3)).spectra() == ({}, {})
