"""CETT against numpy loops in float64, hand-worked numbers, and the bug of the public search."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_reg.functional import cett, cett_threshold
from lightning_reg.functional.cett import count_tail

D = {"dtype": torch.float64}


def reference(x: Tensor, weight: Tensor, threshold: float, mask: Tensor | None = None) -> float:
    """The definition, one token and one neuron at a time."""
    rows = x.double().numpy().reshape(-1, x.shape[-1])
    valid = np.ones(len(rows), bool) if mask is None else mask.bool().numpy().reshape(-1)
    columns = weight.double().numpy().T
    errors = []
    for row in rows[valid]:
        parts = [value * column for value, column in zip(row, columns)]
        whole = np.linalg.norm(np.sum(parts, 0))
        dropped = [part for part in parts if np.linalg.norm(part) < threshold]
        if whole > 0:
            errors.append(np.linalg.norm(np.sum(dropped, 0)) / whole if dropped else 0.0)
    return float(np.mean(errors)) if errors else 0.0


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("shape", "out"), [((7,), 3), ((5, 11), 4), ((2, 3, 7), 5), ((3, 1), 1)], ids=["7", "5x11", "2x3x7", "3x1"]
)
def test_cett_equals_the_definition(shape: tuple[int, ...], out: int, masked: bool) -> None:
    x, weight = torch.randn(shape, **D), torch.randn(out, shape[-1], **D)
    mask = torch.rand(shape[:-1]) > 0.4 if masked else None
    thresholds = torch.tensor([0.0, 0.3, 1.0, 2.5, 1e9], **D)
    actual = cett(x, weight, thresholds, mask=mask)
    expected = [reference(x, weight, threshold, mask) for threshold in thresholds.tolist()]
    torch.testing.assert_close(actual, torch.tensor(expected, **D))
    single = cett(x.float(), weight.float(), 1.0, mask=mask)
    assert (single.shape, single.dtype) == ((), torch.float32)
    assert single.item() == pytest.approx(expected[2], rel=1e-5)


def test_hand_worked_numbers() -> None:
    # contributions (3, 0) and (0, 8): norms 3 and 8, output (3, 8)
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    norms = math.sqrt(9 + 64)
    values = cett(x, weight, torch.tensor([3.0, 3.1, 8.0, 8.1]))
    torch.testing.assert_close(values, torch.tensor([0.0, 3 / norms, 3 / norms, 1.0]))


def test_thresholds_keep_their_shape() -> None:
    x, weight = torch.randn(3, 5), torch.randn(2, 5)
    thresholds = torch.rand(2, 3)
    values = cett(x, weight, thresholds)
    assert values.shape == (2, 3)
    assert values[1, 2] == cett(x, weight, thresholds[1, 2])
    assert cett(x, weight, thresholds[:0]).shape == (0, 3)


def test_a_token_without_output_is_left_out() -> None:
    x, weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    # the last two tokens have no output, the third although it has contributions
    assert cett(x, weight, 3.5) == cett(x[:1], weight, 3.5) == 3
    assert cett(x[1:], weight, 3.5) == 0


def test_cett_exceeds_one_where_contributions_cancel() -> None:
    x, weight = torch.tensor([[1.0, 1.5]]), torch.tensor([[1.0, -1.0]])
    values = cett(x, weight, torch.tensor([1.2, 2.0]))
    torch.testing.assert_close(values, torch.tensor([2.0, 1.0]))


def test_padding_may_hold_nan() -> None:
    x, weight = torch.randn(2, 3, 5), torch.randn(4, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    poisoned = x.masked_fill(~mask.unsqueeze(-1), math.nan)
    torch.testing.assert_close(cett(poisoned, weight, 1.0, mask=mask), cett(x[mask], weight, 1.0))
    torch.testing.assert_close(cett(x, weight, 1.0, mask=mask.long()), cett(x[mask], weight, 1.0))
    assert cett_threshold(poisoned, weight, 0.3, mask=mask) == cett_threshold(x[mask], weight, 0.3)


def test_nan_in_valid_places_stays_visible() -> None:
    x = torch.randn(3, 5)
    x[1, 2] = math.nan
    assert cett(x, torch.randn(4, 5), 0.5).isnan()
    assert cett_threshold(x, torch.randn(4, 5), 0.5) == 0


def test_half_precision_is_measured_in_float32() -> None:
    x, weight = torch.randn(6, 9, dtype=torch.bfloat16), torch.randn(4, 9, dtype=torch.bfloat16)
    value = cett(x, weight, 1.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(x, weight, 1.0), rel=1e-5)


def test_tiny_contributions_do_not_underflow() -> None:
    x, weight = torch.tensor([[1e-25, 2e-25]]), torch.eye(2)
    torch.testing.assert_close(cett(x, weight, 1.5e-25), torch.tensor(1 / math.sqrt(5)))


def test_no_gradient() -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    assert not cett(x, weight, 0.5).requires_grad
    assert not cett_threshold(x, weight, 0.5).requires_grad


def test_kept_is_neither_below_nor_zero() -> None:
    x, weight = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 0.0]]), torch.eye(3)
    tail = count_tail(x, weight, torch.tensor([0.0, 1.0, 1.5, 9.0]), mask=torch.tensor([True, True]))
    assert tail.kept.tolist() == [3, 3, 2, 0]
    assert (tail.tokens.item(), tail.elements.item()) == (2, 6)


# --- the threshold of a target ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.01, 0.1, 0.2, 0.5, 0.95])
def test_threshold_is_the_last_that_meets_the_target(target: float) -> None:
    # orthogonal columns of several lengths: nothing cancels, so CETT rises with the threshold
    x, weight = torch.randn(9, 13, **D).relu(), torch.linalg.qr(torch.randn(17, 13, **D))[0] * torch.rand(13, **D)
    found = cett_threshold(x, weight, target)
    norms = sorted(set((x.abs() * weight.norm(dim=0)).flatten().tolist()) - {0.0})
    values = [reference(x, weight, norm * (1 - 1e-9)) for norm in norms]  # drops what is below, whatever the rounding
    assert values == sorted(values), "the case must be monotone"
    assert found.item() == pytest.approx(max(n for n, v in zip(norms, values) if v <= target), rel=1e-12)


def test_public_bug_tightest_target_gives_zero_not_the_largest_threshold() -> None:
    x, weight = torch.randn(8, 12), torch.randn(5, 12)
    candidates = torch.linspace(1.0, 6.0, 20)
    tight = cett(x, weight, candidates[0]).item() / 2
    assert cett_threshold(x, weight, tight, candidates=candidates) == 0
    met = cett(x, weight, candidates[0]).item()
    assert cett_threshold(x, weight, met, candidates=candidates) == candidates[0]
    assert cett_threshold(x, weight, 0.999999, candidates=candidates[:3]) == candidates[2]


def test_target_zero_drops_zeros_only() -> None:
    x, weight = torch.randn(4, 6).relu(), torch.randn(3, 6)
    found = cett_threshold(x, weight, 0.0)
    assert found == (x * weight.norm(dim=0))[x > 0].min()
    assert cett(x, weight, found) == 0
    assert cett_threshold(torch.zeros(2, 3), torch.randn(4, 3), 0.5) == 0


@pytest.mark.parametrize("target", [0.05, 0.3, 0.6])
def test_order_of_candidates_does_not_matter(target: float) -> None:
    x, weight = torch.randn(8, 12), torch.eye(12)
    candidates = torch.linspace(0.1, 2.0, 9)
    found = cett_threshold(x, weight, target, candidates=candidates)
    assert found == max(c for c in candidates if cett(x, weight, c) <= target)
    assert cett_threshold(x, weight, target, candidates=candidates.flip(0)) == found
    assert cett_threshold(x, weight, target, candidates=[*candidates[4:], *candidates[:4]]) == found


def test_where_cett_is_not_monotone_the_target_is_still_met() -> None:
    # norms 1, 1.5, 4; CETT below them: 0, 2 of 3.5, 0.5 / 3.5, 1
    x, weight = torch.tensor([[2.0, 2.5, 4.0]]), torch.tensor([[1.0, -1.0, 1.0]])
    values = cett(x, weight, torch.tensor([2.0, 2.5, 4.0]))
    assert values[1] > 0.2 > values[2]
    found = cett_threshold(x, weight, 0.2)
    assert found in (2.0, 4.0)
    assert cett(x, weight, found) <= 0.2


# --- errors ----------------------------------------------------------------------------------------------------------

X, W = torch.ones(2, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cett(X, W.mT, 1.0), r"`weight` must be \(out, width\) .* \(2, 3\), got \(3, 4\); give `weight.mT`"),
        (lambda: cett(X, W[0], 1.0), r"`weight` must be \(out, width\) .* got \(3,\)"),
        (lambda: cett(X.long(), W, 1.0), "`x` must be floating point"),
        (lambda: cett(X, W, -0.5), "thresholds must be >= 0, got -0.5 as the smallest"),
        (lambda: cett(X, W, math.nan), "thresholds must be >= 0, got nan"),
        (lambda: cett(X, W, 1.0, mask=torch.ones(3).bool()), r"`mask` must have the shape of `x` .* got \(3,\)"),
        (lambda: cett_threshold(X, W, 1.0), r"`target` must be in \[0, 1\), got 1.0: CETT is 0 when nothing"),
        (lambda: cett_threshold(X, W, -0.1), r"`target` must be in \[0, 1\), got -0.1"),
        (lambda: cett_threshold(X, W, math.nan), r"`target` must be in \[0, 1\), got nan"),
        (lambda: cett_threshold(X, W, 0.5, candidates=[-1.0]), "thresholds must be >= 0, got -1"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- properties ------------------------------------------------------------------------------------------------------

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
CASES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**16))


@QUICK
@given(CASES, st.floats(0, 0.99))
def test_threshold_meets_its_target_and_is_maximal_among_neighbours(case: tuple, target: float) -> None:
    tokens, width, out, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, width, generator=generator, **D), torch.randn(out, width, generator=generator, **D)
    found = cett_threshold(x, weight, target)
    assert cett(x, weight, found) <= target
    above = x.abs() * weight.norm(dim=0)
    above = above[above > found * (1 + 1e-12)]
    assert not len(above) or cett(x, weight, above.min()) > target


@QUICK
@given(CASES, st.floats(0, 4), st.sampled_from([1e-3, 7.0, 1e4]))
def test_cett_follows_the_scale(case: tuple, threshold: float, scale: float) -> None:
    tokens, width, out, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, width, generator=generator, **D), torch.randn(out, width, generator=generator, **D)
    torch.testing.assert_close(cett(x * scale, weight, threshold * scale), cett(x, weight, threshold))
    torch.testing.assert_close(cett(x, weight * scale, threshold * scale), cett(x, weight, threshold))
    assert cett(x, weight, 0.0) == 0
    torch.testing.assert_close(cett(x, weight, math.inf), torch.ones((), **D))
