"""The metric is the functional, over the weights of a module."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_reg.metrics import SpectralNorm


def largest(weight: Tensor) -> float:
    """Largest singular value, by numpy."""
    return float(np.linalg.svd(weight.detach().flatten(1).double().numpy(), compute_uv=False)[0])


def test_maximum_over_weights_and_updates() -> None:
    weights = [torch.randn(4, 6), torch.randn(7, 2, 3, 3), torch.randn(1, 5)]
    metric = SpectralNorm()
    for weight in weights:
        metric.update(weight)
    assert metric.compute().item() == pytest.approx(max(map(largest, weights)), rel=1e-5)


class Net(nn.Module):
    """Everything that does and does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.position = nn.Parameter(torch.full((1, 7, 4), 100.0))
        self.convolution = nn.Conv2d(3, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)


def test_module_gives_its_matrices_in_order() -> None:
    net = Net()
    wanted = [net.convolution.weight, net.attention.in_proj_weight, net.attention.out_proj.weight, net.head.weight]
    metric = SpectralNorm(num_weights=4)
    metric.update(net)
    torch.testing.assert_close(metric.compute(), torch.tensor([largest(weight) for weight in wanted]))
    assert SpectralNorm()(net).item() == pytest.approx(max(map(largest, wanted)), rel=1e-5)


class Triple(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


def test_parametrized_weights_count_as_they_are_used() -> None:
    layer = nn.Linear(4, 3)
    before = largest(layer.weight)
    parametrize.register_parametrization(layer, "weight", Triple())
    assert SpectralNorm()(layer).item() == pytest.approx(3 * before, rel=1e-5)
    metric = SpectralNorm(num_weights=1)
    metric.update(nn.Sequential(layer))
    assert metric.compute().item() == pytest.approx(3 * before, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weight_gives_nan_until_reset(bad: float) -> None:
    metric = SpectralNorm()
    metric.update(torch.full((2, 2), bad))
    metric.update(torch.eye(2))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.eye(2))
    assert metric.compute() == 1


def test_zero_weight_is_zero() -> None:
    assert SpectralNorm()(torch.zeros(3, 4)) == 0


def test_half_precision_weights_are_measured_exactly() -> None:
    weight = torch.randn(5, 6).bfloat16()
    assert SpectralNorm()(weight).item() == pytest.approx(largest(weight), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralNorm(num_weights=0), "`num_weights` must be >= 1 or None for the largest of all, got 0"),
        (lambda: SpectralNorm().update(nn.LayerNorm(3)), "`weight` must hold weights .* got LayerNorm without one"),
        (lambda: SpectralNorm().update(torch.ones(3)), "`weight` must have at least two axes"),
        (lambda: SpectralNorm(num_weights=2).update(torch.eye(2)), "`num_weights=2` must be the number .* got 1"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
