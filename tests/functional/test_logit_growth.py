"""Crossings against closed forms and numpy, and what must never be called a crossing."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lightning_reg.functional import predict_crossing
from lightning_reg.functional.logit_growth import fit_growth

STEPS = list(range(20, 1020, 20))


def parabola(level: float, growth: float, bend: float, now: float = 1000.0) -> Callable[[float], float]:
    """A curve that is exactly the card's."""
    return lambda step: math.exp(level + growth * math.log(step / now) + bend * math.log(step / now) ** 2)


def curve(function: Callable[[float], float], steps: list[int] = STEPS) -> list[float]:
    return [function(step) for step in steps]


@pytest.mark.parametrize(
    ("level", "growth", "bend", "x"),
    [
        # by hand: the first x > 0 at which level + growth x + bend x^2 is 7
        (5.0, 4.0, 0.0, 0.5),
        (6.0, 2.0, 4.0, (math.sqrt(20) - 2) / 8),
        (6.0, 3.0, -2.0, 0.5),  # -2 x^2 + 3 x - 1 = 0 at 0.5 and 1
        (6.75, 1.0, -1.0, 0.5),  # touches
    ],
)
def test_a_parabola_is_followed_exactly(level: float, growth: float, bend: float, x: float) -> None:
    values = curve(parabola(level, growth, bend))
    found = predict_crossing(STEPS, values, threshold=math.exp(7.0))
    if bend == -1.0:  # whether rounding lets it touch is open
        assert found is None or found == pytest.approx(1000 * math.exp(x), rel=1e-3)
    else:
        assert found == pytest.approx(1000 * math.exp(x), rel=1e-9)


def test_a_power_law_crosses_where_it_should() -> None:
    assert predict_crossing(STEPS, [3e-9 * step**4 for step in STEPS]) == pytest.approx((1e4 / 3e-9) ** 0.25, rel=1e-9)


def test_tensors_of_any_kind_are_taken() -> None:
    values = curve(parabola(7.0, 4.0, 0.5))
    exact = predict_crossing(STEPS, values)
    assert predict_crossing(torch.tensor(STEPS), torch.tensor(values, dtype=torch.float64)) == exact
    rounded = predict_crossing(np.array(STEPS), torch.tensor(values, requires_grad=True))
    assert rounded == pytest.approx(exact, rel=1e-4)


