"""Stored runs of an experiment as offline W&B runs: python -m experiments.wandb_export outputs/compose/<run>.

``wandb sync <folder>/wandb/offline-run-*`` then uploads them: grouped by experiment, with the arm as job type and the
settings as configuration and tags. Runs that were exported before are left as they are. The folder is one of
``experiments.evidence``, or that of a sweep of learning rates, with its remedies as arms.
"""

import argparse
import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import wandb
from rich.progress import track

from experiments.evidence import Record, Settings, Store, console
from experiments.lr_sensitivity_results import read_runs

DONE = "exported"  # a file in the folder of a run that was written to its end
PROJECT = "lightning_reg"
DATED = re.compile(r"\d{4}-\d\d-\d\d")


def export(folder: Path, experiment: str) -> list[Path]:
    """Write what is not there yet below ``folder/wandb``; returns the new offline runs.

    Raises:
        FileNotFoundError: If no complete run is stored in the folder.
    """
    records = Store(folder).read() or [_of_sweep(row) for row in read_runs(folder)]
    if not records:
        raise FileNotFoundError(f"There are no complete runs in {folder}.")
    new = []
    for record in records:
        earlier = list(folder.glob(f"wandb/offline-run-*-{run_id(experiment, record['settings'])}"))
        if not any((path / DONE).exists() for path in earlier):
            new.append(record)
            for path in earlier:  # an interruption left it
                shutil.rmtree(path)
    return [log(record, folder, experiment) for record in track(new, "runs", console=console)]


def _of_sweep(row: Mapping[str, Any]) -> Record:
    """A run of ``experiments.lr_sensitivity``, whose trace becomes curves."""
    settings = {"arm": row["remedy"], "learning_rate": row["learning_rate"], "seed": row["seed"]}
    trace = row.get("trace", {})
    curves = {name: [list(pair) for pair in zip(trace["step"], values, strict=True)] for name, values in trace.items()
              if name != "step"}  # fmt: skip
    kept = {key: row[key] for key in ("initial_loss", "final_loss", "steps", "error", "settings") if key in row}
    return {"settings": settings, "result": {**kept, **curves}, "seconds": row["seconds"], "info": row["info"]}


def log(record: Record, folder: Path, experiment: str) -> Path:
    """One run: settings as configuration, curves as history, other numbers as summary."""
    settings = record["settings"]
    numbers, words, curves = split(record["result"])
    run = wandb.init(
        project=PROJECT, group=experiment, job_type=settings.get("arm"), name=name_of(settings), tags=tags(settings),
        id=run_id(experiment, settings), dir=folder, mode="offline", config={**words, **settings, **record["info"]},
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
    )  # fmt: skip
    for step, values in curves.items():
        run.log(values, step=step)
    run.summary.update({**numbers, "seconds": record["seconds"]})
    written = Path(run.dir).parent
    run.finish()
    (written / DONE).touch()
    return written


def split(result: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any], dict[int, dict[str, float]]]:
    """Numbers, other values, and curves by step, under names that slashes join."""
    numbers: dict[str, float] = {}
    words: dict[str, Any] = {}
    curves: dict[int, dict[str, float]] = defaultdict(dict)
    for key, value in flat(result):
        if is_curve(value):
            for step, number in value:
                if number is not None:
                    curves[step][key] = number
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[key] = value
        else:
            words[key] = value
    return numbers, words, dict(sorted(curves.items()))


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists; a curve is a leaf."""
    if isinstance(value, (Mapping, list)) and value and not is_curve(value):
        for key, child in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from flat(child, f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix, value


def is_curve(value: Any) -> bool:
    """Whether it is a list of steps, which rise, and numbers; a number that was not finite is None."""
    if not (isinstance(value, list) and value and all(isinstance(pair, list) and len(pair) == 2 for pair in value)):
        return False
    steps = [step for step, _ in value]
    return (
        all(isinstance(step, int) for step in steps)
        and all(before < after for before, after in pairwise(steps))
        and all(number is None or isinstance(number, (int, float)) for _, number in value)
    )


def run_id(experiment: str, settings: Settings) -> str:
    """The same for the same run, so that nothing is uploaded twice."""
    return hashlib.sha256(json.dumps([experiment, dict(settings)], sort_keys=True).encode()).hexdigest()[:12]


def name_of(settings: Settings) -> str:
    """Values of the settings: ``vit-0-aem+deft``."""
    return "-".join(str(value) for value in settings.values())


def tags(settings: Settings) -> list[str]:
    """The methods of the arm, then every other setting as ``seed=0``."""
    methods = str(settings["arm"]).split("+") if "arm" in settings else []
    return methods + [f"{key}={value}"[:64] for key, value in settings.items() if key != "arm"]


def experiment_of(folder: Path) -> str:
    """Its name, which stands above the date in ``outputs/<experiment>/<date>``."""
    path = folder.resolve()
    return path.parent.name if DATED.match(path.name) else path.name


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of experiments or sweeps")
    parser.add_argument("--experiment", help="the group; taken from the folder's name if left out")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        written = export(folder, options.experiment or experiment_of(folder))
        print(f"{len(written)} new runs: wandb sync {folder}/wandb/offline-run-*")


if __name__ == "__main__":
    main()
