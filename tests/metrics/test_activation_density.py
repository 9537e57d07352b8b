"""The metric is the functional, over all elements of all batches."""

import math

import pytest
import torch

from lightning_reg.functional import exact_density
from lightning_reg.metrics import ActivationDensity


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_batches_of_any_size_weigh_by_their_elements(threshold: float) -> None:
    batches = [torch.randn(n, 6).relu() for n in (1, 10, 3)]
    metric = ActivationDensity(threshold=threshold)
    for x in batches:
        metric.update(x)
    torch.testing.assert_close(metric.compute(), exact_density(torch.cat(batches), threshold=threshold))


def test_mask_leaves_the_valid_tokens() -> None:
    x, mask = torch.randn(2, 5, 3).relu(), torch.rand(2, 5) > 0.4
    torch.testing.assert_close(ActivationDensity()(x, mask), exact_density(x[mask]))
    torch.testing.assert_close(ActivationDensity()(x, mask=mask.long()), exact_density(x[mask]))


def test_hand_worked_numbers() -> None:
    x = torch.tensor([[0.0, -0.01, 0.02, 3.0]])
    assert ActivationDensity()(x) == 0.75
    assert ActivationDensity(threshold=0.015)(x) == 0.5


@pytest.mark.parametrize("relative", [0.1, 0.01, 0.001])
def test_relative_threshold_is_per_token(relative: float) -> None:
    batches = [torch.randn(n, 6) ** 3 for n in (1, 10, 3)]
    metric = ActivationDensity(relative=relative)
    for x in batches:
        metric.update(x)
    torch.testing.assert_close(metric.compute(), exact_density(torch.cat(batches), relative=relative))


def test_empty_update_changes_nothing() -> None:
    metric = ActivationDensity()
    metric.update(torch.zeros(0, 4))
    metric.update(torch.ones(2, 4), mask=torch.zeros(2, dtype=torch.bool))
    assert metric.compute().isnan()
    metric.update(torch.ones(2, 4))
    assert metric.compute() == 1


def test_nan_counts_as_non_zero() -> None:
    assert ActivationDensity()(torch.tensor([[math.nan, 0.0]])) == 0.5


def test_counts_do_not_saturate() -> None:
    metric = ActivationDensity()
    metric.active += 2**40
    metric.valid += 2**40
    metric.update(torch.ones(1, 3))
    assert metric.active.item() == 2**40 + 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ActivationDensity(threshold=-1), "`threshold` must be >= 0, got -1"),
        (lambda: ActivationDensity(relative=2), r"`relative` must be in \(0, 1\), got 2"),
        (
            lambda: ActivationDensity(relative=0.1, threshold=1.0),
            "`threshold=1.0` and `relative=0.1` exclude each other",
        ),
        (lambda: ActivationDensity().update(torch.ones(2, 3), torch.ones(3).bool()), r"`mask` .* got \(3,\)"),
        (lambda: ActivationDensity().update(torch.ones(2, 3), torch.ones(2)), "`mask` must be boolean or 0/1 integers"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