def test_the_fit_is_numpys() -> None:
    generator = np.random.default_rng(3)
    values = np.exp(5 + 3 * np.log(np.array(STEPS) / 700) + generator.normal(0, 0.2, len(STEPS)))
    level, growth, bend, error = fit_growth(torch.tensor(STEPS), torch.tensor(values))
    recent = np.array(STEPS) >= 500
    x, y = np.log(np.array(STEPS)[recent] / 1000), np.log(values[recent])
    coefficients, covariance = np.polyfit(x, y, 2, cov=True)
    np.testing.assert_allclose([bend, growth, level], coefficients, rtol=1e-9)
    np.testing.assert_allclose(error, math.sqrt(covariance[1, 1]), rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_scatter_moves_the_crossing_little(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = parabola(math.log(1e4) - 1.5, 5.0, 1.0)
    noisy = [value * math.exp(generator.normal(0, 0.05)) for value in curve(truth)]
    exact = 1000 * math.exp(2 * 1.5 / (5 + math.sqrt(25 + 4 * 1.5)))
    assert predict_crossing(STEPS, noisy) == pytest.approx(exact, rel=0.07)


@pytest.mark.parametrize(
    "function",
    [
        parabola(9.0, -2.0, 0.0),  # falls
        parabola(9.0, -0.1, 30.0),  # falls still, though the parabola turns and would cross at x = 0.08
        parabola(9.0, 0.0, 0.0),  # flat
        parabola(9.0, 0.3, 10.0),  # hardly grows
        parabola(9.0, 1.0, -2.0),  # bends down at 9.125, below log(1e4) = 9.21
        parabola(5.0, 2.0, 0.0),  # crosses, but at 8 times the steps done
    ],
)
def test_no_crossing(function: Callable[[float], float]) -> None:
    assert predict_crossing(STEPS, curve(function)) is None


def test_what_stands_still_has_no_crossing_even_where_any_growth_will_do() -> None:
    assert predict_crossing(STEPS, [1.0] * len(STEPS), minimum_growth=0, confidence=0) is None


@pytest.mark.parametrize("seed", range(20))
def test_flat_scatter_below_the_threshold_is_no_growth(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = 7000 * np.exp(generator.normal(0, 0.02, len(STEPS)))
    assert predict_crossing(STEPS, values, confidence=4.0, minimum_growth=0.0) is None


def test_growth_must_stand_out_of_its_scatter() -> None:
    generator = np.random.default_rng(0)
    values = np.exp(8.0 + 3.0 * np.log(np.array(STEPS) / 1000) + generator.normal(0, 0.2, len(STEPS)))
    _, growth, _, error = fit_growth(torch.tensor(STEPS), torch.tensor(values))
    assert growth > 0.5
    assert predict_crossing(STEPS, values, confidence=0.9 * growth / error, reach=9) is not None
    assert predict_crossing(STEPS, values, confidence=1.1 * growth / error, reach=9) is None


def test_minimum_growth_is_the_exponent_now() -> None:
    values = curve(parabola(9.0, 0.8, 0.5))
    assert predict_crossing(STEPS, values, minimum_growth=0.79) is not None
    assert predict_crossing(STEPS, values, minimum_growth=0.81) is None


def test_reach_bounds_the_extrapolation() -> None:
    values = [step**4 for step in STEPS]  # 1.5 times the steps done is (1500)^4
    assert predict_crossing(STEPS, values, threshold=1500**4, reach=1.51) == pytest.approx(1500)
    assert predict_crossing(STEPS, values, threshold=1500**4, reach=1.49) is None


def test_the_window_leaves_out_what_is_old() -> None:
    # below 400 a plateau that would bend the fit
    values = [max(400, step) ** 4 for step in STEPS]
    assert predict_crossing(STEPS, values, threshold=1500**4) == pytest.approx(1500, rel=1e-9)
    assert predict_crossing(STEPS, values, threshold=1500**4, window=0.2) != pytest.approx(1500, rel=1e-2)
    # its first point is in
    assert predict_crossing(STEPS[24:], values[24:], threshold=1500**4, minimum_points=26) == pytest.approx(1500)
    assert predict_crossing(STEPS, values, threshold=1500**4, minimum_points=27) is None


@pytest.mark.parametrize("count", range(6))
def test_few_points_predict_nothing(count: int) -> None:
    steps = list(range(1000 - 20 * count, 1000, 20))
    assert predict_crossing(steps, [step**4 for step in steps], threshold=1100**4) is None


def test_six_points_are_enough() -> None:
    steps = list(range(900, 1020, 20))
    assert predict_crossing(steps, [step**4 for step in steps], threshold=1100**4) == pytest.approx(1100)


def test_already_passed_is_now() -> None:
    assert predict_crossing([10, 20], [1.0, 1e4]) == 20.0
    assert predict_crossing([10], [2e4]) == 10.0
    # past values do not count: it came back
    assert predict_crossing(STEPS, [2e4] * (len(STEPS) - 1) + [10.0]) is None


def test_a_last_point_that_scatters_below_is_there_by_the_fit() -> None:
    values = [1.001e4 * (step / 1000) ** 4 for step in STEPS]
    values[-1] = 0.9999e4
    assert predict_crossing(STEPS, values) == 1000.0


@pytest.mark.parametrize("bad", [math.nan, 0.0, -5.0, -math.inf])
def test_what_is_no_size_is_left_out(bad: float) -> None:
    values = [float(step) ** 4 for step in STEPS]
    for index in (0, 30, 37):
        values[index] = bad
    assert predict_crossing(STEPS, values, threshold=1500**4) == pytest.approx(1500, rel=1e-9)
    values[-1] = bad  # then now is the point before
    assert predict_crossing(STEPS, values, threshold=1500**4, reach=1500 / 979) == pytest.approx(1500, rel=1e-9)
    assert predict_crossing(STEPS, values, threshold=1500**4, reach=1500 / 981) is None


def test_infinity_is_above_any_threshold_and_does_not_spoil_a_fit() -> None:
    values = [float(step) ** 4 for step in STEPS]
    values[40] = math.inf
    assert predict_crossing(STEPS, values, threshold=1500**4) == pytest.approx(1500, rel=1e-9)
    values[-1] = math.inf
    assert predict_crossing(STEPS, values, threshold=1e300) == 1000.0


def test_nothing_measured_predicts_nothing() -> None:
    assert predict_crossing([], []) is None
    assert predict_crossing([1, 2], [math.nan, 0.0]) is None
    assert predict_crossing([0], [1e9]) is None  # step 0 has no logarithm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "`threshold` must be > 0 and finite, got 0.0."),
        ({"threshold": math.inf}, "`threshold` must be > 0 and finite, got inf."),
        ({"threshold": math.nan}, "`threshold` must be > 0 and finite, got nan."),
        ({"window": 1.0}, "`window` must be in [0, 1), got 1.0."),
        ({"window": -0.1}, "`window` must be in [0, 1), got -0.1."),
        ({"reach": 1.0}, "`reach` must be > 1 and finite, got 1.0."),
        ({"reach": math.inf}, "`reach` must be > 1 and finite, got inf."),
        ({"minimum_points": 3}, "`minimum_points` must be >= 4, got 3."),
        ({"minimum_growth": -1.0}, "`minimum_growth` must be >= 0, got -1.0."),
        ({"minimum_growth": math.nan}, "`minimum_growth` must be >= 0, got nan."),
        ({"confidence": -1.0}, "`confidence` must be >= 0, got -1.0."),
    ],
    ids=lambda value: "-".join(f"{key}={number}" for key, number in value.items()) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        predict_crossing(STEPS, STEPS, **options)


def test_points_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("equal length, got (2,) and (3,).")):
        predict_crossing([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="`steps` must rise."):
        predict_crossing([1, 3, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="`steps` must rise."):
        predict_crossing([1, 3, math.nan], [1, 2, 3])
