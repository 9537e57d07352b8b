"""The z-loss kernel against float64."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg import kernels
from lightning_reg.functional import z_loss
from lightning_reg.functional.z_loss import _log_sum_exp, z_loss_tap

# one tile of several rows; one row in tiles, with and without edges
SHAPES = pytest.mark.parametrize(
    "shape", [(5, 1), (7, 3), (3, 130), (2, 2048), (5, 4099), (2, 2, 8200)], ids=lambda s: "x".join(map(str, s))
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy, in the interpreter


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, no kernel fails, and numpy takes infinities as silently as a GPU does."""
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(kernels.operators, "_failed", {})
    with np.errstate(all="ignore"):
        yield
    assert not kernels.operators._failed


def reference(logits: Tensor, upstream: Tensor, mask: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Value and gradient of ``(logits * upstream).sum() + strength * z_loss`` in float64."""
    exact = logits.detach().double().requires_grad_()
    z = exact.flatten(0, -2)[mask.flatten()].logsumexp(-1)
    value = z.square().sum() / max(1, len(z))
    ((exact * upstream.double()).sum() + strength * value).backward()
    return value.detach(), exact.grad


@SHAPES
@DTYPES
@pytest.mark.parametrize("size", [2.0, 1e4], ids=["usual", "huge"])
def test_value_and_gradient_equal_float64(shape: tuple, dtype: torch.dtype, size: float, device: str) -> None:
    logits = (torch.randn(shape, device=device) * size).to(dtype).requires_grad_()
    upstream = torch.randn(shape, device=device).to(dtype)
    mask = torch.rand(shape[:-1], device=device) < 0.7
    passed, value = z_loss_tap(logits, mask=mask)
    # the upstream of both is not 1
    torch.autograd.backward([passed, value], [upstream, torch.tensor(0.3, device=device)])
    wanted, grad = reference(logits, upstream, mask, 0.3)
    torch.testing.assert_close(value.double(), wanted, rtol=3e-6, atol=0)
    eps = max(torch.finfo(dtype).eps, 2e-6 if size < 1e3 else 2e-3)  # z itself is rounded
    torch.testing.assert_close(logits.grad.double(), grad, rtol=eps, atol=eps * float(grad.abs().max()))
    assert torch.equal(logits.grad[~mask], upstream[~mask])


@DTYPES
def test_agrees_with_torch_code(dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(6, 4100, device=device).to(dtype).requires_grad_()
    with kernels.disabled():
        wanted = z_loss(logits)
        (grad,) = torch.autograd.grad(wanted * 1e3, logits)
    got = z_loss(logits)
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(torch.autograd.grad(got * 1e3, logits)[0], grad, rtol=max(eps, 1e-5), atol=1e-6)


def test_both_kernels_run(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_reg.kernels import z_loss as module

    ran = []
    for name in ("row_values", "gradient"):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, plain=plain, name=name: (ran.append(name), plain(*a))[1])
    z_loss(torch.randn(2, 3, device=device, requires_grad=True)).backward()
    assert ran == ["row_values", "gradient"]


@pytest.mark.parametrize("classes", [5, 4100])
def test_infinite_logits_are_as_in_torch(classes: int, device: str) -> None:
    rows = torch.randn(5, classes, device=device)
    rows[0] = -math.inf
    rows[1, 1:] = -math.inf
    rows[2, 3] = math.inf
    rows[3, 2] = math.nan
    rows[4] = torch.finfo(torch.float32).min
    z = _log_sum_exp(rows)
    torch.testing.assert_close(z, rows.logsumexp(-1), equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [5, 4100])
def test_positions_left_out_leave_no_trace(classes: int, device: str) -> None:
    logits = torch.randn(4, classes, device=device)
    logits[1], logits[2] = math.nan, math.inf
    logits.requires_grad_()
    mask = torch.tensor([True, False, False, True], device=device)
    value = z_loss(logits, mask=mask)
    value.backward()
    wanted, grad = reference(logits[[0, 3]], torch.zeros(2, classes, device=device), mask[[0, 3]], 1.0)
    torch.testing.assert_close(value.double(), wanted, rtol=3e-6, atol=0)
    torch.testing.assert_close(logits.grad[[0, 3]].double(), grad, rtol=1e-5, atol=1e-7)
    assert logits.grad[1:3].eq(0).all()


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 4100), (1, 3000), (1, 1)], ids=str)
def test_few_positions(shape: tuple, device: str) -> None:
    logits = torch.randn(shape, device=device, requires_grad=True)
    value = z_loss(logits)
    value.backward()
    wanted = logits.double().logsumexp(-1).square().sum() / max(1, logits[..., 0].numel())
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert logits.grad.shape == shape
    ignored = z_loss(logits, mask=torch.zeros(shape[:-1], dtype=torch.bool, device=device))
    assert ignored.item() == 0


@pytest.mark.parametrize("classes", [9, 4099])
def test_strides_are_followed(classes: int, device: str) -> None:
    wide = torch.randn(3, classes + 5, device=device)
    views = {
        "columns of a padded table": wide[:, :classes],
        "an odd start": wide[:, 3 : classes + 3],
        "transposed": torch.randn(classes, 3, device=device).T,
        "every other row": torch.randn(6, classes, device=device)[::2],
        "one row for all": wide[:1, :classes].expand(3, classes),
    }
    for name, view in views.items():
        leaf = view.detach().requires_grad_()
        passed, value = z_loss_tap(leaf)
        # the gradient of a sum is one number, expanded
        (grad,) = torch.autograd.grad(passed.sum() + value, leaf)
        wanted, exact = reference(view, torch.ones_like(view), torch.ones(3, dtype=torch.bool, device=device), 1.0)
        torch.testing.assert_close(value.double(), wanted, rtol=3e-6, atol=0, msg=name)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-5, msg=name)


def test_twice_is_bit_equal(device: str) -> None:
    logits = torch.randn(9, 5003, device=device, requires_grad=True)
    runs = []
    for _ in range(2):
        value = z_loss(logits)
        runs.append((value, *torch.autograd.grad(value, logits)))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_double_backward_is_that_of_the_torch_code(device: str) -> None:
    logits = torch.randn(3, 6, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(z_loss(logits), logits, create_graph=True)
    (twice,) = torch.autograd.grad(grad.square().sum(), logits)
    exact = logits.detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(exact.logsumexp(-1).square().mean(), exact, create_graph=True)
    (wanted,) = torch.autograd.grad(grad.square().sum(), exact)
    torch.testing.assert_close(twice.double(), wanted, rtol=1e-4, atol=1e-6)


def test_float64_is_computed_in_torch_with_a_warning(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.operators, "_warned", set())
    logits = torch.randn(3, 6, device=device, dtype=torch.float64)
    with pytest.warns(UserWarning, match="no kernel for torch.float64"):
        value = z_loss(logits)
    assert value.item() == pytest.approx(logits.logsumexp(-1).square().mean().item(), rel=1e-12)


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers() -> None:
    rows, classes = 43_000, 50_001
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    value = z_loss(logits)
    value.backward()
    z = torch.cat([logits.detach()[i : i + 1000].float().logsumexp(-1) for i in range(0, rows, 1000)])
    assert value.item() == pytest.approx(z.square().mean().item(), rel=1e-5)
    for row in (0, rows - 1):
        wanted = logits.detach()[row].double().softmax(-1) * (2 * z[row] / rows)
        torch.testing.assert_close(logits.grad[row].double(), wanted, rtol=0.01, atol=1e-9)
