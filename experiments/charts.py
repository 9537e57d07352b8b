"""Small SVG charts for the report: they scale with the page, follow its colours, and need no library to be drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 24  # room for the numbers of the axes
MANY = 6  # series that a legend and a tooltip can list
GEOMETRY = [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, MANY]  # for the page's script


@dataclass(frozen=True)
class Series:
    """A line: ``colour`` is any CSS colour."""

    label: str
    points: Points
    colour: str


@dataclass(frozen=True)
class Chart:
    """A figure of the report: the drawing, its title, the lines for the legend, the numbers for the tooltip."""

    title: str
    svg: Markup
    legend: list[Series]
    data: dict[str, Any] | None


def line_chart(title: str, series: Sequence[Series], *, low: float | None = None, high: float | None = None) -> Chart:
    """Lines over optimizer steps.

    Args:
        title: What the vertical axis shows.
        series: Lines; those without points are left out.
        low: Lower end of the vertical axis, from the data when left out.
        high: Upper end, from the data when left out.
    """
    series = [line for line in series if line.points]
    steps = [step for line in series for step, _ in line.points] or [0.0]
    values = [value for line in series for _, value in line.points] or [0.0]
    y_ticks = ticks(min(values) if low is None else low, max(values) if high is None else high)
    x_ticks = ticks(min(*steps, 0.0), max(*steps, 1.0))
    # the last step is one less than a round number, which would lose its label
    right = x_ticks[-1] if max(steps) >= 0.97 * x_ticks[-1] else max(*steps, 1.0)
    frame = x_ticks[0], right, y_ticks[0], y_ticks[-1]
    lines = [_polyline(line, frame) for line in series]
    return Chart(
        title,
        Markup("").join([_open(title), *_grid(frame, x_ticks, y_ticks), *lines, _CURSOR, Markup("</svg>")]),
        list(series) if len(series) <= MANY else [],
        {"frame": frame, "series": [_rounded(line) for line in series]},
    )


def heat_map(title: str, rows: Sequence[str], columns: int) -> Chart:
    """Layers by heads, to be coloured by the page's script; ``rows`` are the labels, first layer on top."""
    wide = (WIDTH - LEFT - RIGHT) / max(1, columns)
    tall = min(wide, 34)
    height = tall * len(rows) + BOTTOM
    cells = [
        Markup('<g class="cell" data-row="{}" data-column="{}">'
               '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
               '<text x="{:.1f}" y="{:.1f}"></text></g>').format(
            row, column, LEFT + column * wide, row * tall, wide - 2, tall - 2,
            LEFT + (column + 0.5) * wide - 1, (row + 0.5) * tall + 2.5)
        for row in range(len(rows)) for column in range(columns)
    ]  # fmt: skip
    labels = [
        Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(LEFT - 6, (row + 0.5) * tall + 2.5, label)
        for row, label in enumerate(rows)
    ]
    heads = Markup('<text class="x" x="{:.1f}" y="{:.1f}">heads</text>').format(LEFT + columns * wide / 2, height - 8)
    opening = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(WIDTH, height, title)
    return Chart(title, Markup("").join([opening, *cells, *labels, heads, Markup("</svg>")]), [], None)


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that enclose [low, high], about ``wanted`` steps apart."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / wanted
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def layer_colour(index: int, count: int) -> str:
    """From blue at the input to red at the output, of a lightness that shows on white and on black."""
    return f"hsl({210 + round(140 * index / max(1, count - 1))} 65% 56%)"


def _open(title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)


def _grid(frame: tuple[float, ...], x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[Markup]:
    parts = []
    for tick in y_ticks:
        _, y = _place(frame[0], tick, frame)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
        )
        parts.append(Markup('<text class="y" x="{}" y="{:.1f}">{:g}</text>').format(LEFT - 6, y + 3.5, tick))
    for tick in x_ticks:
        if frame[0] <= tick <= frame[1]:
            x, _ = _place(tick, frame[2], frame)
            parts.append(Markup('<text class="x" x="{:.1f}" y="{}">{:g}</text>').format(x, HEIGHT - 8, tick))
    return parts


def _polyline(line: Series, frame: tuple[float, ...]) -> Markup:
    places = " ".join("{:.1f},{:.1f}".format(*_place(step, value, frame)) for step, value in line.points)
    return Markup('<polyline points="{}" style="stroke:{}"/>').format(places, line.colour)


def _place(step: float, value: float, frame: tuple[float, ...]) -> tuple[float, float]:
    x = LEFT + (step - frame[0]) / (frame[1] - frame[0]) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - (value - frame[2]) / (frame[3] - frame[2]) * (HEIGHT - TOP - BOTTOM)
    return x, y


def _rounded(line: Series) -> dict[str, Any]:
    points = [[step, float(f"{value:.4g}")] for step, value in line.points]
    return {"label": line.label, "colour": line.colour, "points": points}


_CURSOR = Markup('<line class="cursor" y1="{}" y2="{}" visibility="hidden"/>').format(TOP, HEIGHT - BOTTOM)
