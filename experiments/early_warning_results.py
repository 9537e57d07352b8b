"""Which runs diverged, which were foretold: python -m experiments.early_warning_results <folder> [tuning seeds]."""

import csv
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_reg.early_warning import EarlyWarning
from lightning_reg.functional.logit_growth import fit_growth

AHEAD = 200  # steps before the divergence that a warning must come
MARGIN, SMOOTH = 0.1, 200  # nats, and steps of the mean: seven times its scatter from one such mean to the next
HEADER = (
    "setting",
    "rule",
    "diverge",
    "foretold",
    "lead, median (p10)",
    "do not",
    "false alarms",
    "step, median error",
)
AFTER = ("setting", "warned", "diverged", "passed 1e4", "false alarms end above", "diverged end above", "others")
Rule = Callable[[Sequence[float], Sequence[float]], tuple[float, float | None] | None]


@dataclass(frozen=True)
class Curves:
    """What was measured of ``runs`` (peak learning rate, seed): ``loss`` and ``max_logit`` (points, runs) at ``steps``.

    The loss is a mean over the steps since the point before; the largest logit is that of the step alone.
    """

    runs: list[tuple[float, int]]
    steps: Tensor
    loss: Tensor
    max_logit: Tensor


@dataclass(frozen=True)
class Outcome:
    """Of one run: when it diverged, when a rule warned, the step it named and the one at which 1e4 was passed."""

    rate: float
    seed: int
    diverged: float | None
    warned: float | None
    named: float | None = None
    passed: float | None = None


def write_curves(stem: Path, curves: Curves) -> None:
    """As ``<stem>_loss.csv`` and ``<stem>_max_logit.csv``: a line for each point, a column for each run."""
    for name, values, form in (("loss", curves.loss, ".3f"), ("max_logit", curves.max_logit, ".4g")):
        # the logits last and at once: where they are, the setting is done
        path = stem.with_name(f"{stem.name}_{name}.csv")
        with path.with_suffix(".part").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *(f"{rate:g}/{seed}" for rate, seed in curves.runs)])
            for step, row in zip(curves.steps.tolist(), values.tolist()):
                writer.writerow([step, *(format(value, form) for value in row)])
        path.with_suffix(".part").rename(path)


def read_curves(stem: Path) -> Curves:
    """What ``write_curves`` has written."""
    columns, tables = [], []
    for name in ("loss", "max_logit"):
        with stem.with_name(f"{stem.name}_{name}.csv").open(newline="") as file:
            columns, *rows = csv.reader(file)
        tables.append(torch.tensor([[float(cell) for cell in row] for row in rows], dtype=torch.float64))
    runs = [(float(rate), int(seed)) for rate, seed in (column.split("/") for column in columns[1:])]
    return Curves(runs, tables[0][:, 0].long(), tables[0][:, 1:], tables[1][:, 1:])


def divergence(steps: Tensor, loss: Tensor, *, margin: float = MARGIN, smooth: int = SMOOTH) -> float | None:
    """The step from which the smoothed loss stays above its own earlier minimum by more than ``margin``, to the end.

    Args:
        steps: Of the points (points,), evenly spaced.
        loss: Means since the point before (points,); what is not finite is above any minimum.
        margin: In nats.
        smooth: Steps of the mean that smooths.
    """
    count = max(1, round(smooth / float(steps[0])))
    if len(loss) < count:
        return None
    smoothed = torch.where(loss.isfinite(), loss, torch.inf).double().unfold(0, count, 1).mean(1)
    within = smoothed <= smoothed.cummin(0).values + margin
    # before the first finite mean there is no minimum to leave
    within &= smoothed.isfinite()
    if bool(within[-1]):
        return None
    last = int(within.nonzero()[-1]) if bool(within.any()) else -1
    return float(steps[count - 1 + last + 1])


def extrapolated(until: bool = True, stride: int = 1) -> Rule:
    """``EarlyWarning`` as it is, told the length of the training or not, on every ``stride``-th measurement."""

    def rule(steps: Sequence[float], values: Sequence[float]) -> tuple[float, float | None] | None:
        warning = EarlyWarning(until=int(steps[-1]) if until else None)
        for step, value in list(zip(steps, values))[stride - 1 :: stride]:
            named = warning.update(int(step), value)
            if named is not None:
                return step, named
        return None

    return rule


