"""What each arm adds to a training step on a GPU: python -m experiments.benchmarks.steps --model vit.

bf16 autocast, fused AdamW, a hand-written loop with ``regularize``; the monitors, which follow logging steps, in a
Trainer. An arm is timed only after ``checks`` has found that it computes what it is meant to. All arms live in one
process and take turns. What the file holds already for the same code and hardware is not measured again.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Printed

from experiments.benchmarks.arms import ARMS, NONE, TRAINER, Arm, suits
from experiments.benchmarks.checks import Errors, check, check_compiled
from experiments.benchmarks.harness import (
    Ratio,
    Variant,
    alternate,
    interleave,
    paired_ratio,
    peak_allocation,
    peak_bytes,
    percentiles,
    quiet,
)
from experiments.benchmarks.results import DIRECTORY, Row, Table, provenance
from experiments.benchmarks.tasks import GROWTH, TASKS, TINY, TINY_GROWTH, Task
from experiments.benchmarks.training import MODES, Fit, Mode, Training, attach_of, release, settle

WARMUP = 3
MIB = 2**20


@dataclass(frozen=True)
class Line:
    """A line of the CSV: ms a step, ratios of time and of memory to the baseline, and what the check found.

    Args:
        growth: Axis along which the task's size grows, or nothing.
        memory: Ratio of the peaks.
        peak: Bytes of the largest sum of allocations within a step, parameters and optimizer state included.
        host_ms: Until the step was queued; close to ``ms`` where the CPU, not the GPU, is what takes the time.
        graphs: That were compiled.
        breaks: Why the compiler gave up in between.
        error: Why there are no numbers.
        remark: Warnings of the library, as when it falls back to plain torch.
    """

    growth: str
    model: str
    mode: str
    arm: str
    baseline: str
    error: str = ""
    ms: float = float("nan")
    ms_p20: float = float("nan")
    ms_p80: float = float("nan")
    time_p20: float = float("nan")
    time_p50: float = float("nan")
    time_p80: float = float("nan")
    peak: int = 0
    memory: float = float("nan")
    host_ms: float = float("nan")
    rounds: int = 0
    steps: int = 0
    graphs: int = 0
    breaks: str = ""
    error_fp32: float = float("nan")
    error_bf16: float = float("nan")
    usual_bf16: float = float("nan")
    remark: str = ""
    layers: int = 0
    width: int = 0
    length: int = 0
    batch: int = 0


def table(directory: Path) -> Table:
    """The file of the lines."""
    keys = ("growth", "model", "mode", "arm")
    return Table(directory / "steps.csv", keys, [field.name for field in fields(Line) if field.name not in keys])


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        device: Where.
        rounds: Blocks of each arm.
        steps: Timed steps in a block.
        budget: Seconds after which no further round begins.
        logging: Steps in a block with a Trainer, of which the last is logged.
    """

    device: torch.device
    rounds: int
    steps: int
    budget: float
    logging: int = 50  # Lightning's default


class _Refused(Exception):
    """An arm that gets no numbers."""


def measure(task: Task, arms: Sequence[Arm], mode: Mode, settings: Settings, growth: str = "") -> list[Line]:
    """Check and time arms of one baseline, which is among them."""
    settle()
    with_trainer = arms[0].attach is None
    sizes: dict[str, Any] = {"layers": task.layers, "width": task.width, "length": task.length, "batch": task.batch}
    lines = {arm.name: Line(growth, task.name, mode, arm.name, arm.baseline, **sizes) for arm in arms}
    found = (_measure_fits if with_trainer else _measure_loops)(task, arms, mode, settings)
    times = {name: values["times"] for name, values in found.items() if "times" in values}
    base = found[arms[0].baseline]
    finished = []
    for name, line in lines.items():
        values = dict(found[name])
        if name in times:
            own = values.pop("times")
            spread, ratio = percentiles([1e3 * seconds for seconds in own]), Ratio(*[float("nan")] * 3)
            if "times" in base:
                ratio = paired_ratio(own, times[line.baseline])
            values |= {
                "ms": spread.median, "ms_p20": spread.low, "ms_p80": spread.high,
                "time_p20": ratio.low, "time_p50": ratio.median, "time_p80": ratio.high,
                "memory": values["peak"] / base["peak"] if base.get("peak") else float("nan"),
                "rounds": len(own), "steps": settings.logging if with_trainer else settings.steps,
            }  # fmt: skip
        finished.append(Line(**{**asdict(line), **values}))
    return finished


