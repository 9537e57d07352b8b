"""Strength of a regularizer as a function of training progress.

A schedule returns a factor that multiplies the callback's ``weight``. Times are optimizer steps when given as ``int``
and fractions of the whole training when given as ``float``: ``duration=500`` is 500 steps, ``duration=0.5`` half the
training. Outside its interval a schedule holds its end values. A schedule has no state of its own: its value follows
from the trainer's step, which the checkpoint restores, so a resumed run continues it exactly.

``TargetController`` is the exception: it moves the factor until a measured quantity meets its target, and what it has
learnt is its state, which the callback saves.
"""

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal


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

    def __repr__(self) -> str:
        """Class and arguments, for logs."""
        shown = [f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_")]
        return f"{type(self).__name__}({', '.join(shown)})"


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
        try:
            pairs = [tuple(stage) for stage in stages]
        except TypeError:
            pairs = []
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                f"`stages` must hold at least one pair (end, peak), as in [(0.2, 0.0), (1.0, 0.5)], got {stages!r}."
            )
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


# (end in optimizer steps, lambda) of ProSparse's Table 6, ends accumulated and including stage 0
_PROSPARSE = {
    "1b": [(10_000, 0.0), (15_000, 1e-3), (20_000, 5e-3), (25_000, 5e-3), (35_000, 5e-2), (95_000, 5e-2)],
    "7b": [(5_000, 0.0), (6_000, 5e-3), (10_000, 5e-2), (12_000, 5e-2), (16_000, 2e-1), (16_500, 2e-1)],
    "13b": [(5_500, 0.0), (6_750, 5e-3), (10_750, 1e-2), (11_000, 1e-2), (15_000, 2e-2), (16_000, 2e-2)],
}


def prosparse_stages(
    table: str, *, tokens: int, width: int, layers: int, unit: float = 1e-8, fractions: bool = False
) -> list[tuple[float, float]]:
    """Published stages of ProSparse in this library's units, for ``ProSparse`` and ``ProgressiveSparsity``.

    The paper adds ``lambda * ||x||_1`` for each layer: a sum over tokens, width and layers. The public code of the
    same group (BlockFFN) multiplies it by 1e-8. Here a penalty is the mean over tokens, width and layers, so the weight
    is ``lambda * unit * tokens * width * layers``: 2.9 for the last stage of the 7B model.

    Args:
        table: ``"1b"``, ``"7b"`` or ``"13b"``.
        tokens: Tokens of a micro-batch, which the paper's sum runs over: 4096 for a single sequence of its length.
        width: Width of the MLP's hidden layer: 11008 for the 7B, 13824 for the 13B model.
        layers: Number of MLPs: 32 for the 7B, 40 for the 13B model.
        unit: Factor of the public code. That ProSparse itself was trained with it is not verified.
        fractions: Give the ends as fractions of the training instead of the published steps.

    Returns:
        ``(end, weight)`` of each stage.

    Raises:
        ValueError: If the table is unknown or a number is not positive.

    Example:
        >>> prosparse_stages("7b", tokens=4096, width=11008, layers=32)[-1]
        (16500, 2.885681152)
    """
    if table.lower() not in _PROSPARSE:
        raise ValueError(f"`table` must be one of {', '.join(map(repr, _PROSPARSE))}, got {table!r}.")
    for name, value in (("tokens", tokens), ("width", width), ("layers", layers), ("unit", unit)):
        if not value > 0:
            raise ValueError(f"`{name}` must be > 0, got {value}.")
    stages, sum_to_mean = _PROSPARSE[table.lower()], unit * tokens * width * layers
    last = stages[-1][0]
    return [(end / last if fractions else end, peak * sum_to_mean) for end, peak in stages]


