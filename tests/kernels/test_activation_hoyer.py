"""Hoyer kernels against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.functional.activation_hoyer import hoyer_tap
from tests.kernels.test_activation_density import CASES, DTYPES, TOLERANCE, assert_near, poisoned  # noqa: F401


def reference(x: Tensor, mask: Tensor | None, floor: float | None) -> Tensor:
    x = x if mask is None else x[mask]
    x = x.abs() if floor is None else x.clamp_min(floor) - floor
    square = x.square().sum(-1)
    rows = x.sum(-1).square() / torch.where(square == 0, 1.0, square) / max(1, x.shape[-1])
    return rows.mean() if rows.numel() else rows.sum()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("floor", [None, -0.5, 0.25])
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_value_and_gradient(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], floor: float | None, masked: bool
) -> None:
    x = torch.randn(shape, device=device).to(dtype)
    if len(shape) > 1 and x.numel():
        x[0] = -1.0 if floor else 0.0
    x.requires_grad_()
    mask = torch.rand(shape[:-1], device=device) < 0.6 if masked else None
    grad = torch.randn(shape, device=device).to(dtype)
    passed, hoyer = hoyer_tap(x, mask=mask, floor=floor)
    (got,) = torch.autograd.grad((passed, hoyer), x, (grad, torch.tensor(-3.0, device=device)))
    assert hoyer.dtype == torch.float32
    exact = x.detach().double().requires_grad_()
    wanted = reference(exact, mask, floor)
    (wanted_grad,) = torch.autograd.grad(wanted * -3 + (exact * grad.double()).sum(), exact)
    torch.testing.assert_close(hoyer.double(), wanted, rtol=2e-6, atol=1e-7)
    assert_near(got, wanted_grad, TOLERANCE[dtype])


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_penalty_alone_has_the_gradient_of_the_formula(device: str, masked: bool) -> None:
    x = torch.randn(3, 9, 70, device=device, requires_grad=True)
    mask = torch.rand(3, 9, device=device) < 0.6 if masked else None
    (got,) = torch.autograd.grad(hoyer_tap(x, mask=mask)[1], x)
    exact = x.detach().double().requires_grad_()
    assert_near(got, torch.autograd.grad(reference(exact, mask, None), exact)[0], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 6e4])
def test_every_scale(device: str, scale: float, dtype: torch.dtype) -> None:
    x = (torch.rand(4, 5000, device=device) * scale).to(dtype).requires_grad_()
    hoyer = hoyer_tap(x)[1]
    (grad,) = torch.autograd.grad(hoyer, x)
    assert hoyer.item() == pytest.approx(reference(x.double(), None, None).item(), rel=1e-5)
    assert grad.isfinite().all()


def test_numbers_whose_squares_leave_float32(device: str) -> None:
    x = torch.tensor([[1e-30, -1e-30, 0.0, 0.0], [3e38, 3e38, 0.0, 0.0]], device=device)
    assert hoyer_tap(x)[1].item() == pytest.approx(0.5)


def test_rows_wider_than_a_tile_rise_and_fall(device: str) -> None:
    """Each tile may hold the largest magnitude so far, or only zeros."""
    steps = torch.tensor([0.0, 1.0, 100.0, 0.0, 1e-3], device=device).repeat_interleave(4096)
    x = (torch.randn(2, 5 * 4096, device=device) * torch.stack([steps, steps.flip(0)])).requires_grad_()
    hoyer = hoyer_tap(x)[1]
    exact = x.detach().double().requires_grad_()
    wanted = reference(exact, None, None)
    assert hoyer.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_near(torch.autograd.grad(hoyer, x)[0], torch.autograd.grad(wanted, exact)[0], 1e-4)


def test_padding_may_hold_nan_and_a_valid_one_stays_visible(device: str) -> None:
    pre = torch.randn(3, 8, device=device)
    pre[1, 3] = torch.nan
    mask = torch.tensor([True, False, True], device=device)
    for fused in (False, True):
        leaf = pre.clone().requires_grad_()
        x = F.gelu(leaf) if fused else leaf
        hoyer = hoyer_tap(x, mask=mask)[1]
        (grad,) = torch.autograd.grad(hoyer, leaf)
        assert hoyer.isfinite()
        assert grad[mask].isfinite().all()
        assert fused or grad.isfinite().all()
        assert hoyer_tap(x.detach())[1].isnan()


def test_kernel_and_torch_agree(device: str) -> None:
    x = torch.randn(40, 700, device=device)
    value = hoyer_tap(x)[1]
    with kernels.disabled():
        torch.testing.assert_close(value, hoyer_tap(x)[1], rtol=1e-6, atol=0)
