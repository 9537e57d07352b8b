"""Effective rank over weights and modules."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_reg.metrics import EffectiveRank


def reference(weight: torch.Tensor) -> float:
    values = np.linalg.svd(weight.detach().double().numpy().reshape(len(weight), -1), compute_uv=False)
    share = values / values.sum()
    return float(np.exp(-sum(p * math.log(p) for p in share if p > 0)))


def test_mean_over_weights_and_over_those_of_a_module() -> None:
    module = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Conv2d(2, 3, 2))
    weights = [module[1].weight, module[2].weight, torch.randn(3, 9)]
    metric = EffectiveRank()
    metric.update(module)
    metric.update(weights[2])
    assert metric.compute().item() == pytest.approx(np.mean([reference(weight) for weight in weights]), rel=1e-6)


def test_what_is_not_finite_is_nan() -> None:
    weight = torch.randn(3, 4)
    weight[0, 0] = math.inf
    assert EffectiveRank()(weight).isnan()


def test_a_module_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="`weight` must hold weights of two or more axes, got LayerNorm without one"):
        EffectiveRank().update(nn.LayerNorm(3))
