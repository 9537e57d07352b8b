"""The metric is the functional, over all elements of all weights."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_reg.functional import weight_sparsity
from lightning_reg.metrics import WeightSparsity


def test_weights_of_any_size_weigh_by_their_elements() -> None:
    weights = [torch.randn(n, 6).relu() for n in (1, 10, 3)]
    metric = WeightSparsity()
    for weight in weights:
        metric.update(weight)
    torch.testing.assert_close(metric.compute(), weight_sparsity(torch.cat(weights)))


class Net(nn.Module):
    """Everything that does and does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.convolution = nn.Conv2d(3, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.head.weight


def test_module_gives_its_matrices_and_tied_ones_once() -> None:
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
        net.embedding.weight.zero_()
        net.norm.weight.zero_()
        net.head.weight[0] = 0.0
        net.attention.in_proj_weight[:3] = 0.0
    assert WeightSparsity()(net).item() == pytest.approx((4 + 12) / (48 + 48 + 16 + 12))


class Mask(nn.Module):
    """A parametrization that prunes."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.tensor([1.0, 0.0, 0.0, 1.0])


def test_parametrized_weights_count_as_they_are_used() -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Mask())
    assert WeightSparsity()(layer) == 0.5


def test_nan_counts_as_non_zero() -> None:
    assert WeightSparsity()(torch.tensor([math.nan, 0.0])) == 0.5


def test_counts_do_not_saturate() -> None:
    metric = WeightSparsity()
    metric.zeros += 2**40
    metric.total += 2**40
    metric.update(torch.zeros(1, 3))
    assert metric.zeros.item() == metric.total.item() == 2**40 + 3


def test_module_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="`weight` must hold weights .* got LayerNorm without one"):
        WeightSparsity().update(nn.LayerNorm(3))
