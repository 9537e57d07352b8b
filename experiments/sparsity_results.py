"""The comparison of ways to sparsity as a table and a picture: python -m experiments.sparsity_results <csv> ...."""

import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEADER = ("arm", "strength", "loss", "density", "loss, shifted", "density, shifted", "dead neurons", "time")


def write_results(paths: Sequence[Path], info: Mapping[str, Any]) -> Path:
    """Write ``sparsity.md`` and ``sparsity.png`` beside the first file, print the table, and return its path."""
    rows = summarise([row for path in paths for row in _read(path)])
    folder = paths[0].parent
    table = Table(*HEADER, title="loss in nats per byte and density, mean ± deviation over seeds")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)
    lines = [f"- {key}: {value}" for key, value in info.items()]
    lines += ["", f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    (folder / "sparsity.md").write_text("\n".join(lines) + "\n")
    draw([row for path in paths for row in _read(path)], folder / "sparsity.png")
    return folder / "sparsity.md"


def summarise(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """A line for each arm and strength: mean and deviation over seeds; time relative to plain ReLU."""
    groups: dict[tuple[str, float], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["arm"], float(row["strength"])].append(row)
    seconds = {row["seed"]: float(row["seconds"]) for row in rows if row["arm"] == "relu"}
    table = []
    for (arm, strength), group in groups.items():
        ratios = [float(row["seconds"]) / seconds[row["seed"]] for row in group if row["seed"] in seconds]
        table.append((
            arm, f"{strength:g}" if strength else "", _spread(group, "loss", 4), _spread(group, "density", 1, 100),
            _spread(group, "shifted_loss", 4), _spread(group, "shifted_density", 1, 100),
            _spread(group, "dead", 1, 100), f"x{statistics.median(ratios):.2f}" if ratios else "",
        ))  # fmt: skip
    return table


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Loss over density, a point for each run and a line through the means of each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for index, arm in enumerate(arms):
        own = [row for row in rows if row["arm"] == arm]
        strengths = sorted({float(row["strength"]) for row in own})
        means = [
            [statistics.mean(float(r[key]) for r in own if float(r["strength"]) == s) for s in strengths]
            for key in ("density", "loss")
        ]
        axis.plot(*means, marker="o", color=f"C{index}", label=arm, linewidth=1.5)
        axis.scatter(
            [float(r["density"]) for r in own], [float(r["loss"]) for r in own], s=10, color=f"C{index}", alpha=0.5
        )
    axis.set(xscale="log", xlabel="density of the MLP activations (log)", ylabel="held-out loss, nats per byte")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _spread(group: Sequence[Mapping[str, str]], key: str, digits: int, scale: float = 1.0) -> str:
    values = [scale * float(row[key]) for row in group if row[key] != ""]
    if not values:
        return ""
    unit = " %" if scale == 100 else ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}{unit}"


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    write_results([Path(argument) for argument in sys.argv[1:]], {})