class TargetController(Schedule):
    """Moves a regularizer's weight until a measured quantity meets its target: ask for a density, not for a weight.

    The reference ``r`` starts at the first measurement and reaches the target after ``ramp`` steps, geometrically: an
    activation that died on the way down does not come back, so the approach must not overshoot. Each update compares
    the moving average ``m`` of the quantity, averaged over all processes, with it: ``error = clip(log(m / r), -1, 1)``,
    0 inside the dead band, and moves the factor by a proportional-integral law,
    ``log factor += gain * (error - previous error) + gain * error / integral_time``. The factor stays in
    ``[minimum, maximum]``; as the limited factor is the state, nothing winds up behind a limit. ``rule="sign"``
    multiplies the factor by ``exp(gain)`` or divides by it instead (ReMoE: ``gain=log(1.2)``, every step).

    Args:
        target: What to hold, > 0. For ``"density"`` in (0, 1).
        quantity: ``"density"`` is the share of activations that are not 0, ``"value"`` what the regularizer logs as
            its value (its entropy, its L1), anything else the name of a logged number.
        raises: Whether a larger weight makes the quantity larger; asked of the regularizer when left out.
        rule: ``"proportional"`` or ``"sign"``.
        gain: Change of the log of the factor for a full error, > 0; 16 for ``"proportional"``, log(1.2) for ``"sign"``.
        integral_time: Steps (int) or fraction of training (float) in which a lasting error moves the factor as much as
            its appearance did.
        ramp: Steps (int) or fraction of training (float) until the reference is at the target; 0 starts there. A
            fraction lasts at least 100 steps: what comes down faster does not stop where it should.
        smoothing: Of the moving average, in [0, 1): 0 takes each measurement as it is. Noise of relative size n moves
            the factor by about ``gain * (1 - smoothing) * n``.
        dead_band: Relative error that is left alone, >= 0.
        minimum: Smallest factor on the callback's weight, > 0.
        maximum: Largest factor on the callback's weight.
        start: Factor to begin with.
        warmup: Steps (int) or fraction of training (float) before the ramp, with the factor at ``start``.
        hold: Freeze the factor once the ramp is over and the quantity is within the dead band.
        every: Optimizer steps between two updates. Each update waits for the device.
        threshold: Of ``"density"``: magnitude up to which an activation counts as zero.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        target: float,
        *,
        quantity: str = "density",
        raises: bool | None = None,
        rule: Literal["proportional", "sign"] = "proportional",
        gain: float | None = None,
        integral_time: int | float = 0.1,
        ramp: int | float = 0.3,
        smoothing: float = 0.5,
        dead_band: float = 0.02,
        minimum: float = 1e-4,
        maximum: float = 1e4,
        start: float = 0.01,
        warmup: int | float = 0,
        hold: bool = False,
        every: int = 1,
        threshold: float = 0.0,
    ) -> None:
        if not isinstance(target, (int, float)) or not 0 < target < math.inf:
            raise ValueError(f"`target` must be a finite number > 0, got {target!r}.")
        if quantity == "density" and not target < 1:
            raise ValueError(f"`target` must be in (0, 1) for a density, got {target}.")
        if rule not in ("proportional", "sign"):
            raise ValueError(f"`rule` must be 'proportional' or 'sign', got {rule!r}.")
        gain = (16.0 if rule == "proportional" else math.log(1.2)) if gain is None else gain
        for name, value in (("gain", gain), ("integral_time", integral_time), ("minimum", minimum)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be finite and > 0, got {value}.")
        for name, value in (("dead_band", dead_band), ("threshold", threshold)):
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be finite and >= 0, got {value}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {smoothing}.")
        if not minimum <= start <= maximum < math.inf:
            raise ValueError(f"`start` must be between `minimum` and `maximum`, {minimum} and {maximum}, got {start}.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be an int >= 1, got {every!r}.")
        self.target, self.quantity, self.raises, self.rule, self.gain = float(target), quantity, raises, rule, gain
        self.smoothing, self.dead_band = smoothing, dead_band
        self.minimum, self.maximum, self.start = minimum, maximum, start
        self.integral_time = _check_time("integral_time", integral_time)
        self.ramp, self.warmup = _check_time("ramp", ramp), _check_time("warmup", warmup)
        self.hold, self.every, self.threshold = hold, every, threshold
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new training."""
        self.factor = float(self.start)
        self.average: float | None = None  # moving average of the quantity
        self.first: float | None = None  # where the ramp starts
        self.error = 0.0  # of the last update
        self.held = False

    def __repr__(self) -> str:
        """Class and arguments, without what was learnt."""
        shown = [f"{key}={value!r}" for key, value in vars(self).items() if key not in _CONTROLLER_STATE]
        return f"TargetController({', '.join(shown)})"

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """The factor as it is now; it changes with ``update``, not with the step."""
        return self.factor

    def reference(self, step: int, total_steps: int | None = None) -> float:
        """What the quantity should be at ``step``."""
        begin, ramp = (_in_steps(name, getattr(self, name), total_steps) for name in ("warmup", "ramp"))
        ramp = max(ramp, _SHORTEST_RAMP) if isinstance(self.ramp, float) and ramp else ramp
        if self.first is None or step >= begin + ramp:
            return self.target
        return self.first * (self.target / self.first) ** ((step - begin) / ramp)

    def update(self, measured: float, step: int, total_steps: int | None = None, *, raises: bool = False) -> None:
        """Take one measurement and move the factor.

        Args:
            measured: The quantity, the same on every process.
            step: Optimizer steps taken so far.
            total_steps: Optimizer steps of the whole training; needed when a time is a fraction.
            raises: Whether a larger weight makes the quantity larger, where the controller was not told.

        Raises:
            ValueError: If the measurement is not finite.
        """
        if not math.isfinite(measured):
            raise ValueError(f"`{self.quantity}` is {measured} at step {step}; a controller needs a finite number.")
        share = 1.0 if self.average is None else 1 - self.smoothing
        self.average = measured * share + (self.average or 0.0) * (1 - share)
        if self.held or step < _in_steps("warmup", self.warmup, total_steps):
            return
        if self.first is None:
            self.first = max(self.average, _TINY)
        reference = self.reference(step, total_steps)
        error = max(-1.0, min(1.0, math.log(max(self.average, _TINY) / reference)))
        if abs(error) <= self.dead_band:
            error = 0.0
            self.held = self.hold and reference == self.target
        previous, self.error = self.error, error
        if self.rule == "sign":
            change = math.copysign(self.gain, error) if error else 0.0
        else:
            updates = max(1.0, _in_steps("integral_time", self.integral_time, total_steps) / self.every)
            change = self.gain * (error - previous + error / updates)
        less = raises if self.raises is None else self.raises  # more weight raises the quantity: an excess needs less
        factor = self.factor * math.exp(-change if less else change)
        self.factor = max(self.minimum, min(self.maximum, factor))

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, in full precision."""
        return {name: getattr(self, name) for name in _CONTROLLER_STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another controller stopped."""
        for name in _CONTROLLER_STATE:
            setattr(self, name, state[name])


_TINY = 1e-12
_SHORTEST_RAMP = 100  # steps
_CONTROLLER_STATE = ("factor", "average", "first", "error", "held")


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