def above(level: float) -> Rule:
    """The usual alarm: the first measurement above a level."""
    return lambda steps, values: next(((step, None) for step, value in zip(steps, values) if value > level), None)


RULES: dict[str, Rule] = {
    "early warning": extrapolated(),
    "early warning, every 40 steps": extrapolated(stride=2),
    "early warning, end not known": extrapolated(until=False),
    "max logit > 100": above(1e2),
    "max logit > 1000": above(1e3),
    "max logit > 3000": above(3e3),
    "max logit > 10000": above(1e4),
}
RISING = {"rise", "rise_wide", "rise_deep"}  # the settings with a rising learning rate in which nothing bounds logits


def outcomes(curves: Curves, rule: Rule, tuning_seeds: Sequence[int] = (), margin: float = MARGIN) -> list[Outcome]:
    """Of every run whose seed is not among ``tuning_seeds``."""
    steps, found = [float(step) for step in curves.steps], []
    for column, (rate, seed) in enumerate(curves.runs):
        if seed not in tuning_seeds:
            values = curves.max_logit[:, column].tolist()
            warned, named = rule(steps, values) or (None, None)
            passed = next((step for step, value in zip(steps, values) if value >= 1e4), None)
            diverged = divergence(curves.steps, curves.loss[:, column], margin=margin)
            found.append(Outcome(rate, seed, diverged, warned, named, passed))
    return found


def summarise(found: Sequence[Outcome], ahead: float = AHEAD) -> tuple[str, ...]:
    """Runs that diverge, share warned of at least ``ahead`` steps before, lead; the others, share warned of."""
    diverging = [run for run in found if run.diverged is not None]
    others = [run for run in found if run.diverged is None]
    leads = [run.diverged - run.warned for run in diverging if run.diverged is not None and run.warned is not None]
    errors = [abs(run.named / run.passed - 1) for run in found if run.named and run.passed]
    return (
        str(len(diverging)), _share(sum(lead >= ahead for lead in leads), len(diverging)),
        f"{statistics.median(leads):.0f} ({_decile(leads):.0f})" if leads else "",
        str(len(others)), _share(sum(run.warned is not None for run in others), len(others)),
        f"{100 * statistics.median(errors):.0f} %" if errors else "",
    )  # fmt: skip


def consequences(curves: Curves, found: Sequence[Outcome]) -> tuple[str, ...]:
    """What became of the runs that were warned of, and by how much each kind ended above its seed's best run."""
    last = max(1, round(SMOOTH / float(curves.steps[0])))
    end = dict(zip(curves.runs, curves.loss[-last:].mean(0).tolist()))
    best = {seed: min(loss for (_, other), loss in end.items() if other == seed) for _, seed in curves.runs}

    def spread(runs: Sequence[Outcome]) -> str:
        above_best = [end[run.rate, run.seed] - best[run.seed] for run in runs]
        known = [loss if math.isfinite(loss) else math.inf for loss in above_best]
        return f"{statistics.median(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else ""

    warned = [run for run in found if run.warned is not None]
    diverged = [run for run in found if run.diverged is not None]
    return (
        str(len(warned)), str(sum(run.diverged is not None for run in warned)),
        str(sum(run.passed is not None for run in warned)),
        spread([run for run in warned if run.diverged is None]), spread(diverged),
        spread([run for run in found if run.warned is None and run.diverged is None]),
    )  # fmt: skip


def write_results(folder: Path, tuning_seeds: Sequence[int], info: Mapping[str, Any]) -> Path:
    """Write ``early_warning.md`` and ``early_warning.png`` into ``folder``, print the tables, and return its path."""
    names = [path.name.removesuffix("_max_logit.csv") for path in folder.glob("*_max_logit.csv")]
    curves = {name: read_curves(folder / name) for name in sorted(names, key=lambda name: (name not in RISING, name))}
    rows = table(curves, tuning_seeds)
    after = [
        (name, *consequences(own, outcomes(own, RULES["early warning"], tuning_seeds))) for name, own in curves.items()
    ]
    title = f"warned at least {AHEAD} steps before the loss leaves its minimum by {MARGIN} nats"
    lines = [f"- {key}: {value}" for key, value in info.items()]
    for header, body in ((HEADER, rows), (AFTER, after)):
        printed = Table(*header, title=title if header is HEADER else "after the early warning")
        for row in body:
            printed.add_row(*row)
        Console(width=150).print(printed)
        lines += ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in body]
    (folder / "early_warning.md").write_text("\n".join(lines) + "\n")
    draw(curves, tuning_seeds, folder / "early_warning.png")
    return folder / "early_warning.md"


