"""Strength of a regularizer as a function of training progress.

A schedule returns a factor that multiplies the callback's ``weight``. Times are optimizer steps when given as ``int``
and fractions of the whole training when given as ``float``: ``duration=500`` is 500 steps, ``duration=0.5`` half the
training. Outside its interval a schedule holds its end values. A schedule has no state of its own: its value follows
from the trainer's step, which the checkpoint restores, so a resumed run continues it exactly.
"""

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Schedule(ABC):
    """Base of all schedules: a pure function of the optimizer step."""

    @abstractmethod
    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """Factor at ``step``.

        Args:
            step: Optimizer steps taken so far, >= 0.
            total_steps: Optimizer steps of the whole training; needed when a time is a fraction.

        Raises:
            ValueError: If a fraction is used and ``total_steps`` is unknown.
        """


class Constant(Schedule):
    """The same factor throughout.

    Args:
        value: The factor, >= 0.

    Example:
        >>> Constant(0.5)(1000)
        0.5
    """

    def __init__(self, value: float = 1.0) -> None:
        self.value = _check_factor("value", value)

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """Factor at ``step``."""
        return self.value


class _Ramp(Schedule):
    """From ``start`` to ``end`` between ``begin`` and ``begin + duration``, along a curve of progress in [0, 1]."""

    def __init__(
        self, start: float = 1.0, end: float = 0.0, begin: int | float = 0, duration: int | float = 1.0
    ) -> None:
        self.start, self.end = _check_factor("start", start), _check_factor("end", end)
        self.begin, self.duration = _check_time("begin", begin), _check_time("duration", duration)
        if self.duration == 0:
            raise ValueError("`duration` must be > 0, got 0; use `Constant` for a factor that does not change.")
        if isinstance(self.begin, float) and isinstance(self.duration, float) and self.begin + self.duration > 1 + 1e-9:
            raise ValueError(
                f"`begin + duration` must be <= 1, got {begin} + {duration}: the training would end before `end` is "
                f"reached; the rest of the training is `duration={1 - begin:g}`."
            )

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """Factor at ``step``."""
        begin = _in_steps("begin", self.begin, total_steps)
        duration = _in_steps("duration", self.duration, total_steps)
        if step >= begin + duration:
            return self.end
        if step <= begin:
            return self.start
        return self.start + (self.end - self.start) * self._curve((step - begin) / duration)

    def _curve(self, progress: float) -> float:
        raise NotImplementedError


class Linear(_Ramp):
    """Straight line, for instance a warm-up with ``Linear(0.0, 1.0, duration=0.1)``.

    Args:
        start: Factor before and at ``begin``.
        end: Factor from ``begin + duration`` on.
        begin: Steps (int) or fraction of training (float).
        duration: Steps (int) or fraction of training (float).

    Example:
        >>> Linear(0.0, 1.0, duration=10)(5)
        0.5
    """

    def _curve(self, progress: float) -> float:
        return progress


class Cosine(_Ramp):
    """Half a cosine: AEM's weight annealing, per optimizer step, with the default ``start`` 1 and ``end`` 0.

    ``end + (start - end) * (1 + cos(pi * progress)) / 2``.

    Args:
        start: Factor before and at ``begin``.
        end: Factor from ``begin + duration`` on.
        begin: Steps (int) or fraction of training (float).
        duration: Steps (int) or fraction of training (float).

    Example:
        >>> round(Cosine()(25, total_steps=100), 4)
        0.8536
    """

    def _curve(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


class Cubic(_Ramp):
    """Fast at first, slow at the end: ``end + (start - end) * (1 - progress)^3`` (Zhu & Gupta 2017).

    Args:
        start: Factor before and at ``begin``.
        end: Factor from ``begin + duration`` on.
        begin: Steps (int) or fraction of training (float).
        duration: Steps (int) or fraction of training (float).

    Example:
        >>> Cubic(0.0, 0.8, duration=10)(5)
        0.7000000000000001
    """

    def _curve(self, progress: float) -> float:
        return 1 - (1 - progress) ** 3


class MultiStep(Schedule):
    """Piecewise constant.

    Args:
        milestones: Increasing times at which the factor changes, steps (int) or fractions (float).
        values: Factors, one more than ``milestones``; ``values[0]`` holds before the first milestone.

    Example:
        >>> schedule = MultiStep([100, 200], [0.0, 0.5, 1.0])
        >>> [schedule(step) for step in (0, 99, 100, 200)]
        [0.0, 0.0, 0.5, 1.0]
    """

    def __init__(self, milestones: Sequence[float], values: Sequence[float]) -> None:
        self.milestones = [_check_time("milestones", time) for time in milestones]
        self.values = [_check_factor("values", value) for value in values]
        if not self.milestones:
            raise ValueError("`milestones` must not be empty; use `Constant` for a factor that does not change.")
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                f"`values` must have one entry more than `milestones`, got {len(self.values)} for "
                f"{len(self.milestones)} milestones."
            )
        pairs = zip(self.milestones, self.milestones[1:])
        if len({type(time) for time in self.milestones}) > 1 or any(first >= second for first, second in pairs):
            raise ValueError(f"`milestones` must increase and be all steps or all fractions, got {self.milestones}.")

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """Factor at ``step``."""
        times = [_in_steps("milestones", time, total_steps) for time in self.milestones]
        return self.values[bisect.bisect_right(times, step)]


