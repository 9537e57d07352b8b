"""Distance of each head's entropy from its threshold, against float64 numpy and hand-worked numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import entropy_guided
from lightning_reg.functional.entropy_guided import GUIDED_OBJECTIVES


def reference(entropy: Tensor, threshold: Any, margin: float, objective: str, mask: Tensor | None = None) -> float:
    values = entropy.double().numpy()
    shown = np.ones_like(values, dtype=bool) if mask is None else np.broadcast_to(mask.numpy(), values.shape)
    penalties = []
    for head in range(values.shape[-2]):
        rows = values[..., head, :][shown[..., head, :]]
        if rows.size:
            distance = rows.mean() - float(threshold[head])
            counts = {"band": abs(distance), "floor": -distance, "ceiling": distance}[objective] > margin
            penalties.append(distance**2 if counts else 0.0)
    return float(np.mean(penalties)) if penalties else 0.0


@pytest.mark.parametrize("objective", GUIDED_OBJECTIVES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_equals_numpy_in_float64(dtype: torch.dtype, masked: bool, objective: Any) -> None:
    entropy = torch.rand(3, 4, 7, dtype=torch.float64).mul(torch.tensor([0.2, 0.9, 1.0, 0.5])[:, None]).to(dtype)
    mask = torch.rand(3, 1, 7) < 0.6 if masked else None
    threshold = torch.tensor([0.6, 0.1, 0.5, 0.1])
    got = entropy_guided(entropy, threshold, margin=0.1, objective=objective, mask=mask)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = reference(entropy, threshold, 0.1, objective, mask)
    assert got.item() == pytest.approx(wanted, rel=1e-6)
    assert wanted > 0


@pytest.mark.parametrize(
    ("objective", "wanted"), [("band", (0.3**2 + 0.3**2) / 3), ("floor", 0.3**2 / 3), ("ceiling", 0.3**2 / 3)]
)
def test_hand_worked_heads_below_within_and_above(objective: Any, wanted: float) -> None:
    entropy = torch.tensor([0.1, 0.3, 0.9])[None, :, None].expand(2, 3, 5)
    threshold = torch.tensor([0.4, 0.4, 0.6])
    assert entropy_guided(entropy, threshold, objective=objective).item() == pytest.approx(wanted, rel=1e-5)


def test_mean_comes_before_the_square() -> None:
    rows = torch.tensor([[[0.0, 1.0]]])
    assert entropy_guided(rows, 0.5, margin=0.0).item() == 0
    assert entropy_guided(rows, 0.25, margin=0.0).item() == pytest.approx(0.0625)


def test_gradient_is_that_of_the_formula() -> None:
    entropy = torch.rand(3, 4, 5, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([0.9, 0.48, 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 1, 5, dtype=torch.bool)
    mask[1, :, 2:] = False
    (3.0 * entropy_guided(entropy, threshold, margin=0.2, mask=mask)).backward()
    rows = mask.sum()
    distance = (entropy.detach() * mask).sum((0, 2)) / rows - threshold.detach()
    pull = 3.0 * 2 * distance * (distance.abs() > 0.2) / 4
    assert 0 < (distance.abs() > 0.2).sum() < 4
    torch.testing.assert_close(threshold.grad, -pull)
    torch.testing.assert_close(entropy.grad, (pull[:, None] * mask / rows).expand(3, 4, 5))
    assert torch.autograd.gradcheck(lambda e, t: entropy_guided(e, t, mask=mask), (entropy, threshold))


def test_nothing_valid_is_zero_and_a_head_without_rows_is_left_out() -> None:
    entropy = torch.full((2, 2, 3), 0.9, requires_grad=True)
    none = entropy_guided(entropy, 0.1, mask=torch.zeros(2, 2, 3, dtype=torch.bool))
    none.backward()
    assert none.item() == 0
    assert entropy.grad.eq(0).all()
    first = torch.tensor([True, False])[None, :, None]
    assert entropy_guided(entropy, 0.1, mask=first).item() == pytest.approx(0.64)


@pytest.mark.parametrize("objective", GUIDED_OBJECTIVES)
def test_nan_is_seen_unless_it_is_masked(objective: Any) -> None:
    entropy = torch.rand(2, 3, 4)
    entropy[1, 2, 3] = math.nan
    assert torch.isnan(entropy_guided(entropy, 0.5, objective=objective))
    assert torch.isfinite(entropy_guided(entropy, 0.5, objective=objective, mask=~torch.isnan(entropy)))


def test_without_an_axis_of_heads_there_is_one() -> None:
    rows = torch.rand(5, 7)
    for entropy in (rows, rows.flatten(), rows[:, None]):
        assert entropy_guided(entropy, torch.tensor([0.1])).item() == pytest.approx((rows.mean().item() - 0.1) ** 2)
    mask = rows > 0.5
    wanted = (rows[mask].mean().item() - 0.1) ** 2
    assert entropy_guided(rows, torch.tensor([0.1]), mask=mask).item() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy_guided(torch.ones(1, 2, 3), 0.5, margin=1.5), r"`margin` must be in \[0, 1\].* got 1.5"),
        (lambda: entropy_guided(torch.ones(1, 2, 3), 0.5, objective="max"), "`objective` must be one of band, floor"),
        (lambda: entropy_guided(torch.ones(1, 2, 3, dtype=torch.long), 0.5), "`entropy` must be floating point"),
        (lambda: entropy_guided(torch.tensor(1.0), 0.5), "`entropy` must be floating point of shape"),
        (
            lambda: entropy_guided(torch.ones(1, 2, 3), torch.ones(3)),
            r"`threshold` must be a scalar or one number for each of the 2 heads, got \(3,\)",
        ),
        (
            lambda: entropy_guided(torch.ones(1, 2, 3), 0.5, mask=torch.ones(1, 2, 3)),
            "`mask` must be boolean .True = valid., got torch.float32",
        ),
    ],
    ids=["margin", "objective", "integer", "scalar", "heads", "mask"],
)
def test_bad_input_names_the_argument(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
