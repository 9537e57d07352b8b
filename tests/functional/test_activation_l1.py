"""Activation L1 against float64 numpy and hand-worked numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import activation_l1, exact_density


def reference(x: Tensor, mask: Tensor | None = None, relative: bool = False, floor: float | None = None) -> float:
    values = x.detach().double().numpy()
    values = values if mask is None else values[mask.numpy()]
    values = values if floor is None else np.maximum(values, floor) - floor
    unit = np.sqrt(np.mean(values**2)) if relative else 1.0
    return float(np.mean(np.abs(values)) / unit)


@pytest.mark.parametrize("floor", [None, -0.07, 0.02], ids=["magnitude", "below", "above"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_equals_numpy_in_float64(dtype: torch.dtype, masked: bool, relative: bool, floor: float | None) -> None:
    x = (torch.randn(3, 5, 7, dtype=torch.float64) * 0.1).to(dtype)
    mask = torch.rand(3, 5) < 0.6 if masked else None
    got = activation_l1(x, mask=mask, relative=relative, floor=floor)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert got.item() == pytest.approx(reference(x, mask, relative, floor), rel=tolerance)


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


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_above_a_floor_the_pull_is_down_and_at_or_below_it_there_is_none(relative: bool) -> None:
    x = torch.tensor([[-12.0, -10.0, -9.0, 3.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False])
    l1 = activation_l1(x, mask=mask, floor=-10.0, relative=relative)
    unit = (170 / 4) ** 0.5 if relative else 1.0
    assert l1.item() == pytest.approx((0 + 0 + 1 + 13) / 4 / unit)
    (3 * l1).backward()
    wanted = torch.tensor([[0.0, 0.0, 3 / 4, 3 / 4], [0.0] * 4], dtype=torch.float64) / unit
    torch.testing.assert_close(x.grad, wanted)


def test_gradcheck_with_a_floor() -> None:
    x = (torch.randn(4, 6, dtype=torch.float64) * 10 - 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: activation_l1(x, floor=-10.0), x)


def test_the_share_at_the_floor_is_what_has_no_gradient() -> None:
    """D2DMoE logs ``clamped <= floor``, which no clamped value is: they are >= 0 and the floor is -10."""
    floor = -10.0
    x = torch.tensor([-30.0, -10.0, -10.5, -9.9, 0.0, 4.0, -11.0, 2.0]).requires_grad_()
    activation_l1(x, floor=floor).backward()
    clamped = x.detach().clamp_min(floor) - floor
    assert (clamped <= floor).float().mean().item() == 0
    assert x.grad.eq(0).float().mean().item() == (clamped == 0).float().mean().item() == 0.5
    assert 1 - exact_density(clamped).item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_floor_between_two_low_precision_numbers_is_not_rounded(dtype: torch.dtype) -> None:
    # -10.001 is nearer to -10 than half a step in either type
    x = torch.full((3,), -10.0, dtype=dtype, requires_grad=True)
    l1 = activation_l1(x, floor=-10.001)
    l1.backward()
    assert l1.item() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 3))


def test_an_input_below_its_floor_has_neither_value_nor_gradient() -> None:
    for relative in (False, True):
        x = torch.full((2, 3), -20.0, requires_grad=True)
        l1 = activation_l1(x, floor=-10.0, relative=relative)
        l1.backward()
        assert l1.item() == 0
        assert x.grad.eq(0).all()


@pytest.mark.parametrize("floor", [float("nan"), float("-inf"), "auto", True])
def test_bad_floor_is_named(floor: object) -> None:
    with pytest.raises(ValueError, match=rf"`floor` must be a finite number, or None.*got {floor!r}.*-10 before GELU"):
        activation_l1(torch.ones(2, 3), floor=floor)


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`x` must be floating point"):
        activation_l1(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `x` without its last axis, \(2,\)"):
        activation_l1(torch.ones(2, 3), mask=torch.ones(3, dtype=torch.bool))