def table(curves: Mapping[str, Curves], tuning_seeds: Sequence[int]) -> list[tuple[str, ...]]:
    """A line for each setting and rule; first of all settings together in which the rate rises and nothing bounds."""
    rows = []
    pooled: dict[str, list[Outcome]] = {rule: [] for rule in RULES}
    for name, own in curves.items():
        for rule, apply in RULES.items():
            found = outcomes(own, apply, tuning_seeds)
            rows.append((name, rule, *summarise(found)))
            if name in RISING:
                pooled[rule] += found
    if len(RISING & curves.keys()) > 1:
        rows = [("all that rise", rule, *summarise(found)) for rule, found in pooled.items()] + rows
    return rows


def draw(curves: Mapping[str, Curves], tuning_seeds: Sequence[int], path: Path) -> None:
    """Largest logit over steps, log-log, with the fit at each warning; the loss below; one seed of each setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = min(3, len(curves))
    rows = 2 * math.ceil(len(curves) / wide)
    figure, axes = plt.subplots(rows, wide, figsize=(4.3 * wide, 3.1 * rows), layout="constrained", squeeze=False)
    for index, (name, own) in enumerate(curves.items()):
        upper, lower = axes[2 * (index // wide) : 2 * (index // wide) + 2, index % wide]
        seeds = sorted({seed for _, seed in own.runs} - set(tuning_seeds)) or sorted({seed for _, seed in own.runs})
        found = {(run.rate, run.seed): run for run in outcomes(own, RULES["early warning"])}
        rates = sorted({rate for rate, seed in own.runs if seed == seeds[0]})
        for shade, rate in enumerate(rates):
            color = plt.get_cmap("viridis")(shade / max(1, len(rates) - 1) * 0.92)
            _draw_run((upper, lower), own, own.runs.index((rate, seeds[0])), found[rate, seeds[0]], color)
        upper.axhline(1e4, color="0.5", linewidth=0.8, linestyle="--")
        upper.set(title=f"{name}, seed {seeds[0]}", xscale="log", yscale="log", ylabel="largest attention logit")
        lower.set(xlabel="step", xscale="log", ylim=(1.0, 3.6), ylabel=f"loss, mean of {SMOOTH} steps")
        lower.sharex(upper)
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    for index in range(len(curves), wide * rows // 2):
        for axis in axes[2 * (index // wide) : 2 * (index // wide) + 2, index % wide]:
            axis.set_axis_off()
    axes[0, 0].legend(title="peak learning rate", frameon=False, fontsize=7)
    marks = "▲ warned, dotted: the fit up to where it crosses 10⁴; ✕ diverged: the loss leaves its minimum for good"
    figure.supxlabel(marks, fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_run(axes: tuple[Any, Any], curves: Curves, column: int, run: Outcome, color: Any) -> None:
    steps, logits = curves.steps.double(), curves.max_logit[:, column]
    count = min(len(steps), max(1, round(SMOOTH / float(steps[0]))))
    loss = curves.loss[:, column].unfold(0, count, 1).mean(1)
    axes[0].plot(steps, logits, color=color, linewidth=1.2, label=f"{run.rate:g}")
    axes[1].plot(steps[count - 1 :], loss, color=color, linewidth=1.2)
    for axis, points, values in ((axes[0], steps, logits), (axes[1], steps[count - 1 :], loss)):
        for step, mark in ((run.warned, "^"), (run.diverged, "x")):
            if step is not None and bool((points == step).any()):
                axis.plot([step], [float(values[points == step])], mark, color=color, markersize=7, zorder=3)
    if run.warned is not None and run.named is not None:
        known = steps <= run.warned
        level, growth, bend, _ = fit_growth(steps[known], logits[known])
        x = torch.linspace(math.log(0.5), math.log(run.named / run.warned) + 1e-6, 50)
        axes[0].plot(run.warned * x.exp(), (level + growth * x + bend * x**2).exp(), ":", color=color, linewidth=1.6)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} % ({part})" if whole else ""


def _decile(values: Sequence[float]) -> float:
    """The value that nine in ten are not below."""
    return sorted(values)[math.floor(len(values) / 10)]


if __name__ == "__main__":
    write_results(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]], {})
