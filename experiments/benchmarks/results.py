"""Measurements as CSV files, one line each, with hardware, versions and code in every line.

A line that is there already for the same code, hardware and settings need not be measured again.
"""

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from experiments.run_info import ROOT, run_info

DIRECTORY = ROOT / "experiments" / "results" / "speed"
PROVENANCE = ("hardware", "versions", "commit", "source")
SAME = ("hardware", "source")  # of the provenance: what tells two measurements of one thing apart
Row = dict[str, str]


def provenance(commit: str | None = None) -> Row:
    """Where numbers come from: ``source`` is a digest of the library's code, which the commit may not be.

    Args:
        commit: Of the checkout, where it is not a git repository.
    """
    info = run_info()
    versions = [info["versions"]]
    if find_spec("triton"):
        versions.append(f"triton {version('triton')}")
    if torch.version.cuda:
        versions.append(f"CUDA {torch.version.cuda}")
    return {
        "hardware": info["hardware"], "versions": ", ".join(versions), "commit": commit or info["commit"],
        "source": _digest(),
    }  # fmt: skip


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "lightning_reg").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


@dataclass(frozen=True)
class Table:
    """A CSV file.

    Args:
        path: Where it is.
        keys: Columns that name what was measured.
        values: Columns that were.
    """

    path: Path
    keys: Sequence[str]
    values: Sequence[str]

    @property
    def columns(self) -> list[str]:
        """All columns, in order."""
        return [*self.keys, *self.values, *PROVENANCE]

    def read(self) -> list[Row]:
        """All lines; none where there is no file."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [dict(row) for row in csv.DictReader(file)]

    def latest(self) -> list[Row]:
        """The last line of everything that was measured, by hardware."""
        lines = {(row["hardware"], *(row[key] for key in self.keys)): row for row in self.read()}
        return list(lines.values())

    def has(self, keys: Mapping[str, object], where: Row) -> bool:
        """Whether something was measured with this code on this hardware."""
        wanted = [text(keys[key]) for key in self.keys] + [where[key] for key in SAME]
        return any([row[key] for key in (*self.keys, *SAME)] == wanted for row in self.read())

    def append(self, rows: Iterable[Mapping[str, object]], where: Row) -> None:
        """Add lines at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            for row in rows:
                writer.writerow({key: text(value) for key, value in {**row, **where}.items()})


def text(value: object) -> str:
    """A value as it stands in the file: five digits, nothing for NaN."""
    if isinstance(value, float):
        return "" if value != value else f"{value:.5g}"
    return str(value)


def number(row: Row, column: str) -> float:
    """A value of a line; NaN where there is none."""
    return float(row[column]) if row.get(column) else float("nan")
