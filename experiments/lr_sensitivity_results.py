"""The learning-rate sweep as table, curves and page; reads the folder of a sweep or the CSV written from one."""

import csv
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.resolvers import NONE
from lightning_reg.functional import lr_sensitivity

FILE = "run.json"  # of each run
NAME = "lr_sensitivity"  # of what is written
HEADER = ("remedy", "LR sensitivity", "- none", "best loss", "at LR", "runs that learnt nothing", "seeds")
# told apart by colour-blind readers too; black is no remedy
BEFORE = "before training; losses above count as this"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
MARKERS = "sD^vP*X<"


@dataclass(frozen=True)
class Run:
    """One training; ``final_loss`` is NaN where it diverged."""

    remedy: str
    learning_rate: float
    seed: int
    initial_loss: float
    final_loss: float
    steps: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def learnt(self) -> bool:
        """Whether the loss is below the initial one."""
        return self.final_loss < self.initial_loss

    @property
    def bounded(self) -> float:
        """Final loss, or the initial one where nothing was learnt."""
        return self.final_loss if self.learnt else self.initial_loss


@dataclass(frozen=True)
class Curve:
    """A remedy: its runs by learning rate, and by seed the sensitivity and the best loss where the grid is complete."""

    remedy: str
    points: dict[float, list[Run]]
    sensitivity: dict[int, float]
    best: dict[int, float]
    incomplete: list[int]

    @property
    def mean(self) -> float:
        """Sensitivity over seeds; infinite without a complete one."""
        return statistics.mean(self.sensitivity.values()) if self.sensitivity else math.inf

    def losses(self) -> list[tuple[float, float, float, float]]:
        """Learning rate, and mean, smallest and largest loss over seeds."""
        rows = [(rate, [run.bounded for run in runs]) for rate, runs in sorted(self.points.items())]
        return [(rate, statistics.mean(losses), min(losses), max(losses)) for rate, losses in rows]


def write_results(paths: Sequence[Path]) -> Path:
    """Write CSV, table, picture and page beside the first path, print the table, and return the table's path.

    Raises:
        FileNotFoundError: If there is no finished run.
    """
    runs, info = read(paths)
    curves = summarise(runs)
    first = paths[0]
    target = first / NAME if first.is_dir() else first.with_suffix("")
    write_csv(runs, target.with_suffix(".csv"))
    rows, notes = table(curves), remarks(curves)
    terminal = Table(*HEADER, title="mean and 95 % interval over seeds, nats")
    for row in rows:
        terminal.add_row(*row)
    console = Console(width=130)
    console.print(terminal)
    for note in notes:
        console.print(note, highlight=False)
    text = [f"- {key}: {value}" for key, value in info.items()]
    text += ["", f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}", *(f"| {' | '.join(row)} |" for row in rows)]
    text += ["", *notes, "", f"![loss over learning rate]({target.name}.png)"]
    target.with_suffix(".md").write_text("\n".join(text).lstrip("\n") + "\n")
    draw(curves, target.with_suffix(".png"))
    draw_page(curves, target.with_suffix(".html"))
    console.print(f"Curves: {target}.png, {target}.html", highlight=False, soft_wrap=True)
    return target.with_suffix(".md")


def read(paths: Iterable[Path]) -> tuple[list[Run], dict[str, str]]:
    """Runs of folders and CSV files, and where they come from; the last one of a remedy, rate and seed counts."""
    runs: dict[tuple[str, float, int], Run] = {}
    info: dict[str, dict[str, None]] = {}
    for path in paths:
        for row in _rows(path):
            for key, value in row.pop("info", {}).items():
                info.setdefault(key, {})[value] = None
            run = _run(row)
            runs[run.remedy, run.learning_rate, run.seed] = run
    if not runs:
        names = ", ".join(str(path) for path in paths)
        raise FileNotFoundError(f"There is no finished run in {names}: give the folder of a sweep, or a CSV of one.")
    ordered = sorted(runs.values(), key=lambda run: (run.remedy != NONE, run.remedy, run.seed, run.learning_rate))
    return ordered, {key: "; ".join(values) for key, values in info.items()}


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """One line a run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Run)])
        writer.writeheader()
        writer.writerows(asdict(run) for run in runs)


def summarise(runs: Sequence[Run]) -> list[Curve]:
    """A curve for each remedy, the least sensitive first.

    A seed counts where it has every learning rate that any run has.
    """
    grid = sorted({run.learning_rate for run in runs})
    curves = []
    for remedy in dict.fromkeys(run.remedy for run in runs):
        own = [run for run in runs if run.remedy == remedy]
        seeds = {seed: [run for run in own if run.seed == seed] for seed in sorted({run.seed for run in own})}
        complete = {seed: of_seed for seed, of_seed in seeds.items() if len(of_seed) == len(grid)}
        curves.append(
            Curve(
                remedy,
                {rate: [run for run in own if run.learning_rate == rate] for rate in grid if _has(own, rate)},
                {seed: _sensitivity(of_seed) for seed, of_seed in complete.items()},
                {seed: min(run.bounded for run in of_seed) for seed, of_seed in complete.items()},
                [seed for seed in seeds if seed not in complete],
            )
        )
    return sorted(curves, key=lambda curve: curve.mean)


def table(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """A row for each remedy, as ``HEADER`` says."""
    plain = next((curve for curve in curves if curve.remedy == NONE), None)
    rows = []
    for curve in curves:
        shared = [seed for seed in curve.sensitivity if plain and plain is not curve and seed in plain.sensitivity]
        every = [run for runs in curve.points.values() for run in runs]
        failed = [run for run in every if not run.learnt]
        endless = sum(not math.isfinite(run.final_loss) for run in failed)
        rows.append((
            curve.remedy, spread(curve.sensitivity.values()),
            spread([curve.sensitivity[seed] - plain.sensitivity[seed] for seed in shared] if plain else [], sign="+"),
            spread(curve.best.values()), f"{min(curve.losses(), key=lambda point: point[1])[0]:g}",
            f"{len(failed)} of {len(every)}" + (f" ({endless} not finite)" if endless else ""),
            str(len(curve.sensitivity)),
        ))  # fmt: skip
    return rows


def remarks(curves: Sequence[Curve]) -> list[str]:
    """What the table leaves out."""
    return [
        f"{curve.remedy}: left out of the metric, because learning rates are missing: seed "
        f"{', '.join(map(str, curve.incomplete))}."
        for curve in curves
        if curve.incomplete
    ]


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean and half the 95 % interval of Student's t over seeds; without an interval for a single one."""
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.4f}"
    if len(values) == 1:
        return mean
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.4f}"


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Loss over learning rate, log-log: means over seeds, bands from the smallest to the largest, the initial loss."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.add_subplot()
    for remedy, (colour, marker) in styles(curves).items():
        curve = next(curve for curve in curves if curve.remedy == remedy)
        rates, means, low, high = zip(*curve.losses())
        label = remedy if not curve.sensitivity else f"{remedy} ({curve.mean:.3f})"
        axis.plot(rates, means, marker=marker, markersize=5, color=colour, label=label, linewidth=1.5)
        axis.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(initial(curves), color="black", linestyle="--", linewidth=1, label=BEFORE)
    axis.set(xscale="log", yscale="log", xlabel="peak learning rate", ylabel="final validation loss, nats")
    axis.grid(alpha=0.3, which="both")
    # 0.6, 1 and 2 nats, not powers of ten
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(ScalarFormatter())
    figure.legend(loc="outside right upper", frameon=False, title="remedy (LR sensitivity)")
    figure.savefig(path, dpi=150)


