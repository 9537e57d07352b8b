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

HEADER = (
    "arm",
    "strength",
    "loss",
    "loss - relu",
    "density",
    "loss - relu, shifted",
    "density, shifted",
    "dead neurons",
)


def write_results(paths: Sequence[Path], info: Mapping[str, Any]) -> Path:
    """Write ``sparsity.md`` and ``sparsity.png`` beside the first file, print the table, and return its path."""
    rows = summarise([row for path in paths for row in _read(path)])
    folder = paths[0].parent
    table = Table(*HEADER, title="loss in nats per byte and density, mean ± deviation over seeds")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)
    lines = [f"- {key}: {value}" for key, value in info.items()]
    lines += ["", f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    (folder / "sparsity.md").write_text("\n".join(lines) + "\n")
    draw([row for path in paths for row in _read(path)], folder / "sparsity.png")
    return folder / "sparsity.md"


def summarise(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """A line for each arm and strength: mean and deviation over seeds; differences to plain ReLU of the same seed."""
    groups: dict[tuple[str, float], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["arm"], float(row["strength"])].append(row)
    relu = [row for row in rows if row["arm"] == "relu"]
    # of the same pretraining, where that was repeated for a part of the arms
    base = {row["seed"]: float(row["loss"]) for row in reversed(relu)}
    own = {(row.get("file", ""), row["seed"]): float(row["loss"]) for row in relu}
    order = list(dict.fromkeys(row["arm"] for row in rows))
    table = []
    for arm, strength in sorted(groups, key=lambda group: (order.index(group[0]), group[1])):
        group = groups[arm, strength]

        def spread(key: str, digits: int, scale: float = 1.0, relative: bool = False, group: Any = group) -> str:
            values = [
                scale
                * (
                    float(row[key])
                    - (own.get((row.get("file", ""), row["seed"]), base[row["seed"]]) if relative else 0.0)
                )
                for row in group
                if row[key] != "" and (not relative or row["seed"] in base)
            ]
            return _spread(values, digits, " %" if scale == 100 else "", "+" if relative else "")

        table.append((
            arm, f"{strength:g}" if strength else "", spread("loss", 4), spread("loss", 4, relative=True),
            spread("density", 1, 100), spread("shifted_loss", 4, relative=True), spread("shifted_density", 1, 100),
            spread("dead", 1, 100),
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


def _spread(values: Sequence[float], digits: int, unit: str, sign: str) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}{unit}"


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{"file": path.stem, **row} for row in csv.DictReader(file)]


if __name__ == "__main__":
    write_results([Path(argument) for argument in sys.argv[1:]], {})
