"""Activation L1 against float64 numpy and hand-worked numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import activation_l1


def reference(x: Tensor, mask: Tensor | None = None, relative: bool = False) -> float:
    values = x.detach().double().numpy()
    values = values if mask is None else values[mask.numpy()]
    unit = np.sqrt(np.mean(values**2)) if relative else 1.0
    return float(np.mean(np.abs(values)) / unit)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_equals_numpy_in_float64(dtype: torch.dtype, masked: bool, relative: bool) -> None:
    x = (torch.randn(3, 5, 7, dtype=torch.float64) * 0.1).to(dtype)
    mask = torch.rand(3, 5) < 0.6 if masked else None
    got = activation_l1(x, mask=mask, relative=relative)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert got.item() == pytest.approx(reference(x, mask, relative), rel=tolerance)


def test_hand_worked_numbers() -> None:
    x = torch.tensor([[3.0, -4.0], [100.0, 100.0]], requires_grad=True)
    l1 = activation_l1(x, mask=torch.tensor([True, False]))
    assert l1.item() == 3.5
    (3 * l1).backward()
    assert x.grad.tolist() == [[1.5, -1.5], [0.0, 0.0]]


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_gradient_holds_the_unit_fixed(relative: bool) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True])
    unit = x.detach()[mask].square().mean().sqrt() if relative else 1.0
    (wanted,) = torch.autograd.grad(x[mask].abs().mean() / unit * 0.7, x)
    (got,) = torch.autograd.grad(activation_l1(x, mask=mask, relative=relative) * 0.7, x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_gradcheck() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(activation_l1, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_largest_half_precision_numbers_stay_finite(dtype: torch.dtype, relative: bool) -> None:
    x = torch.full((64, 512), 6e4, dtype=dtype, requires_grad=True)
    l1 = activation_l1(x, relative=relative)
    (l1 * 2.0**15).backward()
    assert torch.isfinite(l1)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_zeros_and_nothing_valid(relative: bool) -> None:
    for x, mask in ((torch.zeros(2, 3), None), (torch.randn(2, 3), torch.zeros(2, dtype=torch.bool))):
        x.requires_grad_()
        l1 = activation_l1(x, mask=mask, relative=relative)
        l1.backward()
        assert l1.item() == 0
        assert x.grad.eq(0).all()


def test_relative_does_not_see_the_scale() -> None:
    x = torch.randn(5, 8)
    torch.testing.assert_close(activation_l1(1e-3 * x, relative=True), activation_l1(x, relative=True))


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`x` must be floating point"):
        activation_l1(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `x` without its last axis, \(2,\)"):
        activation_l1(torch.ones(2, 3), mask=torch.ones(3, dtype=torch.bool))
