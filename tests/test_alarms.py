"""Alarms go off once, come back behind their level before they go off again, and survive a checkpoint."""

import math
from typing import Any

import pytest

from lightning_reg.alarms import Alarm, Alarms, check_levels


def fired(alarms: Alarms, name: str, *values: float) -> list[int]:
    return [len(alarms.check({name: value})) for value in values]


def test_an_alarm_above_its_level_is_armed_again_below_80_percent_of_it() -> None:
    alarms = Alarms({"warn": {"x": 100.0}}, low=())
    assert fired(alarms, "x", 99, 100, 101, 500, 90, 101, 81, 101) == [0, 0, 1, 0, 0, 0, 0, 0]
    assert fired(alarms, "x", 79.9, 100.1, 1e9) == [0, 1, 0]


def test_an_alarm_below_its_level_is_armed_again_above_125_percent_of_it() -> None:
    alarms = Alarms({"warn": {"x": 0.1}}, low=("x",))
    assert fired(alarms, "x", 0.5, 0.1, 0.09, 0.01, 0.12, 0.09, 0.126, 0.09) == [0, 0, 1, 0, 0, 0, 0, 1]


def test_levels_below_zero_have_a_margin_too() -> None:
    alarms = Alarms({"warn": {"x": -10.0}}, low=())
    assert fired(alarms, "x", -11, -9, -11, -9, -12.1, -9) == [0, 1, 0, 0, 0, 1]


def test_nan_is_beyond_every_level_and_what_is_not_measured_changes_nothing() -> None:
    for low in ((), ("x",)):
        alarms = Alarms({"warn": {"x": 1.0}}, low=low)
        assert fired(alarms, "x", math.nan, math.nan) == [1, 0]
        assert alarms.check({"y": 5.0}) == []
        assert alarms.active == {("warn", "x")}


def test_kinds_and_quantities_are_apart() -> None:
    alarms = Alarms({"warn": {"x": 1.0, "y": 1.0}, "stop": {"x": 10.0}}, low=("y",))
    assert alarms.check({"x": 5.0, "y": 0.5}) == [Alarm("warn", "x", 5.0, 1.0), Alarm("warn", "y", 0.5, 1.0)]
    assert alarms.check({"x": 50.0, "y": 0.5}) == [Alarm("stop", "x", 50.0, 10.0)]
    assert str(Alarm("stop", "x", 50.0, 10.0)) == "x is 50, the level is 10"


def test_state_goes_on() -> None:
    alarms = Alarms({"warn": {"x": 1.0}}, low=())
    alarms.check({"x": 2.0})
    again = Alarms({"warn": {"x": 1.0}}, low=())
    again.load_state_dict(alarms.state_dict())
    assert fired(again, "x", 2.0, 0.5, 2.0) == [0, 0, 1]
    other = Alarms({"warn": {"z": 1.0}}, low=())
    other.load_state_dict(alarms.state_dict())
    assert other.active == set()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"max": 1.0}, "`warn` must name numbers that are measured, got 'max'. They are x, y"),
        ({"x": math.nan}, "`warn` of 'x' must be a finite number, got nan"),
        ({"x": True}, "`warn` of 'x' must be a finite number, got True"),
        ({"x": "1"}, "`warn` of 'x' must be a finite number, got '1'"),
    ],
    ids=["name", "nan", "bool", "text"],
)
def test_levels_are_checked(levels: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_levels("warn", levels, ("x", "y"))
    assert check_levels("warn", {"x": 1}, ("x",)) == {"x": 1.0}