def _measure_loops(task: Task, arms: Sequence[Arm], mode: Mode, settings: Settings) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    alive: dict[str, Training] = {}
    resident = 0  # bytes that the arms alive hold between steps
    with quiet():
        first = Training(task, attach_of(ARMS[NONE]), settings.device)  # libraries take memory at their first use
        first.warm_up(1)
        del first
    release(settings.device)
    for arm in arms:
        found[arm.name], before, start = {}, _allocated(settings.device), time.perf_counter()
        with quiet(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                errors = check(task, arm, settings.device)
                training = Training(task, attach_of(arm), settings.device, mode)
                if mode != "eager":
                    errors = replace(errors, half=check_compiled(training, arm, errors))
                    release(settings.device)
                found[arm.name] |= _errors(errors)
                training.warm_up(WARMUP)
                if arm.ours and training.breaks:
                    raise _Refused(f"graph breaks: {'; '.join(training.breaks)}"[:500])
                peak = peak_bytes(partial(training.warm_up, 1), settings.device) - resident
                graphs, breaks = training.compiler.graphs, "; ".join(training.breaks)[:500]
                found[arm.name] |= {"peak": peak, "graphs": graphs, "breaks": breaks}
                alive[arm.name] = training
                resident += _allocated(settings.device) - before
            except Exception as error:  # this arm gets no numbers, the others do
                found[arm.name]["error"] = _reason(error)
            training = None  # type: ignore[assignment]
        found[arm.name]["remark"] = _remarks(caught)
        release(settings.device)
        state = f"no numbers, {found[arm.name]['error']}" if arm.name not in alive else "ready"
        print(f"{task.name}, {mode}, {arm.name}: {state}, {time.perf_counter() - start:.0f} s", flush=True)
    settle()
    hosts: dict[str, list[float]] = {name: [] for name in alive}

    def block(name: str) -> float:
        seconds = alive[name].block(settings.steps)
        hosts[name].append(1e3 * alive[name].host)
        return seconds

    times = alternate({name: partial(block, name) for name in alive}, settings.rounds, settings.budget)
    gc.unfreeze()  # what is alive must be collected in the end
    for name, training in alive.items():
        if training.compiler.graphs != found[name]["graphs"]:
            found[name]["error"] = "was compiled again while it was timed"
        else:
            found[name] |= {"times": times[name], "host_ms": statistics.median(hosts[name])}
    return found


def _measure_fits(task: Task, arms: Sequence[Arm], mode: Mode, settings: Settings) -> dict[str, dict[str, Any]]:
    module = Fit(task)  # one for all: what a monitor adds it takes away
    batches = task.batches(torch.device("cpu"), count=1 if task.causal else 2)
    arguments = {"precision": "bf16-mixed", "log_every_n_steps": settings.logging, "accelerator": settings.device.type}
    found: dict[str, dict[str, Any]] = {arm.name: {} for arm in arms}
    variants = []
    for arm in arms:
        variant = Variant(arm.name, lambda: module, arm.callbacks, arguments)
        try:
            found[arm.name] |= _errors(check(task, arm, settings.device))
            found[arm.name]["peak"] = peak_allocation(variant, batches)
            variants.append(variant)
        except Exception as error:  # as above
            found[arm.name]["error"] = _reason(error)
            print(f"{task.name}: no numbers for {arm.name}: {_reason(error)}", flush=True)
    for name, times in interleave(variants, batches, settings.rounds, settings.logging, settings.budget).items():
        found[name]["times"] = times
    return found


def _errors(errors: Errors) -> dict[str, float]:
    return {"error_fp32": errors.single, "error_bf16": errors.half, "usual_bf16": errors.usual}


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, _Refused):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _remarks(caught: Sequence[warnings.WarningMessage]) -> str:
    texts = dict.fromkeys(str(warning.message) for warning in caught if "lightning_reg" in str(warning.message))
    return " ".join(texts)[:500]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def show(lines: Sequence[Line], where: Row) -> None:
    """Print where the numbers come from, and the numbers."""
    console = Console(width=150)
    for key, value in where.items():
        console.print(f"{key}: {value}", highlight=False, soft_wrap=True)
    printed = Printed("model", "mode", "arm", "ms", "time", "MiB", "memory", "host ms", "fp32", "bf16", "remark")
    for line in lines:
        ratio = str(Ratio(line.time_p20, line.time_p50, line.time_p80)) if line.ms == line.ms else "-"
        printed.add_row(
            line.model, line.mode, line.arm, f"{line.ms:.2f}", ratio, f"{line.peak / MIB:.0f}", f"x{line.memory:.3f}",
            f"{line.host_ms:.2f}", f"{line.error_fp32:.0e}", f"{line.error_bf16:.0e}", line.error or line.remark,
        )  # fmt: skip
    console.print(printed)


