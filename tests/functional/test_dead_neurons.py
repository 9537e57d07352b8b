"""Dead neurons against numpy loops and hand-worked numbers."""

import math

import numpy as np
import pytest
import torch

from lightning_reg.functional import dead_neurons
from lightning_reg.functional.dead_neurons import count_firing


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 7), (1, 2, 3, 5)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_counts_equal_a_loop(shape: tuple[int, ...], threshold: float) -> None:
    x, mask = (torch.randn(shape) - 0.6).relu(), torch.rand(shape[:-1]) > 0.4
    rows = x.numpy().reshape(-1, shape[-1])[mask.numpy().reshape(-1)]
    counts = [sum(abs(row[j]) > threshold for row in rows) for j in range(shape[-1])]
    firing, tokens = count_firing(x, threshold=threshold, mask=mask)
    assert (firing.tolist(), tokens.item()) == (counts, len(rows))
    assert (firing.dtype, tokens.dtype) == (torch.int64, torch.int64)
    expected = np.mean([count == 0 for count in counts]) if len(rows) else 0
    assert dead_neurons(x, threshold=threshold, mask=mask).item() == pytest.approx(expected)


def test_hand_worked_numbers() -> None:
    x = torch.tensor([[0.0, 0.2, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 2.0, 0.1]])
    assert dead_neurons(x).item() == pytest.approx(2 / 5)
    assert dead_neurons(x, threshold=0.1).item() == pytest.approx(3 / 5)  # not above the threshold
    assert dead_neurons(x, mask=torch.tensor([True, False])).item() == pytest.approx(3 / 5)


def test_nothing_seen_is_not_dead() -> None:
    assert dead_neurons(torch.zeros(3, 4), mask=torch.zeros(3, dtype=torch.bool)) == 0
    assert dead_neurons(torch.zeros(0, 4)) == 0
    assert dead_neurons(torch.zeros(3, 0)) == 0


def test_nan_is_active_and_padding_may_hold_it() -> None:
    x = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
    assert dead_neurons(x) == 0.5
    assert dead_neurons(x, mask=torch.tensor([False, True])) == 1


def test_no_gradient() -> None:
    assert not dead_neurons(torch.randn(3, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, "`threshold` must be >= 0, got -0.1"),
        ({"mask": torch.ones(3).bool()}, r"`mask` must have the shape .* \(2,\), got \(3,\)"),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dead_neurons(torch.ones(2, 4), **arguments)
