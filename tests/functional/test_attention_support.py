"""Support, effective count and largest weight of attention rows against loops and hand-worked numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import attention_support, effective_keys, largest_weight


def loop(row: np.ndarray, mass: float) -> int:
    """By the definition: add the largest until there is enough."""
    total, keys = 0.0, 0
    for weight in sorted(row.tolist(), reverse=True):
        if total >= mass * row.sum():
            break
        total, keys = total + weight, keys + 1
    return keys


@pytest.mark.parametrize(
    "shape", [(7,), (3, 1), (2, 3, 11), (2, 1, 5, 33)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("mass", [0.3, 0.9, 0.97])
def test_support_equals_a_loop(shape: tuple[int, ...], mass: float) -> None:
    probs = (4 * torch.randn(shape, dtype=torch.float64)).softmax(-1)
    wanted = [loop(row, mass) for row in probs.numpy().reshape(-1, shape[-1])]
    assert attention_support(probs, mass=mass).flatten().tolist() == wanted
    assert largest_weight(probs).flatten().tolist() == probs.numpy().max(-1).reshape(-1).tolist()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_keys_may_lie_on_any_axis(dim: int) -> None:
    probs = (3 * torch.randn(4, 5, 6)).softmax(dim)
    moved = probs.movedim(dim, -1)
    assert torch.equal(attention_support(probs, dim=dim), attention_support(moved))
    assert torch.equal(largest_weight(probs, dim=dim), largest_weight(moved))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [1, 2, 7, 10, 20, 1000])
def test_equal_keys_count_nine_tenths_in_every_precision(keys: int, dtype: torch.dtype) -> None:
    probs = torch.full((3, keys), 1 / keys, dtype=dtype)
    support = attention_support(probs)
    assert support.tolist() == [math.ceil(keys * 9 / 10)] * 3
    assert support.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_hand_worked_numbers() -> None:
    probs = torch.tensor([0.05, 0.5, 0.05, 0.4])
    assert [attention_support(probs, mass=mass).item() for mass in (0.5, 0.51, 0.9, 0.92, 1.0)] == [1, 2, 2, 3, 4]
    assert effective_keys(torch.tensor(math.log(5.0))).item() == pytest.approx(5)


def test_rows_without_weight_have_no_support_and_nan_stays() -> None:
    rows = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [1.0, 0.0]])
    support = attention_support(rows)
    assert support[[0, 2]].tolist() == [0, 1]
    assert support[1].isnan()
    assert attention_support(torch.ones(3, 0)).tolist() == [0, 0, 0]


def test_no_gradient() -> None:
    assert not attention_support(torch.rand(3, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("probs", "arguments", "message"),
    [
        (torch.ones(2, 3), {"mass": 0.0}, r"`mass` must be in \(0, 1\], got 0.0"),
        (torch.ones(2, 3), {"mass": 1.1}, r"`mass` must be in \(0, 1\], got 1.1"),
        (torch.ones(2, 3), {"mass": math.nan}, r"`mass` must be in \(0, 1\], got nan"),
        (torch.ones(2, 3).long(), {}, r"`probs` must be floating point .*, got \(2, 3\) torch.int64"),
        (torch.tensor(1.0), {}, r"`probs` must be floating point with at least one axis, got \(\)"),
    ],
    ids=["zero", "above", "nan", "integers", "scalar"],
)
def test_errors_name_the_argument(probs: Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_support(probs, **arguments)


def test_largest_weight_checks_its_input() -> None:
    with pytest.raises(ValueError, match="`probs` must be floating point"):
        largest_weight(torch.ones(2).long())
