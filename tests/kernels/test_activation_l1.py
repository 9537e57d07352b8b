"""L1 kernels against float64."""

import pytest
import torch
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.functional.activation_l1 import l1_tap
from tests.kernels.test_activation_density import CASES, TOLERANCE, assert_near, poisoned  # noqa: F401


def reference(x: Tensor, mask: Tensor | None, relative: bool, floor: float | None) -> Tensor:
    x = x if mask is None else x[mask]
    x = x.abs() if floor is None else x.clamp_min(floor) - floor
    unit = x.detach().square().mean().sqrt().clamp_min(1e-30) if relative else 1.0
    return x.mean() / unit if x.numel() else x.sum()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("floor", [None, -0.5, 0.25])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_value_and_gradient(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], relative: bool, floor: float | None, masked: bool
) -> None:
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    mask = torch.rand(shape[:-1], device=device) < 0.6 if masked else None
    grad = torch.randn(shape, device=device).to(dtype)
    passed, l1 = l1_tap(x, mask=mask, relative=relative, floor=floor)
    (got,) = torch.autograd.grad((passed, l1), x, (grad, torch.tensor(-3.0, device=device)))
    assert l1.dtype == torch.float32
    exact = x.detach().double().requires_grad_()
    wanted = reference(exact, mask, relative, floor)
    (wanted_grad,) = torch.autograd.grad(wanted * -3 + (exact * grad.double()).sum(), exact)
    torch.testing.assert_close(l1.double(), wanted, rtol=2e-6, atol=1e-7)
    assert_near(got, wanted_grad, TOLERANCE[dtype])


def test_nothing_pulls_at_zero_or_at_the_floor(device: str) -> None:
    x = torch.tensor([[0.0, -0.0, 2.0, -2.0]], device=device, requires_grad=True)
    assert torch.autograd.grad(l1_tap(x)[1], x)[0].tolist() == [[0.0, 0.0, 0.25, -0.25]]
    for relative in (False, True):
        assert torch.autograd.grad(l1_tap(x, floor=2.0, relative=relative)[1], x)[0].eq(0).all()
        assert l1_tap(x, floor=2.0, relative=relative)[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_floor_between_two_low_precision_numbers_is_not_rounded(device: str, dtype: torch.dtype) -> None:
    x = torch.full((3,), -10.0, dtype=dtype, device=device, requires_grad=True)
    l1 = l1_tap(x, floor=-10.001)[1]
    (grad,) = torch.autograd.grad(l1, x)
    assert l1.item() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(grad, torch.full_like(x, 1 / 3), rtol=1e-2, atol=0)


def test_nan_stays_visible_and_padding_may_hold_it(device: str) -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, 2.0]], device=device, requires_grad=True)
    for floor in (None, -1.0):
        assert l1_tap(x, floor=floor)[1].isnan()
        assert torch.autograd.grad(l1_tap(x, floor=floor)[1], x)[0].isnan().tolist() == [[False, True], [False, False]]
        mask = torch.tensor([False, True], device=device)
        l1 = l1_tap(x, mask=mask, floor=floor)[1]
        assert l1.isfinite()
        assert torch.autograd.grad(l1, x)[0].isfinite().all()


def test_kernel_and_torch_agree(device: str) -> None:
    x = torch.randn(4, 3000, device=device)
    for floor in (None, -0.3):
        value = l1_tap(x, relative=True, floor=floor)[1]
        with kernels.disabled():
            torch.testing.assert_close(value, l1_tap(x, relative=True, floor=floor)[1], rtol=1e-6, atol=0)
