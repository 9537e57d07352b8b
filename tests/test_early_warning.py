"""The warning over a training: hysteresis, the end of the training, resume, few points kept."""

import json
import math
import re
from itertools import pairwise
from typing import Any

import pytest

from lightning_reg.early_warning import EarlyWarning
from lightning_reg.functional import predict_crossing


def grow(step: int) -> float:
    """Crosses 1e4 at step 1990, which is within twice the steps done from 1000 on."""
    return 1e4 * (step / 1990) ** 4


def flat(step: int) -> float:
    return 30.0


def test_warns_after_patience_predictions_in_a_row() -> None:
    warning = EarlyWarning(patience=3)
    found = [warning.update(step, grow(step)) for step in range(20, 1100, 20)]
    # the third prediction is at 1040
    assert found[:51] == [None] * 51
    assert found[51:] == pytest.approx([1990.0] * 3)
    assert warning.warned


def test_the_prediction_of_one_measurement_is_there_before_the_warning() -> None:
    warning = EarlyWarning(patience=2)
    for step in range(20, 1001, 20):
        assert warning.prediction is None
        warning.update(step, grow(step))
    assert warning.prediction == pytest.approx(1990)
    assert not warning.warned


def test_single_predictions_do_not_warn() -> None:
    warning = EarlyWarning(patience=2, threshold=100)
    for step in range(20, 2000, 20):
        # a value above the threshold now and then is a crossing, but not twice in a row
        assert warning.update(step, 200.0 if step % 60 == 0 else 1.0) is None


def test_the_warning_ends_after_as_many_without() -> None:
    warning = EarlyWarning(patience=2, threshold=100)
    values = [1.0, 200.0, 200.0, 1.0, 200.0, 1.0, 1.0, 200.0, 200.0]
    found = [warning.update(step, value) is not None for step, value in enumerate(values, 1)]
    assert found == [False, False, True, True, True, True, False, False, True]


def test_a_warning_names_the_last_crossing_while_it_is_on() -> None:
    warning = EarlyWarning(patience=2, threshold=100)
    found = [warning.update(step, value) for step, value in enumerate([200.0, 200.0, 1.0, 200.0], 1)]
    assert found == [None, 2.0, 2.0, 4.0]


def test_crossings_after_the_end_do_not_warn() -> None:
    for until, warns in ((1980, False), (2000, True)):
        warning = EarlyWarning(until=until)
        found = [warning.update(step, grow(step)) for step in range(20, 1500, 20)]
        assert (found[-1] is not None) == warns
    warning.until = 1980  # known later
    assert [warning.update(step, grow(step)) for step in (1500, 1520)][-1] is None


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
def test_a_measurement_that_says_nothing_changes_nothing(bad: float) -> None:
    warning = EarlyWarning()
    for step in range(20, 1100, 20):
        warning.update(step, grow(step))
    before = warning.state_dict()
    assert warning.update(1100, bad) == pytest.approx(1990)
    assert warning.state_dict() == before
    assert EarlyWarning().update(0, 1e9) is None


def test_infinity_has_passed() -> None:
    warning = EarlyWarning(patience=1)
    assert warning.update(7, math.inf) == 7.0


def test_flat_logits_never_warn() -> None:
    warning = EarlyWarning()
    assert not any(warning.update(step, flat(step)) for step in range(50, 10000, 50))


@pytest.mark.parametrize("cut", [700, 1000, 1020, 1040, 1300])
def test_resumed_is_uninterrupted(cut: int) -> None:
    straight, first, second = EarlyWarning(), EarlyWarning(), EarlyWarning()
    steps = range(20, 2200, 20)
    expected = [straight.update(step, grow(step)) for step in steps]
    found = [first.update(step, grow(step)) for step in steps if step <= cut]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.update(step, grow(step)) for step in steps if step > cut]
    assert found == expected
    assert second.state_dict() == straight.state_dict()
    assert second.prediction == straight.prediction


def test_the_state_is_a_copy() -> None:
    warning = EarlyWarning()
    warning.update(1, 2.0)
    state = warning.state_dict()
    warning.update(2, 3.0)
    assert state["points"] == [[1.0, 2.0]]


def test_a_training_that_went_back_forgets_what_came_after() -> None:
    warning, straight = EarlyWarning(), EarlyWarning()
    for step in range(20, 1100, 20):
        straight.update(step, grow(step))
    for step in (*range(20, 800, 20), *range(800, 1000, 20)):
        warning.update(step, grow(step) if step < 800 else 1e3)
    for step in range(800, 1100, 20):
        warning.update(step, grow(step))
    assert warning.state_dict()["points"] == straight.state_dict()["points"]
    assert warning.update(1100, grow(1100)) == pytest.approx(1990)


def test_few_points_are_kept_and_predict_the_same() -> None:
    warning = EarlyWarning(1e12, patience=1, reach=3)
    steps, values = [], []
    for step in range(20, 24020, 20):
        steps.append(step)
        values.append(1e12 * (step / 40000) ** 3)
        warning.update(step, values[-1])
    points = warning.state_dict()["points"]
    assert 200 < len(points) < 300
    assert points[0][0] >= 12000
    assert points[-1] == [24000.0, values[-1]]
    gaps = [later / earlier for (earlier, _), (later, _) in pairwise(points)]
    assert all(1.0025 <= gap < 1.0045 for gap in gaps[:-1])
    assert warning.prediction == pytest.approx(40000, rel=1e-9)
    assert warning.prediction == pytest.approx(predict_crossing(steps, values, threshold=1e12, reach=3), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "`patience` must be >= 1, got 0. 1 warns at the first prediction."),
        ({"until": 0}, "`until` must be >= 1 or None, got 0. Give the last step of the training."),
        ({"threshold": -1.0}, "`threshold` must be > 0 and finite, got -1.0."),
        ({"window": 1.0}, "`window` must be in [0, 1), got 1.0."),
        ({"reach": 0.5}, "`reach` must be > 1 and finite, got 0.5."),
    ],
    ids=["patience", "until", "threshold", "window", "reach"],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EarlyWarning(**options)


def test_options_reach_the_prediction() -> None:
    def first(**options: Any) -> int | None:
        warning = EarlyWarning(patience=1, **options)
        steps = range(20, 3000, 20)
        return next((step for step in steps if warning.update(step, grow(step)) is not None), None)

    assert first() == 1000
    assert first(reach=4) == 500
    assert first(threshold=1e3) == 560  # 1990 * 0.1 ** 0.25 = 1119.1
    assert first(minimum_growth=4.1) == 2000
    assert first(minimum_points=1000) == 2000
    assert first(window=0.99) == 2000  # too few points are that near
    assert first(confidence=1e300) == 2000
