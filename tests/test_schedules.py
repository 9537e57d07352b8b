"""Schedules: values at both ends and between, units of time, errors."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_reg.functional import activation_l1
from lightning_reg.schedules import (
    Constant,
    Cosine,
    Cubic,
    Linear,
    MultiStep,
    ProSparse,
    Schedule,
    TargetController,
    prosparse_stages,
)

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


# --- published stages in this library's units ------------------------------------------------------------------------


@pytest.mark.parametrize("table", PUBLISHED)
def test_published_stages_give_the_papers_penalty(table: str) -> None:
    """lambda * 1e-8 * sum of |x| over a micro-batch and all layers = weight * mean over sites of the mean of |x|."""
    tokens, width, layers = 13, 7, 3
    rng = np.random.default_rng(0)
    x = rng.normal(size=(layers, tokens, width))
    stages = prosparse_stages(table, tokens=tokens, width=width, layers=layers)
    assert [end for end, _ in stages] == [end for end, _ in PUBLISHED[table]]
    mean = torch.stack([activation_l1(torch.from_numpy(layer)) for layer in x]).mean().item()
    for (_, weight), (_, peak) in zip(stages, PUBLISHED[table]):
        assert weight * mean == pytest.approx(peak * 1e-8 * np.abs(x).sum(), rel=1e-12)
    fractions = prosparse_stages(table, tokens=tokens, width=width, layers=layers, fractions=True)
    last = PUBLISHED[table][-1][0]
    for step in range(0, last + 1, 97):
        assert ProSparse(fractions)(step, last) == pytest.approx(ProSparse(stages)(step), rel=1e-9)


def test_conversion_of_the_research_page() -> None:
    # 0.090 on the mean of one layer of the 7B model
    per_layer = prosparse_stages("7B", tokens=4096, width=11008, layers=1)[-1][1]
    assert per_layer == pytest.approx(0.0902, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": "70b"}, "`table` must be one of '1b', '7b', '13b', got '70b'"),
        ({"tokens": 0}, "`tokens` must be > 0, got 0"),
        ({"width": -1}, "`width` must be > 0"),
        ({"unit": 0.0}, "`unit` must be > 0"),
    ],
)
def test_bad_conversion_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prosparse_stages(**{"table": "7b", "tokens": 1, "width": 1, "layers": 1, **arguments})


# --- controller ------------------------------------------------------------------------------------------------------


def follow(controller: TargetController, steps: int, sensitivity: float, start: float = 0.5, leak: float = 0.0) -> list:
    """Density that a weight w shrinks at rate ``sensitivity * w`` and that grows at rate ``leak``."""
    density, seen = start, []
    for step in range(1, steps + 1):
        density = min(1.0, density * math.exp(leak - sensitivity * min(controller(step), 50.0)))
        controller.update(density, step, steps)
        seen.append(density)
    return seen


@pytest.mark.parametrize("target", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("sensitivity", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("steps", [600, 6000])
def test_controller_meets_its_target_without_knowing_the_model(target: float, sensitivity: float, steps: int) -> None:
    speed = 600 / steps
    seen = follow(TargetController(target), steps, sensitivity * speed, leak=0.002 * speed)
    assert seen[-1] == pytest.approx(target, rel=0.05)
    assert min(seen) > 0.85 * target


def test_controller_follows_a_geometric_ramp() -> None:
    controller = TargetController(0.1, ramp=100, warmup=20, smoothing=0.0)
    assert controller.reference(0) == 0.1  # nothing measured yet
    for step in range(1, 21):
        controller.update(0.4, step, 1000)
    assert [round(controller.reference(step), 6) for step in (20, 70, 120, 500)] == [0.4, 0.2, 0.1, 0.1]


def test_controller_law_by_hand() -> None:
    controller = TargetController(0.2, ramp=0, gain=2.0, integral_time=10, smoothing=0.5, dead_band=0.0, start=1.0)
    average, error, log_factor = None, 0.0, 0.0
    for step, measured in enumerate([0.3, 0.25, 0.1, 0.9, 0.2, 0.05], 1):
        controller.update(measured, step)
        average = measured if average is None else 0.5 * average + 0.5 * measured
        now = min(1.0, max(-1.0, math.log(average / 0.2)))
        log_factor += 2.0 * (now - error) + 2.0 * now / 10
        error = now
        assert controller(step) == pytest.approx(math.exp(log_factor), rel=1e-12)


def test_sign_rule_is_that_of_remoe() -> None:
    controller = TargetController(0.25, rule="sign", ramp=0, smoothing=0.0, dead_band=0.0, start=1.0)
    wanted = 1.0
    for step, density in enumerate([0.5, 0.4, 0.2, 0.1, 0.3], 1):
        sparsity, target = 1 - density, 0.75
        wanted = wanted * 1.2 if sparsity < target else wanted / 1.2
        controller.update(density, step)
        assert controller(step) == pytest.approx(wanted, rel=1e-12)


def test_quantity_that_grows_with_the_weight_is_steered_the_other_way() -> None:
    for arguments, raises in (({}, True), ({"raises": True}, False)):
        controller = TargetController(0.9, quantity="value", ramp=0, smoothing=0.0, start=1.0, **arguments)
        controller.update(0.5, 1, 100, raises=raises)
        assert controller(1) > 1.0
    controller = TargetController(0.9, quantity="value", raises=False, ramp=0, smoothing=0.0, start=1.0)
    controller.update(0.5, 1, 100, raises=True)
    assert controller(1) < 1.0


def test_nothing_winds_up_behind_a_limit() -> None:
    controller = TargetController(0.1, ramp=0, smoothing=0.0, start=1.0, minimum=0.5, maximum=2.0, integral_time=10)
    for step in range(1, 1000):
        controller.update(0.9, step)
    assert controller(0) == 2.0
    controller.update(0.1 * 0.9, 1000)
    assert controller(0) < 2.0
    for step in range(1001, 2000):
        controller.update(0.01, step)
    assert controller(0) == 0.5


def test_dead_band_warmup_and_hold() -> None:
    controller = TargetController(0.1, ramp=0, smoothing=0.0, dead_band=0.05, warmup=3, start=1.0, hold=True)
    for step in (1, 2):
        controller.update(0.9, step)
        assert controller(step) == 1.0
    controller.update(0.2, 3, 100)
    assert controller(3) > 1.0
    controller.update(0.102, 4, 100)
    frozen = controller(4)
    assert controller.held
    controller.update(0.9, 5, 100)
    assert controller(5) == frozen
    band = TargetController(0.1, ramp=0, smoothing=0.0, dead_band=0.05, start=1.0)
    band.update(0.104, 1, 100)
    assert band(1) == 1.0


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20), st.integers(1, 19))
def test_state_continues_a_controller_to_the_bit(values: list[float], cut: int) -> None:
    whole, first, second = (TargetController(0.2, ramp=5, integral_time=7) for _ in range(3))
    for step, value in enumerate(values, 1):
        whole.update(value, step)
    for step, value in enumerate(values[:cut], 1):
        first.update(value, step)
    second.load_state_dict(first.state_dict())
    for step, value in enumerate(values[cut:], cut + 1):
        second.update(value, step)
    assert second.state_dict() == whole.state_dict()
    second.reset()
    assert second.state_dict() == TargetController(0.2).state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "`target` must be a finite number > 0, got 0"),
        ({"target": 1.5}, r"`target` must be in \(0, 1\) for a density, got 1.5"),
        ({"target": float("nan")}, "`target` must be a finite number > 0, got nan"),
        ({"rule": "pid"}, "`rule` must be 'proportional' or 'sign', got 'pid'"),
        ({"gain": 0.0}, "`gain` must be finite and > 0, got 0.0"),
        ({"integral_time": 0}, "`integral_time` must be finite and > 0, got 0"),
        ({"minimum": 0.0}, "`minimum` must be finite and > 0"),
        ({"dead_band": -0.1}, "`dead_band` must be finite and >= 0, got -0.1"),
        ({"threshold": -1.0}, "`threshold` must be finite and >= 0"),
        ({"smoothing": 1.0}, r"`smoothing` must be in \[0, 1\), got 1.0"),
        ({"start": 1e9}, "`start` must be between `minimum` and `maximum`, 0.0001 and 10000.0, got 1000000000.0"),
        ({"every": 0}, "`every` must be an int >= 1, got 0"),
        ({"ramp": 1.5}, "`ramp` as a fraction of training must be <= 1"),
        ({"warmup": -1}, "`warmup` must be >= 0"),
    ],
)
def test_bad_controller_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetController(**{"target": 0.1, **arguments})


def test_controller_refuses_what_is_not_finite_and_unknown_lengths() -> None:
    with pytest.raises(ValueError, match="`density` is nan at step 3; a controller needs a finite number"):
        TargetController(0.1).update(float("nan"), 3, 10)
    with pytest.raises(ValueError, match="`warmup=0.5` is a fraction of training, but the number"):
        TargetController(0.1, warmup=0.5).update(0.5, 1)