class ProSparse(Schedule):
    """Progressive weight of ProSparse: stages that each rise along half a sine to their peak (Algorithm 1).

    With the stages' *accumulated* ends ``T_i`` and peaks ``l_i``: 0 up to the end of a leading stage of peak 0, then
    constant at the first peak up to its end, then for ``T_(i-1) < step <= T_i``
    ``l_(i-1) + (l_i - l_(i-1)) (1 + sin(-pi/2 + pi (step - T_(i-1)) / (T_i - T_(i-1)))) / 2``. Equal consecutive peaks
    hold the weight. After the last stage its peak stays.

    Args:
        stages: ``(end, peak)`` of each stage, ends increasing and all steps (int) or all fractions of training
            (float), peaks not decreasing. A leading ``(end, 0.0)`` is stage 0, in which the model only gets used to
            its new activation.

    Raises:
        ValueError: If there is no stage, ends do not increase, or peaks decrease.

    Source:
        ProSparse (Song et al. 2024, arXiv 2402.13516), Algorithm 1 and Table 6, whose ends include stage 0.

    Example:
        >>> schedule = ProSparse([(100, 0.0), (200, 0.5), (300, 1.0)])
        >>> [schedule(step) for step in (100, 101, 200, 250, 300, 1000)]
        [0.0, 0.5, 0.5, 0.75, 1.0, 1.0]
    """

    def __init__(self, stages: Sequence[Sequence[float]]) -> None:
        pairs = [tuple(stage) for stage in stages]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"`stages` must hold at least one pair (end, peak), got {list(stages)!r}.")
        self.ends = [_check_time("stages", end) for end, _ in pairs]
        self.peaks = [_check_factor("stages", peak) for _, peak in pairs]
        if len({type(end) for end in self.ends}) > 1 or any(a >= b for a, b in zip([0, *self.ends], self.ends)):
            raise ValueError(
                "`stages` must have ends > 0 that increase and are all steps or all fractions, counted from the start "
                f"of training, got {self.ends}."
            )
        if any(a > b for a, b in zip(self.peaks, self.peaks[1:])):
            raise ValueError(
                f"`stages` must have peaks that do not decrease, got {self.peaks}; a fine-tuning with a smaller weight "
                "is a training of its own."
            )

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """Factor at ``step``."""
        # rounded: 0.29 of 100 steps is a little less than 29, and stage 0 ends with a jump
        ends = [round(_in_steps("stages", end, total_steps), 6) for end in self.ends]
        stage = bisect.bisect_left(ends, step)
        if stage >= len(ends):
            return self.peaks[-1]
        if stage == 0 or self.peaks[stage - 1] == 0:  # stage 0, or the warm-up: constant
            return self.peaks[stage]
        before, progress = self.peaks[stage - 1], (step - ends[stage - 1]) / (ends[stage] - ends[stage - 1])
        return before + (self.peaks[stage] - before) * (1 + math.sin(-math.pi / 2 + math.pi * progress)) / 2


def _check_factor(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")
    return float(value)


def _check_time(name: str, time: float) -> int | float:
    if isinstance(time, bool) or not isinstance(time, (int, float)) or not time >= 0:
        raise ValueError(
            f"`{name}` must be >= 0, an int for steps or a float for a fraction of training, got {time!r}."
        )
    if isinstance(time, float) and time > 1:
        raise ValueError(f"`{name}` as a fraction of training must be <= 1, got {time}; write {int(time)} for steps.")
    return time


def _in_steps(name: str, time: int | float, total_steps: int | None) -> float:
    if isinstance(time, int):
        return time
    if total_steps is None or not 0 <= total_steps < math.inf:
        raise ValueError(
            f"`{name}={time}` is a fraction of training, but the number of training steps is unknown: set "
            "`max_steps` or `max_epochs` of the Trainer (`total_steps` of `regularize`), or give steps as an int."
        )
    return time * total_steps
