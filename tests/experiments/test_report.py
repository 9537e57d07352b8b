"""Pieces of the report: axes, colours, names, the verdict."""

import pytest

from experiments.charts import Series, heat_map, layer_colour, line_chart, ticks
from experiments.progress import short_name
from experiments.report import short_names
from experiments.runs import Arm
from experiments.summary import verdict


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 597, [0, 200, 400, 600]),
        (3, 3, [1, 2, 3, 4, 5]),
        (-0.1, 0, [-0.1, -0.075, -0.05, -0.025, 0]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_of_nothing_is_still_a_chart() -> None:
    chart = line_chart("empty", [Series("none", [], "red")])
    assert chart.legend == []
    assert "<polyline" not in chart.svg


def test_points_lie_inside_the_drawing() -> None:
    chart = line_chart("loss", [Series("a", [(0, 2.5), (599, 0.01)], "red")])
    first, last = (tuple(map(float, pair.split(","))) for pair in chart.svg.split('points="')[1].split('"')[0].split())
    assert 0 <= first[0] < last[0] <= 360
    assert 0 <= first[1] < last[1] <= 210


def test_labels_are_escaped() -> None:
    assert "<b>" not in line_chart("<b>", [Series("a", [(0, 1)], "red")]).svg
    assert "<b>" not in heat_map("map", ["<b>"], 2).svg


def test_layers_differ_in_colour() -> None:
    assert len({layer_colour(index, 12) for index in range(12)}) == 12


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (["net.blocks.0.attn", "net.blocks.1.attn"], ["layer 0", "layer 1"]),
        (["net.head", "net.blocks.0.attn.qkv"], ["head", "blocks.0.attn.qkv"]),
        (["encoder"], ["encoder"]),
        ([], []),
    ],
)
def test_site_names_lose_what_they_share(sites: list[str], expected: list[str]) -> None:
    assert short_names(sites) == expected


def scored(**accuracies: float) -> dict:
    return {"arms": {name: {"test/accuracy": value, "test_images": 360.0} for name, value in accuracies.items()}}


def test_the_verdict_says_when_regularization_hurts() -> None:
    arms = {
        name: {"test/accuracy": value, "test_images": 360.0} for name, value in (("regularized", 0.8), ("plain", 0.95))
    }
    text = verdict({"arms": arms})
    assert "54 images fewer right than" in text
    assert "beyond the noise" in text


def test_the_verdict_does_not_sell_noise() -> None:
    arms = {
        name: {"test/accuracy": value, "test_images": 360.0} for name, value in (("regularized", 0.96), ("plain", 0.95))
    }
    assert "within the noise" in verdict({"arms": arms})


def test_an_arm_averages_heads_then_sites() -> None:
    arm = Arm("plain", {}, [{"step": 1, "attention_entropy": {"a": [0.0, 1.0], "b": [1.0]}}])
    assert arm.mean("attention_entropy") == [(1, 0.75)]
    assert arm.mean("spectral_norm") == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("reg/attention_entropy/value", "attention_entropy"),
        ("reg/activation_density/mean_active", "activation_density"),
        ("train/loss", "loss"),
        ("val/accuracy", "val/accuracy"),
    ],
)
def test_the_progress_bar_has_short_names(name: str, shown: str) -> None:
    assert short_name(name) == shown
