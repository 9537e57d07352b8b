"""The floor of the theorem: checked numbers, a numerical minimum, and no row below it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_reg.functional import attention_entropy_from_scores, entropy_floor, entropy_floor_from_scores


def formula(sigma: float, keys: int) -> float:
    """As the paper writes it, in float64."""
    beta = math.exp(-sigma * math.sqrt(keys / (keys - 1)))
    rest = 1 + (keys - 1) * beta
    return math.log(rest) + sigma * math.sqrt(keys * (keys - 1)) * beta / rest


@pytest.mark.parametrize(
    ("keys", "sigma", "wanted"), [(8, 1, 1.979691), (64, 5, 1.802616), (197, 10, 0.094856), (1024, 12, 0.080785)]
)
def test_numbers_found_by_numerical_minimisation(keys: int, sigma: float, wanted: float) -> None:
    floor = entropy_floor(torch.tensor(float(sigma), dtype=torch.float64), keys)
    assert floor.item() == pytest.approx(wanted, abs=1e-6)
    assert floor.item() == pytest.approx(formula(sigma, keys), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_formula_over_many_sizes(dtype: torch.dtype) -> None:
    sigma = torch.tensor([0.0, 1e-3, 0.5, 3.0, 20.0, 80.0], dtype=dtype)
    keys = torch.tensor([2, 3, 17, 1000])
    wanted = [[formula(float(s), int(k)) for k in keys] for s in sigma]
    floor = entropy_floor(sigma[:, None], keys)
    assert floor.dtype == dtype
    torch.testing.assert_close(floor, torch.tensor(wanted, dtype=dtype), rtol=1e-5, atol=1e-7)


def test_it_is_tight_for_one_raised_logit() -> None:
    for keys, height in ((2, 1.0), (5, 3.0), (40, 7.5)):
        scores = torch.zeros(keys, dtype=torch.float64)
        scores[keys // 2] = height
        floor, entropy = entropy_floor_from_scores(scores), attention_entropy_from_scores(scores)
        assert floor.item() == pytest.approx(entropy.item(), rel=1e-12)


def test_no_row_lies_below_it() -> None:
    generator = torch.Generator().manual_seed(3)
    for keys in (2, 3, 9, 64):
        for scale in (0.01, 1.0, 5.0, 30.0):
            scores = scale * torch.randn(500, keys, generator=generator, dtype=torch.float64)
            scores[::3, 0] += 5 * scale  # near the worst case, too
            floor, entropy = entropy_floor_from_scores(scores), attention_entropy_from_scores(scores)
            assert (floor <= entropy + 1e-12).all()
            assert (floor >= 0).all()


def test_masked_keys_do_not_count() -> None:
    scores = 3 * torch.randn(4, 7, dtype=torch.float64)
    shown = torch.rand(4, 7) > 0.4
    shown[0] = False
    shown[1] = torch.arange(7) == 2
    wanted = []
    for row, seen in zip(scores.numpy(), shown.numpy(), strict=True):
        kept = row[seen]
        wanted.append(formula(np.linalg.norm(kept - kept.mean()), len(kept)) if len(kept) > 1 else 0.0)
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(entropy_floor_from_scores(scores, mask=shown), expected)
    for fill in (-math.inf, -1e9, torch.finfo(torch.float32).min):
        torch.testing.assert_close(entropy_floor_from_scores(scores.masked_fill(~shown, fill)), expected)
    torch.testing.assert_close(entropy_floor_from_scores(scores.T, mask=shown.T, dim=0), expected)


def test_causal_rows_count_the_keys_they_see() -> None:
    scores = torch.randn(6, 6, dtype=torch.float64)
    floor = entropy_floor_from_scores(scores, mask=torch.ones(6, 6, dtype=torch.bool).tril())
    for row in range(6):
        assert floor[row].item() == pytest.approx(entropy_floor_from_scores(scores[row, : row + 1]).item())


def test_ends_of_the_range() -> None:
    assert entropy_floor(torch.tensor([0.0, 1e4, math.inf]), 9).tolist() == pytest.approx([math.log(9), 0, 0])
    assert entropy_floor(torch.tensor([2.0, 2.0]), torch.tensor([0, 1])).tolist() == [0, 0]
    assert entropy_floor(torch.tensor(math.nan), 9).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores = (200 * torch.randn(3, 50)).to(dtype)
    floor = entropy_floor_from_scores(scores)
    assert floor.dtype == torch.float32
    torch.testing.assert_close(floor, entropy_floor_from_scores(scores.double()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy_floor(torch.ones(2).long(), 4), "`norm` must be floating point, got torch.int64"),
        (lambda: entropy_floor_from_scores(torch.ones(2).long()), "`scores` must be floating point, got torch.int64"),
        (
            lambda: entropy_floor_from_scores(torch.ones(2), mask=torch.ones(2)),
            "`mask` must be boolean .*, got torch.float32",
        ),
    ],
    ids=["norm", "scores", "mask"],
)
def test_errors_name_the_argument(call: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