def chosen(names: Sequence[str], task: Task, mode: str) -> list[list[Arm]]:
    """The arms that suit, in groups of one baseline, which comes first."""
    arms = [ARMS[name] for name in names if suits(ARMS[name], task, mode)]
    groups = []
    for baseline in (NONE, TRAINER):
        own = [arm for arm in arms if arm.baseline == baseline and arm.name != baseline]
        if own or baseline in names:
            groups.append([ARMS[baseline], *own])
    return groups


def run(arguments: argparse.Namespace) -> list[Line]:
    """Measure what is asked for and not there yet; returns the new lines."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device, arguments.rounds, arguments.steps, arguments.budget, 2 if arguments.tiny else 50)
    file, where = table(arguments.results), provenance(arguments.commit)
    growths = TINY_GROWTH if arguments.tiny else GROWTH
    tasks = [("", (TINY if arguments.tiny else TASKS)[name]) for name in arguments.model]
    tasks += [(axis, task) for axis in arguments.growth for task in growths.get(axis, [])]
    lines: list[Line] = []
    for growth, task in tasks:
        for mode in arguments.mode:
            for arms in chosen(arguments.arms, task, mode):
                named = {"growth": growth, "model": task.name, "mode": mode}
                missing = [a for a in arms if arguments.again or not file.has({**named, "arm": a.name}, where)]
                if not missing:
                    continue
                start = time.perf_counter()
                new = measure(task, [arms[0], *(arm for arm in missing if arm is not arms[0])], mode, settings, growth)
                file.append((asdict(line) for line in new), where)
                lines += new
                print(f"{task.name}, {mode}: {time.perf_counter() - start:.0f} s", flush=True)
                release(device)
    show(lines, where)
    return lines


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", nargs="*", default=[], choices=TASKS, help="what is trained")
    parser.add_argument("--growth", nargs="*", default=[], choices=GROWTH, help="sizes along an axis")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="what is added; all that suit")
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=MODES)
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each arm")
    parser.add_argument("--steps", type=int, default=6, help="timed steps in a block")
    parser.add_argument("--budget", type=float, default=150, help="seconds of timing, of a model and mode")
    parser.add_argument("--results", type=Path, default=DIRECTORY, help="folder of the CSV files")
    parser.add_argument("--commit", help="of the code, where this is no git checkout")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test on a CPU, whose times mean nothing")
    return parser


def main() -> None:
    """Check, measure, print, write; fails where an arm of ours gets no numbers."""
    lines = run(parser().parse_args())
    if any(line.error and ARMS[line.arm].ours for line in lines):
        raise SystemExit("Some arms have no numbers: see above.")


if __name__ == "__main__":
    main()
