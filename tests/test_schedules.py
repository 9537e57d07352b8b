"""Schedules: values at both ends and between, units of time, errors."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_reg.schedules import Constant, Cosine, Cubic, Linear, MultiStep, ProSparse, Schedule

RAMPS = [Linear, Cosine, Cubic]


def test_constant_holds() -> None:
    assert [Constant(0.3)(step) for step in (0, 1, 10**9)] == [0.3] * 3
    assert Constant()(5, total_steps=None) == 1.0


@pytest.mark.parametrize("kind", RAMPS)
def test_ramp_begins_and_ends_exactly(kind: type[Schedule]) -> None:
    schedule = kind(0.1, 0.7, begin=10, duration=20)
    assert [schedule(step) for step in (0, 9, 10)] == [0.1] * 3
    assert [schedule(step) for step in (30, 31, 10**9)] == [0.7] * 3
    assert schedule(20) == pytest.approx(0.625 if kind is Cubic else 0.4)


def test_linear_and_cosine_a_quarter_of_the_way() -> None:
    assert Linear(0.0, 1.0, duration=100)(25) == pytest.approx(0.25)
    assert Cosine(0.0, 1.0, duration=100)(25) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("start", [0.001, 0.1, 0.2])
@pytest.mark.parametrize("end", [0.0, 0.01])
def test_cosine_is_the_annealing_of_aem(start: float, end: float) -> None:
    total = 97
    schedule = Cosine(start, end)
    for step in range(total + 1):
        expected = end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2
        assert schedule(step, total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", RAMPS)
def test_fractions_are_steps_of_the_whole_training(kind: type[Schedule]) -> None:
    fraction, steps = kind(1.0, 0.2, begin=0.25, duration=0.5), kind(1.0, 0.2, begin=50, duration=100)
    assert [fraction(step, 200) for step in range(220)] == pytest.approx([steps(step) for step in range(220)])
    mixed = kind(1.0, 0.2, begin=50, duration=0.5)
    assert [mixed(step, 200) for step in range(220)] == pytest.approx([steps(step) for step in range(220)])


def test_default_duration_is_the_whole_training() -> None:
    assert Cosine()(0, 50) == 1.0
    assert Cosine()(25, 50) == pytest.approx(0.5)
    assert Cosine()(50, 50) == 0.0


@pytest.mark.parametrize("kind", RAMPS)
def test_no_steps_at_all_is_the_end(kind: type[Schedule]) -> None:
    assert kind(1.0, 0.0)(0, total_steps=0) == 0.0
    assert kind(1.0, 0.0, begin=5)(0, total_steps=0) == 1.0


def test_multistep_changes_at_its_milestones() -> None:
    schedule = MultiStep([10, 20], [0.0, 0.5, 0.2])
    assert [schedule(step) for step in (0, 9, 10, 19, 20, 10**9)] == [0.0, 0.0, 0.5, 0.5, 0.2, 0.2]
    fractions = MultiStep([0.1, 0.2], [0.0, 0.5, 0.2])
    assert [fractions(step, 100) for step in (0, 9, 10, 19, 20, 100)] == [0.0, 0.0, 0.5, 0.5, 0.2, 0.2]


@pytest.mark.parametrize(
    "schedule", [Cosine(), Linear(begin=0.5, duration=10), Linear(duration=0.3), MultiStep([0.5], [0, 1])]
)
@pytest.mark.parametrize("total", [None, math.inf, -1])
def test_unknown_length_is_refused_with_the_remedy(schedule: Schedule, total) -> None:
    with pytest.raises(
        ValueError, match="is a fraction of training, but the number of training steps is unknown: set "
    ):
        schedule(0, total)


def test_steps_need_no_length() -> None:
    assert Linear(duration=10)(5) == 0.5
    assert MultiStep([3], [0, 1])(3, math.inf) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Constant(-0.1), "`value` must be a finite number >= 0, got -0.1"),
        (lambda: Constant(math.nan), "`value` must be a finite number >= 0, got nan"),
        (lambda: Constant(math.inf), "`value` must be a finite number >= 0, got inf"),
        (lambda: Constant("1"), "`value` must be a finite number >= 0, got '1'"),
        (lambda: Linear(-1.0), "`start` must be a finite number >= 0, got -1.0"),
        (lambda: Linear(1.0, -1.0), "`end` must be a finite number >= 0, got -1.0"),
        (lambda: Linear(begin=-1), "`begin` must be >= 0, an int for steps or a float for a fraction .* got -1"),
        (lambda: Linear(begin=True), "`begin` must be >= 0, .* got True"),
        (lambda: Linear(duration=math.nan), "`duration` must be >= 0, .* got nan"),
        (lambda: Linear(duration="10"), "`duration` must be >= 0, .* got '10'"),
        (lambda: Cosine(duration=500.0), "`duration` as a fraction .* must be <= 1, got 500.0; write 500 for steps"),
        (lambda: Cosine(duration=0), "`duration` must be > 0, got 0; use `Constant`"),
        (lambda: Cosine(duration=0.0), "`duration` must be > 0, got 0; use `Constant`"),
        (lambda: Cosine(begin=0.25), r"`begin \+ duration` must be <= 1, got 0.25 \+ 1.0: .* `duration=0.75`"),
        (lambda: MultiStep([], [1]), "`milestones` must not be empty; use `Constant`"),
        (lambda: MultiStep([1], [1]), "`values` must have one entry more than `milestones`, got 1 for 1 milestones"),
        (lambda: MultiStep([1, 2], [0, 1, -1]), "`values` must be a finite number >= 0, got -1"),
        (lambda: MultiStep([-1], [0, 1]), "`milestones` must be >= 0"),
        (lambda: MultiStep([2, 2], [0, 1, 2]), r"`milestones` must increase .* got \[2, 2\]"),
        (lambda: MultiStep([1, 0.5], [0, 1, 2]), r"`milestones` must .* be all steps or all fractions, got \[1, 0.5\]"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(RAMPS), st.floats(0, 5), st.floats(0, 5), st.integers(0, 50), st.integers(1, 50))
def test_ramps_are_monotone_between_their_ends(kind, start: float, end: float, begin: int, duration: int) -> None:
    values = [kind(start, end, begin=begin, duration=duration)(step) for step in range(110)]
    assert min(start, end) - 1e-12 <= min(values)
    assert max(values) <= max(start, end) + 1e-12
    assert values == pytest.approx(sorted(values, reverse=end < start), abs=1e-12)


def test_cubic_is_that_of_gradual_pruning() -> None:
    schedule = Cubic(0.1, 0.8, begin=10, duration=40)
    for step in range(10, 51):
        assert schedule(step) == pytest.approx(0.8 + (0.1 - 0.8) * (1 - (step - 10) / 40) ** 3, abs=1e-12)
    assert schedule(1000) == 0.8


# Table 6 of the paper: accumulated steps and peaks
PUBLISHED = {
    "7B": [(5000, 0.0), (6000, 5e-3), (10000, 5e-2), (12000, 5e-2), (16000, 2e-1), (16500, 2e-1)],
    "13B": [(5500, 0.0), (6750, 5e-3), (10750, 1e-2), (11000, 1e-2), (15000, 2e-2), (16000, 2e-2)],
    "1B": [(10000, 0.0), (15000, 1e-3), (20000, 5e-3), (25000, 5e-3), (35000, 5e-2), (95000, 5e-2)],
}


def algorithm_1(stages: list[tuple[int, float]], t: int) -> float:
    """The paper's loops: stage 0, warm-up with the first peak, then a sine from peak to peak."""
    (end_of_0, zero), *rest = stages
    assert zero == 0
    if t <= end_of_0:
        return 0.0
    if t <= rest[0][0]:
        return rest[0][1]
    for (before, low), (end, high) in pairwise(rest):
        if before < t <= end:
            eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * (t - before) / (end - before)) + 1)
            return low + eta * (high - low)
    return rest[-1][1]


