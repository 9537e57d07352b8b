"""Sensitivity to the learning rate against numpy and hand-worked numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import lr_sensitivity
from lightning_reg.functional.lr_sensitivity import LR_GRID

NAN, INF = math.nan, math.inf


def reference(losses: Tensor, initial: Tensor, dim: int) -> np.ndarray:
    """Loops over a grid at a time, in double precision."""
    rows = np.moveaxis(losses.double().numpy(), dim, -1)
    starts = np.broadcast_to(initial.double().numpy(), rows.shape[:-1])
    result = np.empty(rows.shape[:-1])
    for index in np.ndindex(*result.shape):
        bounded = [min(x, starts[index]) if math.isfinite(x) else starts[index] for x in rows[index]]
        result[index] = sum(bounded) / len(bounded) - min(bounded)
    return result


def test_hand_worked_numbers() -> None:
    # 0 + 1 + 0.5 above the best, and a run that diverged at 1.5 above it
    losses = torch.tensor([1.0, 2.0, 1.5, NAN])
    assert lr_sensitivity(losses, 2.5).item() == pytest.approx((0 + 1 + 0.5 + 1.5) / 4)
    assert lr_sensitivity(losses, 1.75).item() == pytest.approx((0 + 0.75 + 0.5 + 0.75) / 4)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30], ids=str)
def test_a_diverged_run_counts_as_one_that_learnt_nothing(bad: float) -> None:
    assert lr_sensitivity(torch.tensor([0.5, bad]), 2.0) == lr_sensitivity(torch.tensor([0.5, 2.0]), 2.0) == 0.75


@pytest.mark.parametrize(("shape", "dim"), [((7,), -1), ((5, 7), -1), ((7, 3), 0), ((2, 7, 3), 1), ((3, 1), -1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_equals_numpy(shape: tuple[int, ...], dim: int, dtype: torch.dtype, per_row: bool) -> None:
    losses = (4 * torch.rand(shape, dtype=torch.float64)).to(dtype)
    losses.flatten()[::4] = torch.tensor([NAN, INF, -INF] * losses.numel())[: len(losses.flatten()[::4])].to(dtype)
    start = 2 + torch.rand(losses.select(dim, 0).shape if per_row else (), dtype=torch.float64)
    result = lr_sensitivity(losses, start, dim=dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == wide
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(result.numpy(), reference(losses, start, dim), atol=tolerance)


def test_a_curve_without_slope_is_insensitive_and_so_is_a_model_at_chance() -> None:
    assert lr_sensitivity(torch.full((7,), 0.3), 2.3) == 0
    assert lr_sensitivity(torch.full((7,), 5.0), 2.3) == 0
    assert lr_sensitivity(torch.full((7,), NAN), 2.3) == 0


def test_integers_and_floats_start_alike() -> None:
    losses = torch.tensor([0.1, 9.0], dtype=torch.float64)
    assert lr_sensitivity(losses, 3) == lr_sensitivity(losses, torch.tensor(3)) == lr_sensitivity(losses, 3.0)
    assert lr_sensitivity(losses, 2.3).item() == pytest.approx(1.1, abs=1e-15)


def test_it_is_a_measurement_without_gradient() -> None:
    assert not lr_sensitivity(torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)).requires_grad


def test_the_grid_is_the_papers() -> None:
    assert LR_GRID == (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lr_sensitivity(torch.ones(2, 0), 1.0), r"`losses` must be .* on axis -1, got \(2, 0\) torch.float32"),
        (lambda: lr_sensitivity(torch.ones(()), 1.0), r"`losses` must be .*, got \(\)"),
        (lambda: lr_sensitivity(torch.ones(3).long(), 1.0), "`losses` must be floating point .* torch.int64"),
        (lambda: lr_sensitivity(torch.ones(3), NAN), "`initial_loss` must be finite, got nan: measure it before"),
        (lambda: lr_sensitivity(torch.ones(2, 3), torch.tensor([1.0, INF])), "`initial_loss` must be finite, got inf"),
        (
            lambda: lr_sensitivity(torch.ones(2, 3), torch.ones(3)),
            r"`initial_loss` must be a number or have the shape of `losses` without axis -1, \(2,\), got \(3,\)",
        ),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
