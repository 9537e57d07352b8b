"""The metric is the functional at each threshold, over the tokens of all batches."""

import math

import pytest
import torch
from torch import Tensor

from lightning_reg.functional import cett
from lightning_reg.metrics import CETT


def projections() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(9, 4, 7).relu()
    x[2, 1] = 0  # a token without output
    return x, torch.randn(5, 7), torch.rand(9, 4) > 0.3


def test_table_equals_the_functional_over_all_batches() -> None:
    x, weight, mask = projections()
    metric = CETT(grid=(0.01, 10.0, 9))
    for part, valid in zip(x.split([1, 5, 3]), mask.split([1, 5, 3])):
        metric.update(part, weight, mask=valid)
    error, density = metric.compute()
    torch.testing.assert_close(error, cett(x, weight, metric.thresholds, mask=mask))
    norms = (x.abs() * weight.norm(dim=0))[mask]
    kept = torch.stack([((norms >= threshold) & (norms > 0)).float().mean() for threshold in metric.thresholds])
    torch.testing.assert_close(density, kept)


def test_thresholds_are_sorted_with_zero_in_front() -> None:
    assert CETT([2.0, 0.5, 2.0]).thresholds.tolist() == [0.0, 0.5, 2.0]
    assert CETT(torch.tensor([0.0, 1.0])).thresholds.tolist() == [0.0, 1.0]
    torch.testing.assert_close(CETT(grid=(0.1, 10, 3)).thresholds, torch.tensor([0.0, 0.1, 1.0, 10.0]).double())


def test_lookup_takes_the_largest_threshold_that_meets_the_target() -> None:
    metric = CETT([1.0, 3.5, 9.0])
    metric.update(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.eye(4))  # CETT 0, 0, 0.6, 1
    assert metric.lookup(0.7) == (3.5, 0.25)
    assert metric.lookup(0.6) == (3.5, 0.25)
    assert metric.lookup(0.59) == (1.0, 0.5)
    assert metric.lookup(0.0) == (1.0, 0.5)


def test_tightest_target_gives_zero_not_the_largest_threshold() -> None:
    metric = CETT([3.5, 9.0])
    metric.update(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.eye(4))
    assert metric.lookup(0.1) == (0.0, 0.5)


def test_lookup_looks_past_a_hump() -> None:
    metric = CETT([2.2, 2.7])
    metric.update(torch.tensor([[2.0, 2.5, 4.0]]), torch.tensor([[1.0, -1.0, 1.0]]))
    assert metric.compute()[0, 1] > 0.2
    assert metric.lookup(0.2)[0] == 2.7


def test_merged_states_equal_one_metric() -> None:
    x, weight, mask = projections()
    whole, first, second = CETT(), CETT(), CETT()
    whole.update(x, weight, mask)
    first.update(x[:2], weight, mask[:2])
    second.update(x[2:], weight, mask[2:])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole.compute())
    assert (first.tokens, first.elements) == (whole.tokens, whole.elements)


def test_empty_update_changes_nothing() -> None:
    metric = CETT([1.0])
    metric.update(torch.zeros(0, 4), torch.ones(2, 4))
    metric.update(torch.ones(2, 4), torch.ones(2, 4), torch.zeros(2).bool())
    assert metric.compute().isnan().all()
    assert metric.lookup(0.5)[0] == 0
    metric.update(torch.ones(2, 4), torch.ones(2, 4))
    assert metric.compute()[1].tolist() == [1, 1]


def test_nan_stays_until_reset() -> None:
    metric = CETT([1.0])
    metric.update(torch.tensor([[math.nan, 1.0]]), torch.eye(2))
    metric.update(torch.ones(1, 2), torch.eye(2))
    assert metric.compute()[0].isnan().all()
    assert metric.lookup(0.5)[0] == 0
    metric.reset()
    metric.update(torch.ones(1, 2), torch.eye(2))
    assert metric.compute()[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CETT([-1.0]), "thresholds must be >= 0, got -1"),
        (lambda: CETT(grid=(0.0, 1.0, 5)), r"`grid` must be \(smallest, largest, number\) .* got \(0.0, 1.0, 5\)"),
        (lambda: CETT(grid=(2.0, 1.0, 5)), r"`grid` must be .* got \(2.0, 1.0, 5\)"),
        (lambda: CETT(grid=(1.0, 2.0, 1)), r"`grid` must be .* got \(1.0, 2.0, 1\)"),
        (lambda: CETT().lookup(1.0), r"`target` must be in \[0, 1\), got 1.0"),
        (lambda: CETT().update(torch.ones(2, 3), torch.ones(3, 4)), r"`weight` must be \(out, width\)"),
        (lambda: CETT().update(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3).bool()), "`mask` must have the shape"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
