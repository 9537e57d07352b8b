"""The comparison of the arms, as rows for the terminal and for the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.measure import SMALL
from experiments.runs import Arm

NEXT = (
    "make train EXPERIMENT=fashion_mnist",
    'make train ARGS="seed=1"',
    'make train ARGS="callbacks.deft.weight=1 callbacks.aem.weight=0"',
    'make train ARGS="sweep=density"',
)


@dataclass(frozen=True)
class Row:
    """One quantity for every arm; ``note`` says how it was measured."""

    label: str
    values: list[str]
    note: str


def comparison(summary: dict[str, Any], arms: Sequence[Arm]) -> list[Row]:
    """Rows in the order of interest; quantities that no arm has are left out."""
    scores = [summary["arms"][arm.name] for arm in arms]
    images = int(scores[0].get("test_images", 0))
    last = [arm.monitor[-1] if arm.monitor else {} for arm in arms]
    entropies = [[value for heads in line.get("attention_entropy", {}).values() for value in heads] for line in last]
    norms = [list(line.get("spectral_norm", {}).values()) for line in last]
    size = f"above {SMALL:g} RMS of the layer, on test images"
    rows = [
        Row("test accuracy", [_percent(s.get("test/accuracy")) for s in scores], f"{images} images never trained on"),
        Row("test loss", [_number(s.get("test/loss")) for s in scores], "without penalties"),
        Row("attention entropy", [_number(_mean(e)) for e in entropies], "mean of all heads, 1 = uniform, last step"),
        Row("of the lowest head", [_number(min(e, default=None)) for e in entropies], "0 = one key has all the weight"),
        Row("activation density", [_percent(s.get("density/exact")) for s in scores], "not exactly 0, on test images"),
        Row("density by size", [_percent(s.get("density/thresholded")) for s in scores], size),
        Row(
            "spectral norm", [_number(max(n, default=None)) for n in norms], "largest of all weights in use, last step"
        ),
        Row("training", [f"{s['seconds']:.0f} s" for s in scores], "validation and logging included"),
        Row("time per step", _step_times(summary, arms), _timing_note(summary)),
    ]
    return [row for row in rows if any(value != "-" for value in row.values)]


def verdict(summary: dict[str, Any]) -> str:
    """What the difference in accuracy is worth, in one sentence."""
    scores = summary["arms"]
    if not {"regularized", "plain"} <= set(scores) or "test/accuracy" not in scores["plain"]:
        return ""
    ours, plain, images = (scores["regularized"]["test/accuracy"], scores["plain"]["test/accuracy"],
                           int(scores["plain"]["test_images"]))  # fmt: skip
    more = round(images * (ours - plain))
    noise = math.sqrt((ours * (1 - ours) + plain * (1 - plain)) / images)
    direction = (
        "as many images right as" if more == 0 else f"{abs(more)} images {'more' if more > 0 else 'fewer'} right than"
    )
    weight = "within" if abs(ours - plain) <= 2 * noise else "beyond"
    return (
        f"The regularized arm gets {direction} the plain one, of {images}. That is {weight} the noise of a test set of "
        f"this size (two standard errors: {200 * noise:.1f} points), and it is one seed."
    )


def print_summary(summary: dict[str, Any], arms: Sequence[Arm], report: Path) -> None:
    """The table, the verdict, and where to go next."""
    console = Console(width=110)
    table = Table(
        "", *(arm.name for arm in arms), "how it was measured", title=f"{summary['name']}, seed {summary['seed']}"
    )
    for row in comparison(summary, arms):
        table.add_row(row.label, *row.values, row.note)
    console.print(table)
    console.print(verdict(summary), highlight=False)
    console.print(f"\nReport, opens in any browser: [bold]{report}[/bold]", highlight=False, soft_wrap=True)
    console.print("Try next:\n  " + "\n  ".join(NEXT), highlight=False, soft_wrap=True)


def _step_times(summary: dict[str, Any], arms: Sequence[Arm]) -> list[str]:
    overhead = summary["overhead"]
    if overhead is None:
        return ["-"] * len(arms)
    ratio = f"x{overhead['median']:.2f}"
    return [ratio if arm.name == "regularized" else f"{overhead['plain_ms']:.1f} ms" for arm in arms]


def _timing_note(summary: dict[str, Any]) -> str:
    overhead = summary["overhead"]
    if overhead is None:
        return ""
    return (
        f"whole Trainer step without monitor; {overhead['rounds']} alternating blocks of {overhead['steps']} steps, "
        f"20 to 80 %: x{overhead['low']:.2f} to x{overhead['high']:.2f}"
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
