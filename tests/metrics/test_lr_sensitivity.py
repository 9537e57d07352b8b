"""The metric is the functional over a grid, with the mean of several runs at each learning rate."""

import math

import pytest
import torch

from lightning_reg.functional import lr_sensitivity
from lightning_reg.functional.lr_sensitivity import LR_GRID
from lightning_reg.metrics import LRSensitivity


def test_one_run_a_rate_is_the_functional() -> None:
    losses = torch.tensor([1.9, 1.2, 0.7, 0.5, 1.1, math.nan, 7.0])
    metric = LRSensitivity()
    for rate, loss in reversed(list(zip(LR_GRID, losses.tolist()))):
        metric.update(rate, loss, 2.3)
    torch.testing.assert_close(metric.compute(), lr_sensitivity(losses, 2.3))
    torch.testing.assert_close(LRSensitivity()(torch.tensor(LR_GRID), losses, torch.tensor(2.3)), metric.compute())


def test_seeds_are_averaged_before_the_best_is_taken() -> None:
    metric = LRSensitivity([1e-2, 1e-1])
    metric.update(torch.tensor([1e-2, 1e-1]), torch.tensor([0.5, 1.5]), 2.0)
    metric.update(torch.tensor([1e-1, 1e-2, 1e-2]), torch.tensor([math.inf, 1.0, 1.5]), torch.tensor([3.0, 2.0, 1.0]))
    # (0.5 + 1 + 1) / 3 and (1.5 + 3) / 2: the mean of the two, less the smaller
    torch.testing.assert_close(metric.curve(), torch.tensor([2.5 / 3, 2.25]))
    assert metric.compute().item() == pytest.approx((2.25 - 2.5 / 3) / 2)


def test_an_incomplete_grid_has_no_sensitivity() -> None:
    metric = LRSensitivity([1e-2, 1e-1])
    metric.update(1e-2, 0.5, 2.0)
    assert metric.compute().isnan()
    assert metric.curve()[0] == 0.5
    assert metric.curve()[1].isnan()
    metric.update(1e-1, 0.5, 2.0)
    assert metric.compute() == 0


def test_order_of_the_grid_is_kept() -> None:
    metric = LRSensitivity([1.0, 0.01])
    metric.update(torch.tensor([0.01, 1.0]), torch.tensor([0.25, 1.5]), 2.0)
    assert metric.curve().tolist() == [1.5, 0.25]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LRSensitivity([]), r"`grid` must hold one learning rate or more, > 0 and all different, got \[\]"),
        (lambda: LRSensitivity([0.0, 1e-3]), "`grid` must hold .*> 0"),
        (lambda: LRSensitivity([1e-3, math.inf]), "`grid` must hold"),
        (lambda: LRSensitivity([1e-3, 1.0, 1e-3]), "`grid` must hold .* all different"),
        (lambda: LRSensitivity().update(2e-3, 1.0, 2.0), "`learning_rate` must be one of 0.0003, 0.001, .* got 0.002"),
        (lambda: LRSensitivity().update(math.nan, 1.0, 2.0), "`learning_rate` must be one of .* got nan; give another"),
        (lambda: LRSensitivity().update(1e-3, 1.0, math.nan), "`initial_loss` must be finite, got nan"),
        (
            lambda: LRSensitivity().update(torch.tensor([1e-3, 1e-2]), torch.ones(3), 2.0),
            r"must have one shape, and `initial_loss` it or none, got \(2,\), \(3,\) and \(\)",
        ),
        (
            lambda: LRSensitivity().update(torch.tensor([1e-3, 1e-2]), torch.ones(2), torch.ones(1)),
            r"got \(2,\), \(2,\) and \(1,\)",
        ),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_update_changes_nothing() -> None:
    metric = LRSensitivity([1e-2])
    with pytest.raises(ValueError, match="learning_rate"):
        metric.update(torch.tensor([1e-2, 1e-1]), torch.ones(2), 2.0)
    assert metric.runs.sum() == 0
