"""Massive activations against numpy and hand-worked numbers."""

import math

import numpy as np
import pytest
import torch

from lightning_reg.functional import massive_activations
from lightning_reg.functional.massive_activations import magnitudes


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 5), (1, 2, 3, 5)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_it_equals_numpy(shape: tuple[int, ...], masked: bool) -> None:
    x = torch.randn(shape)
    mask = torch.rand(shape[:-1]) > 0.4 if masked else None
    if mask is not None:
        mask.view(-1)[0] = True
    size = np.sort(
        np.abs(x.numpy().reshape(-1, shape[-1])[slice(None) if mask is None else mask.numpy().reshape(-1)]), None
    )
    median = size[(size.size - 1) // 2]
    assert massive_activations(x, mask=mask).item() == pytest.approx(size.max() / median, rel=1e-6)
    largest, middle = magnitudes(x, mask=mask)
    assert (largest.item(), middle.item()) == pytest.approx((float(size.max()), float(median)))


def test_hand_worked_numbers() -> None:
    assert massive_activations(torch.tensor([[1.0, -4.0, 0.5, 2.0]])).item() == 4
    padded = torch.tensor([[1.0, 2.0], [9.0, 9.0], [1.0, 8.0]])
    assert massive_activations(padded, mask=torch.tensor([True, False, True])).item() == 8


def test_zeros() -> None:
    assert massive_activations(torch.zeros(3, 4)) == 0
    assert massive_activations(torch.tensor([[0.0, 0.0, 0.0, 2.0]])) == math.inf
    assert massive_activations(torch.zeros(0, 4)) == 0
    assert massive_activations(torch.ones(2, 4), mask=torch.zeros(2, dtype=torch.bool)) == 0


def test_nan_stays_visible_and_padding_may_hold_it() -> None:
    x = torch.tensor([[1.0, 2.0], [math.nan, 1.0]])
    assert massive_activations(x).isnan()
    assert massive_activations(x, mask=torch.tensor([True, False])).item() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(5, 33).to(dtype)
    assert massive_activations(x).dtype == torch.float32
    assert massive_activations(x).item() == pytest.approx(massive_activations(x.double()).item(), rel=1e-6)
    tiny = torch.tensor([[6e4, 6e-5, 6e-5]]).to(dtype)
    assert massive_activations(tiny).isfinite()  # the ratio is taken in float32


@pytest.mark.parametrize("width", [4, 16, 48])
def test_a_sampled_median_meets_every_neuron(width: int) -> None:
    x = torch.arange(1.0, width + 1).expand(4000, width)  # each neuron has a magnitude of its own
    largest, median = magnitudes(x, most=1000)
    assert largest.item() == width
    assert median.item() == pytest.approx((width + 1) / 2, abs=1)
    normal = torch.randn(500, width)
    _, exact = magnitudes(normal)
    _, sampled = magnitudes(normal, most=1000)
    assert sampled.item() == pytest.approx(exact.item(), rel=0.15)


def test_no_gradient() -> None:
    assert not massive_activations(torch.randn(3, 4, requires_grad=True)).requires_grad


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`mask` must have the shape .* \(2,\), got \(3,\)"):
        massive_activations(torch.ones(2, 4), mask=torch.ones(3).bool())
    with pytest.raises(ValueError, match="`x` must be floating point"):
        massive_activations(torch.ones(2, 4).long())
