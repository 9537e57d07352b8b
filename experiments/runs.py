"""Reads what a run has written: `summary.json`, and of each arm `metrics.csv` and the monitors' histories."""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Arm:
    """One training: logged scalars by name, and the lines of its monitors."""

    name: str
    metrics: dict[str, Points]
    monitor: list[dict[str, Any]]
    stability: list[dict[str, Any]] = field(default_factory=list)

    def sites(self, quantity: str) -> dict[str, Points]:
        """A quantity of the monitor by site over steps; the mean over heads where there are several."""
        lines: dict[str, Points] = defaultdict(list)
        for line in self.monitor:
            for site, value in line.get(quantity, {}).items():
                lines[site].append((line["step"], sum(value) / len(value) if isinstance(value, list) else value))
        return dict(lines)

    def mean(self, quantity: str) -> Points:
        """A quantity of the monitor over steps, averaged over sites."""
        by_step: dict[float, list[float]] = defaultdict(list)
        for points in self.sites(quantity).values():
            for step, value in points:
                by_step[step].append(value)
        return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]

    def headline(self, name: str) -> Points:
        """A headline of the stability monitor over steps, where it is finite."""
        values = [(line["step"], line["headlines"].get(name)) for line in self.stability]
        return [(step, value) for step, value in values if value is not None]

    def alarms(self) -> list[tuple[int, dict[str, Any]]]:
        """Alarms of the stability monitor, with their steps."""
        return [(line["step"], alarm) for line in self.stability for alarm in line.get("alarms", [])]


def load_run(folder: Path) -> tuple[dict[str, Any], list[Arm]]:
    """Summary and arms of a run.

    Raises:
        FileNotFoundError: If ``folder`` is not the output of a finished run.
    """
    path = folder / "summary.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the folder that a finished run printed as its output.")
    summary = json.loads(path.read_text())
    return summary, [load_arm(folder / name) for name in summary["arms"]]


def load_arm(folder: Path) -> Arm:
    """The logs of one arm; a missing file is an empty log."""
    histories = (_lines(folder / f"{name}.jsonl") for name in ("reg_monitor", "stability"))
    return Arm(folder.name, _metrics(folder / "metrics.csv"), *histories)


def _metrics(path: Path) -> dict[str, Points]:
    metrics: dict[str, Points] = defaultdict(list)
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if value and key not in ("step", "epoch"):
                        metrics[key].append((float(row["step"]), float(value)))
    return dict(metrics)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