@pytest.mark.parametrize("size", PUBLISHED)
def test_prosparse_is_algorithm_1_at_every_step(size: str) -> None:
    stages = PUBLISHED[size]
    schedule, last = ProSparse(stages), stages[-1][0]
    wanted = [algorithm_1(stages, t) for t in range(last + 100)]
    assert [schedule(t) for t in range(last + 100)] == pytest.approx(wanted, abs=1e-15)
    assert schedule(10**9) == stages[-1][1]


def test_prosparse_in_fractions_agrees_with_steps() -> None:
    steps = ProSparse([(29, 0.0), (57, 0.1), (100, 0.3)])
    fractions = ProSparse([(0.29, 0.0), (0.57, 0.1), (1.0, 0.3)])
    assert [fractions(t, 100) for t in range(120)] == pytest.approx([steps(t) for t in range(120)], abs=1e-12)


def test_prosparse_without_stage_0_starts_at_the_first_peak() -> None:
    schedule = ProSparse([(10, 0.1), (20, 0.3)])
    assert [schedule(t) for t in (0, 10, 15, 20, 21)] == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one pair"),
        ([(1, 2, 3)], "at least one pair"),
        ([(100, 0.1), (50, 0.2)], r"ends > 0 that increase .* got \[100, 50\]"),
        ([(100, 0.1), (100, 0.2)], "ends > 0 that increase"),
        ([(0, 0.1)], "ends > 0 that increase"),
        ([(10, 0.1), (0.5, 0.2)], "all steps or all fractions"),
        ([(100, 0.2), (200, 0.1)], r"peaks that do not decrease, got \[0.2, 0.1\]"),
        ([(100, -0.2)], "finite number >= 0"),
        ([(1.5, 0.2)], "must be <= 1"),
    ],
)
def test_prosparse_refuses_bad_stages(stages: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"`stages`.*{message}"):
        ProSparse(stages)
