"""Hoyer-square of activations against float64 numpy and hand-worked numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_reg.functional import activation_hoyer


def reference(x: Tensor, mask: Tensor | None = None, floor: float | None = None) -> float:
    values = x.detach().double().numpy()
    values = values if floor is None else np.maximum(values, floor) - floor
    values = values.reshape(-1, values.shape[-1]) if mask is None else values[mask.numpy()]
    return float(np.mean([np.abs(row).sum() ** 2 / (len(row) * (row**2).sum()) if row.any() else 0 for row in values]))


@pytest.mark.parametrize("floor", [None, -0.07, 0.02], ids=["magnitude", "below", "above"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_equals_numpy_in_float64(dtype: torch.dtype, masked: bool, floor: float | None) -> None:
    x = (torch.randn(3, 5, 7, dtype=torch.float64) * 0.1).to(dtype)
    x[0, 0] = 0
    mask = torch.rand(3, 5) < 0.6 if masked else None
    got = activation_hoyer(x, mask=mask, floor=floor)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.item() == pytest.approx(reference(x, mask, floor), rel=1e-12 if dtype == torch.float64 else 2e-6)


def test_equal_nonzeros_read_as_a_density() -> None:
    for k in (1, 3, 8):
        x = torch.zeros(2, 8)
        x[:, :k] = -5.0
        assert activation_hoyer(x).item() == pytest.approx(k / 8)


def test_gradient_equals_that_of_the_formula_and_passes_gradcheck_of_both_orders() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True])
    rows = x[mask]
    formula = (rows.abs().sum(-1).square() / (6 * rows.square().sum(-1))).mean()
    (wanted,) = torch.autograd.grad(0.7 * formula, x)
    (got,) = torch.autograd.grad(0.7 * activation_hoyer(x, mask=mask), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(activation_hoyer, (x,))
    assert torch.autograd.gradgradcheck(activation_hoyer, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 6e4])
def test_value_and_gradient_are_finite_at_every_scale(dtype: torch.dtype, scale: float) -> None:
    x = (torch.rand(4, 16) * scale).to(dtype).requires_grad_()
    hoyer = activation_hoyer(x)
    hoyer.backward()
    assert hoyer.item() == pytest.approx(reference(x), rel=1e-5)
    assert torch.isfinite(x.grad).all()


def test_numbers_whose_squares_underflow_are_measured() -> None:
    x = torch.tensor([[1e-30, -1e-30, 0.0, 0.0]])
    assert activation_hoyer(x).item() == pytest.approx(0.5)


def test_zeros_and_nothing_valid() -> None:
    for x, mask in ((torch.zeros(2, 3), None), (torch.randn(2, 3), torch.zeros(2, dtype=torch.bool))):
        x.requires_grad_()
        hoyer = activation_hoyer(x, mask=mask)
        hoyer.backward()
        assert hoyer.item() == 0
        assert x.grad.eq(0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_range_scale_and_permutation(width: int, scale: float, seed: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hoyer = activation_hoyer(x).item()
    assert 1 / width - 1e-12 <= hoyer <= 1 + 1e-12
    assert activation_hoyer(scale * x.flip(-1)).item() == pytest.approx(hoyer, rel=1e-9)


def test_one_step_makes_activations_sparser() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    before = activation_hoyer(x)
    (grad,) = torch.autograd.grad(before, x)
    assert activation_hoyer(x - 1.0 * grad) < before


def test_gradient_with_a_floor_is_that_of_the_formula_and_stops_at_the_floor() -> None:
    x = (torch.randn(4, 6, dtype=torch.float64) - 1).requires_grad_()
    mask = torch.tensor([True, True, False, True])
    rows = x[mask].clamp_min(-1.5) + 1.5
    formula = (rows.sum(-1).square() / (6 * rows.square().sum(-1))).mean()
    (wanted,) = torch.autograd.grad(0.7 * formula, x)
    (got,) = torch.autograd.grad(0.7 * activation_hoyer(x, mask=mask, floor=-1.5), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    assert 0 < (x[mask] <= -1.5).sum() < 18
    assert got[x <= -1.5].eq(0).all()
    assert torch.autograd.gradcheck(lambda x: activation_hoyer(x, floor=-1.5), x)


def test_equal_heights_above_the_floor_read_as_a_density() -> None:
    x = torch.full((2, 8), -12.0)
    x[:, :3] = 1.0
    assert activation_hoyer(x, floor=-10.0).item() == pytest.approx(3 / 8)


def test_an_input_below_its_floor_has_neither_value_nor_gradient() -> None:
    x = torch.full((2, 3), -20.0, requires_grad=True)
    hoyer = activation_hoyer(x, floor=-10.0)
    hoyer.backward()
    assert hoyer.item() == 0
    assert x.grad.eq(0).all()


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`x` must be floating point"):
        activation_hoyer(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `x` without its last axis"):
        activation_hoyer(torch.ones(2, 3), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`floor` must be a finite number, or None for the magnitude, got nan"):
        activation_hoyer(torch.ones(2, 3), floor=float("nan"))
