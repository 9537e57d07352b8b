"""Alarms with hysteresis: a level that is crossed is reported once, until the quantity has come back well behind it."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

REARM = 0.8  # share of a level below which an alarm is armed again; its inverse for those that fire below a level


@dataclass(frozen=True)
class Alarm:
    """A level that was crossed.

    Args:
        kind: ``"warn"``, ``"stop"`` or ``"predicted"``.
        quantity: Name of the number.
        value: What it was.
        level: What it crossed.
    """

    kind: str
    quantity: str
    value: float
    level: float

    def __str__(self) -> str:
        return f"{self.quantity} is {self.value:.4g}, the level is {self.level:.4g}"


class Alarms:
    """Levels by kind and quantity, and which of them are crossed.

    A NaN is beyond every level. A quantity that is not measured changes nothing.

    Args:
        levels: Of each kind, the level of each quantity.
        low: Quantities whose alarm is below the level; that of the others is above.

    Example:
        >>> alarms = Alarms({"warn": {"max_logit": 100.0}}, low=())
        >>> [len(alarms.check({"max_logit": value})) for value in (90.0, 120.0, 99.0, 130.0, 79.0, 101.0)]
        [0, 1, 0, 0, 0, 1]
    """

    def __init__(self, levels: Mapping[str, Mapping[str, float]], low: Collection[str]) -> None:
        self.levels = {(kind, name): level for kind, named in levels.items() for name, level in named.items()}
        self.low = low
        self.active: set[tuple[str, str]] = set()

    def check(self, values: Mapping[str, float]) -> list[Alarm]:
        """The alarms that go off now, by what was measured."""
        fired = []
        for (kind, name), level in self.levels.items():
            if name not in values:
                continue
            value = values[name]
            if self._beyond(name, value, level):
                if (kind, name) not in self.active:
                    fired.append(Alarm(kind, name, value, level))
                self.active.add((kind, name))
            elif not self._beyond(name, value, self._rearmed(name, level)):
                self.active.discard((kind, name))
        return fired

    def _rearmed(self, name: str, level: float) -> float:
        """Where a quantity has come back far enough."""
        return level + abs(level) * (1 / REARM - 1) if name in self.low else level - abs(level) * (1 - REARM)

    def _beyond(self, name: str, value: float, level: float) -> bool:
        return math.isnan(value) or (value < level if name in self.low else value > level)

    def state_dict(self) -> dict[str, Any]:
        """Which alarms have gone off and not come back."""
        return {"active": sorted(map(list, self.active))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; levels that are gone are forgotten."""
        self.active = {(kind, name) for kind, name in state["active"] if (kind, name) in self.levels}


def check_levels(argument: str, levels: Mapping[str, float], names: Collection[str]) -> dict[str, float]:
    """Return levels as plain numbers, or raise a ValueError."""
    if not isinstance(levels, Mapping):
        raise TypeError(
            f"`{argument}` must map headlines to levels, as in {{'max_logit': 1e3}}, got {levels!r}. They are "
            f"{', '.join(names)}."
        )
    plain = dict(levels)
    unknown = [name for name in plain if name not in names]
    if unknown:
        raise ValueError(
            f"`{argument}` must name numbers that are measured, got {', '.join(map(repr, unknown))}. They are "
            f"{', '.join(names)}."
        )
    for name, level in plain.items():
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not math.isfinite(level):
            raise ValueError(f"`{argument}` of {name!r} must be a finite number, got {level!r}. Leave it out for none.")
    return {name: float(level) for name, level in plain.items()}
