"""Grids of runs that can be interrupted, and what their seeds say: shared by the experiments of the papers' claims.

A run is a mapping of settings (arm, seed, ...). Its result is one JSON file, ``runs/<settings>.json``, that appears
once it is complete. What is there is not trained again; what is broken is reported and left out, never averaged.
``python -m experiments.evidence FOLDER TARGET`` packs the runs of a folder into one file of another, whose page and
picture any experiment then draws with ``results_only=true output_dir=TARGET``.
"""

import argparse
import gzip
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy import stats

from experiments.run_info import run_info

Settings = Mapping[str, Any]
Record = dict[str, Any]
PARTS = {"settings", "result", "seconds", "info"}  # of a record

console = Console(stderr=True)


class MissingData(RuntimeError):
    """Data or weights are not installed; the message holds the command that installs them."""

    def __init__(self, what: str, command: str) -> None:
        super().__init__(f"{what} is not installed. Install it with `{command}`.")


def grid(**choices: Iterable[Any]) -> list[dict[str, Any]]:
    """Every combination, the last name varying fastest."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def sized(cfg: DictConfig) -> DictConfig:
    """The reduced form that ``+size=small`` asks for, as the experiment's ``small`` describes it."""
    size = cfg.get("size", "full")
    if size not in ("full", "small"):
        raise ValueError(f"`size` must be small, or left out for the full form, got {size!r}.")
    return cfg if size == "full" else OmegaConf.merge(cfg, cfg.small)  # type: ignore[return-value]


@dataclass(frozen=True)
class Store:
    """Results of a grid in a folder.

    Args:
        folder: Holds ``runs/``, made when the first result is written, or ``runs.jsonl.gz``, many in one file.
    """

    folder: Path

    def path(self, settings: Settings) -> Path:
        """File of a run."""
        name = "_".join(f"{key}={_short(value)}" for key, value in settings.items())
        return self.folder / "runs" / f"{name}.json"

    def write(self, settings: Settings, result: Any, seconds: float) -> None:
        """Keep a finished run; the file appears whole or not at all."""
        path = self.path(settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        record = {"settings": dict(settings), "result": result, "seconds": seconds, "info": run_info()}
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(path)

    @property
    def packed(self) -> Path:
        """The file of many runs, a line each."""
        return self.folder / "runs.jsonl.gz"

    def pack(self, runs: Sequence[Record]) -> None:
        """Keep runs in one file; the same runs give the same bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps(record)}\n" for record in runs)
        temporary = self.packed.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
        temporary.replace(self.packed)

    def read(self) -> list[Record]:
        """Every complete run, in the order of the file names; the others are named on the console.

        Raises:
            ValueError: If the file of many runs is damaged: none of them can be trusted.
        """
        found = {}
        if self.packed.exists():
            try:
                lines = gzip.decompress(self.packed.read_bytes()).decode().splitlines()
                if not lines:
                    raise ValueError("it is empty")
                found = {
                    self.path(record["settings"]).name: record for record in (_parse(line, PARTS) for line in lines)
                }
            except (ValueError, OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{self.packed} is damaged ({error}); pack its runs again.") from error
        found |= {path.name: record for path, record in read_whole(self.folder.glob("runs/*.json"), PARTS)}
        return [found[name] for name in sorted(found)]

    def done(self) -> set[str]:
        """File names of complete runs."""
        return {self.path(record["settings"]).name for record in self.read()}


def run_all(store: Store, runs: Sequence[Settings], train: Callable[[Settings], Any]) -> None:
    """Train what is not there yet, with a progress bar; an interruption loses only the run at hand."""
    run_info()  # the commit is that of the start
    done = store.done()
    left = [settings for settings in runs if store.path(settings).name not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=len(runs), completed=len(runs) - len(left))
        for settings in left:
            progress.update(task, description=", ".join(f"{key} {_short(value)}" for key, value in settings.items()))
            start = time.perf_counter()
            result = train(settings)
            store.write(settings, result, time.perf_counter() - start)
            progress.advance(task)


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences, or of values, with the half width of its 95 % interval (Student's t)."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}" if self.count > 1 else f"{self.mean:+.4f}"

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.count > 1 and abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """Of independent values, one a seed."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()) if len(array) else float("nan"), float("nan"), len(array))
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(half), len(array))


def paired(ours: Mapping[Any, float], baseline: Mapping[Any, float]) -> Interval:
    """Of differences by seed, over the seeds that both have."""
    return interval([ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())])


def provenance(records: Sequence[Record]) -> list[str]:
    """Lines on where results come from: hardware, versions, commits, wall time."""
    texts = {key: sorted({record["info"][key] for record in records}) for key in ("hardware", "versions", "commit")}
    lines = [f"{key}: {'; '.join(values)}" for key, values in texts.items()]
    return [*lines, f"{len(records)} runs, {sum(record['seconds'] for record in records) / 60:.0f} minutes in all"]


def read_whole(files: Iterable[Path], parts: set[str]) -> list[tuple[Path, dict[str, Any]]]:
    """JSON files that hold mappings with these parts, in order; a broken one is named on the console and left out."""
    found = []
    for path in sorted(files):
        try:
            found.append((path, _parse(path.read_text(), parts)))
        except (ValueError, OSError) as error:
            console.print(f"[yellow]{path} is broken and left out ({error}); delete it to run it again.")
    return found


def _parse(text: str, parts: set[str]) -> dict[str, Any]:
    record = json.loads(text)
    if not (isinstance(record, dict) and parts <= record.keys()):
        raise ValueError("it lacks a part")
    return record


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("/", "-").replace(" ", "-")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pack the runs of a folder into one file of another.")
    parser.add_argument("folder", type=Path, help="of an experiment, with runs/")
    parser.add_argument("target", type=Path, help="folder of the file")
    options = parser.parse_args(arguments)
    runs = Store(options.folder).read()
    if not runs:
        parser.error(f"there are no complete runs in {options.folder / 'runs'}")
    target = Store(options.target)
    target.pack(runs)
    print(f"{len(runs)} runs in {target.packed}")


if __name__ == "__main__":
    main()
