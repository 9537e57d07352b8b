"""The learning-rate sweep as table, curves and page; reads the folder of a sweep or the CSV written from one."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.early_warning_results import MARGIN, Outcome, divergence
from experiments.early_warning_results import summarise as score
from experiments.evidence import read_whole
from experiments.resolvers import NONE
from lightning_reg.early_warning import EarlyWarning
from lightning_reg.functional import lr_sensitivity

FILE = "run.json"  # of each run
NAME = "lr_sensitivity"  # of what is written
HEADER = ("remedy", "LR sensitivity", "- none", "best loss", "at LR", "runs that learnt nothing", "seeds")
SMOOTH, AHEAD = 0.1, 0.05  # of the steps: the mean that must leave its minimum, and how early a warning must come
WATCHED = ("remedy", "diverge", "max logit there", "lowest entropy there", "max logit of the others", "foretold",
           "lead, median (p10)", "do not", "false alarms")  # fmt: skip
EXPLAINED = (
    f"Diverged: the training loss, a mean over {100 * SMOOTH:g} % of the steps, stays over {MARGIN:g} nats above its",
    "own minimum to the end. *There*: at that step, median and range over runs; *of the others*: at the end. Entropy",
    "is that of the lowest head, 1 is uniform over the visible keys. Logits are the largest of sampled rows. The",
    f"warning is that of `StabilityMonitor`; foretold: at least {100 * AHEAD:g} % of the steps before; lead in steps.",
)
# told apart by colour-blind readers too; black is no remedy
BEFORE = "before training; losses above count as this"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
MARKERS = "sD^vP*X<"


@dataclass(frozen=True)
class Run:
    """One training; ``final_loss`` is NaN where it ended in no number.

    Those from ``watched`` on come from its trace: whether it has one; the step at which the loss left its minimum for
    good; the largest attention logit, and the normalised entropy of the lowest head, at that step, or at the end where
    there was none; the steps at which ``EarlyWarning`` warned, that it named, and at which 1e4 was passed.
    """

    remedy: str
    learning_rate: float
    seed: int
    initial_loss: float
    final_loss: float
    steps: int = 0
    seconds: float = 0.0
    error: str = ""
    watched: bool = False
    diverged: float | None = None
    logit: float | None = None
    entropy: float | None = None
    warned: float | None = None
    named: float | None = None
    passed: float | None = None

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
    watched = watch_table(runs)
    if watched:
        terminal = Table(*WATCHED, title="divergence, and the early warning of it")
        for row in watched:
            terminal.add_row(*row)
        console.print(terminal)
    for note in notes:
        console.print(note, highlight=False)
    text = [f"- {key}: {value}" for key, value in info.items()]
    text += ["", f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}", *(f"| {' | '.join(row)} |" for row in rows)]
    if watched:
        text += ["", *EXPLAINED, "", f"| {' | '.join(WATCHED)} |", f"|{' --- |' * len(WATCHED)}"]
        text += [f"| {' | '.join(row)} |" for row in watched]
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


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """What the finished runs of a sweep wrote; a broken file is named on the console and left out."""
    return [row for _, row in read_whole(folder.rglob(FILE), {"remedy", "learning_rate", "seed", "final_loss"})]


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


def watch_table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for each remedy with traces, as ``WATCHED`` says, and one of all; leads are in steps."""
    traced = [run for run in runs if run.watched]
    remedies = list(dict.fromkeys(run.remedy for run in traced))
    groups = {remedy: [run for run in traced if run.remedy == remedy] for remedy in remedies}
    return [_watch_row(*group) for group in ({**groups, "all": traced} if len(groups) > 1 else groups).items()]


def _watch_row(remedy: str, runs: Sequence[Run]) -> tuple[str, ...]:
    diverged = [run for run in runs if run.diverged is not None]
    others = [run for run in runs if run.diverged is None]
    found = [Outcome(r.learning_rate, r.seed, r.diverged, r.warned, r.named, r.passed) for r in runs]
    count, foretold, lead, do_not, false, _ = score(found, ahead=AHEAD * max(run.steps for run in runs))
    return (
        remedy, count, _middle([run.logit for run in diverged], "g"), _middle([run.entropy for run in diverged], "f"),
        _middle([run.logit for run in others], "g"), foretold, lead, do_not, false,
    )  # fmt: skip


def _middle(values: Iterable[float | None], form: str) -> str:
    """Median and range; what is not finite is the largest."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.median(known):.3{form}} ({min(known):.3{form}} to {max(known):.3{form}})"


def read_trace(trace: Mapping[str, Sequence[float | None]], steps: int) -> dict[str, Any]:
    """What a run's trace says, by the fields of ``Run``; ``steps`` is the planned length of the training."""
    places = [float(step) for step in trace["step"] if step is not None]
    if not places:
        return {}
    losses = torch.tensor([math.inf if loss is None else loss for loss in trace["loss"]], dtype=torch.float64)
    left = divergence(torch.tensor(places), losses, smooth=max(1, round(SMOOTH * steps)))
    # a training that ended early, before a mean could be taken, ended with no number
    diverged = places[-1] if left is None and places[-1] < steps and not math.isfinite(losses[-1]) else left
    warning, warned, named = EarlyWarning(until=steps), None, None
    known = [(step, logit) for step, logit in zip(places, trace["max_logit"]) if logit is not None]
    for step, logit in known:
        crossing = warning.update(int(step), logit)
        if warned is None and crossing is not None:
            warned, named = step, crossing
    at = len(places) - 1 if diverged is None else places.index(diverged)
    return {
        "watched": True, "diverged": diverged, "logit": _last(trace["max_logit"][: at + 1]),
        "entropy": _last(trace["entropy_min"][: at + 1]), "warned": warned, "named": named,
        "passed": next((step for step, logit in known if logit >= 1e4), None),
    }  # fmt: skip


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


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
        return read_runs(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _run(row: Mapping[str, Any]) -> Run:
    kinds: dict[str, Callable[[Any], Any]] = {"remedy": str, "error": str, "seed": int, "steps": int}
    kinds["watched"] = lambda value: str(value) == "True"
    final = math.nan if row["final_loss"] is None else row["final_loss"]
    given = {**row, "final_loss": final}
    if "trace" in row:
        given |= read_trace(row["trace"], row["settings"]["trainer"]["max_steps"])
    # an older file has no traces, and an empty cell is None
    known = {field.name: given[field.name] for field in fields(Run) if given.get(field.name) is not None}
    known = {name: value for name, value in known.items() if value != "" or name == "error"}
    return Run(**{name: kinds.get(name, float)(value) for name, value in known.items()})


def _faint(colour: str) -> str:
    if colour == "black":
        return "rgba(0, 0, 0, 0.12)"
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.12)"