def draw_page(curves: Sequence[Curve], path: Path) -> None:
    """The curves as one HTML file that opens from disk, with the numbers of every point."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for remedy, (colour, _) in styles(curves).items():
        curve = next(curve for curve in curves if curve.remedy == remedy)
        rates, means, low, high = (list(column) for column in zip(*curve.losses()))
        band = {"legendgroup": remedy, "showlegend": False, "hoverinfo": "skip", "mode": "lines", "line": {"width": 0}}
        figure.add_scatter(x=rates, y=low, **band)
        figure.add_scatter(x=rates, y=high, fill="tonexty", fillcolor=_faint(colour), **band)
        failed = [sum(not run.learnt for run in curve.points[rate]) for rate in rates]
        figure.add_scatter(
            x=rates, y=means, name=remedy, legendgroup=remedy, line={"color": colour},
            customdata=list(zip(low, high, failed)), mode="lines+markers",
            hovertemplate="%{y:.4f} (%{customdata[0]:.4f} to %{customdata[1]:.4f}), %{customdata[2]} learnt nothing",
        )  # fmt: skip
    rates = sorted({rate for curve in curves for rate, *_ in curve.losses()})
    # a line of its own: plotly places the annotation of `add_hline` as if the axis were linear
    figure.add_scatter(
        x=[rates[0], rates[-1]], y=[initial(curves)] * 2, name=BEFORE, mode="lines",
        hoverinfo="skip",
        line={"color": "black", "dash": "dash"},
    )  # fmt: skip
    figure.update_layout(
        template="plotly_white", hovermode="x unified", title="Final validation loss over the peak learning rate",
    )  # fmt: skip
    figure.update_xaxes(type="log", title="peak learning rate")
    figure.update_yaxes(type="log", title="final validation loss, nats")
    figure.write_html(path, include_plotlyjs=True)


def styles(curves: Sequence[Curve]) -> dict[str, tuple[str, str]]:
    """Colour and marker by remedy, the same whatever the order of the curves."""
    named = sorted(curve.remedy for curve in curves if curve.remedy != NONE)
    given = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(named)}
    return ({NONE: ("black", "o")} if len(named) < len(curves) else {}) | given


def initial(curves: Sequence[Curve]) -> float:
    """Mean loss before training, of the plain model where it was run."""
    chosen = [curve for curve in curves if curve.remedy == NONE] or curves
    return statistics.mean(run.initial_loss for curve in chosen for runs in curve.points.values() for run in runs)


def _sensitivity(runs: Sequence[Run]) -> float:
    losses = torch.tensor([run.bounded for run in runs], dtype=torch.float64)
    return float(lr_sensitivity(losses, max(run.initial_loss for run in runs)))


def _has(runs: Sequence[Run], rate: float) -> bool:
    return any(run.learning_rate == rate for run in runs)


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        return [json.loads(file.read_text()) for file in sorted(path.rglob(FILE))]
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _run(row: Mapping[str, Any]) -> Run:
    kinds = {"remedy": str, "error": str, "seed": int, "steps": int}
    final = math.nan if row["final_loss"] is None else row["final_loss"]
    given = {**row, "final_loss": final}
    return Run(**{field.name: kinds.get(field.name, float)(given[field.name]) for field in fields(Run)})


def _faint(colour: str) -> str:
    if colour == "black":
        return "rgba(0, 0, 0, 0.12)"
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.12)"
