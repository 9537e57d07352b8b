"""Step time and peak memory of things that differ in one respect, measured side by side in one process.

What is compared runs in blocks. The blocks of all variants alternate and their order rotates, so that whatever else the
machine does hits all alike; a round gives one ratio to the baseline, and the median and the 20th and 80th percentile of
these paired ratios are reported. A ``Variant`` is a training by the real Trainer; ``alternate`` and ``peak_bytes`` take
anything that can be called.
"""

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.profiler import ProfilerActivity, profile

WARMUP = 5  # the first steps find sites, allocate optimizer state and fill caches
LOG_EVERY = 10  # the cost of logging belongs to a step: blocks hold whole multiples
LEAST_ROUNDS = 3  # of which a median can be taken


@dataclass
class Variant:
    """A training to be measured: both parts are built anew for each block."""

    name: str
    model: Callable[[], pl.LightningModule]
    callbacks: Callable[[], list[Callback]] = field(default=list)
    trainer: dict[str, Any] = field(default_factory=dict)  # arguments that differ from those of ``_fit``


@dataclass(frozen=True)
class Ratio:
    """Median, and 20th and 80th percentile; of the paired ratios to the baseline, unless something else is said."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"x{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


class _Batches:
    """A loader of the same few batches; a bare list would be taken for a collection of loaders."""

    def __init__(self, batches: Sequence[Any], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[index % len(self.batches)] for index in range(self.steps))


class _Clock(Callback):
    """Time from one batch to the next: data, forward, backward, optimizer, every callback and the logging."""

    def __init__(self, first: int, last: int) -> None:
        self.ends = first, last  # the batches that wait for the device
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if torch.cuda.is_available() and len(self.starts) in self.ends:
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())


class _FirstGradients(Callback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients = {
            name.replace(".parametrizations.weight.original", ".weight"): parameter.grad.clone()
            for name, parameter in named
            if parameter.grad is not None
        }


class _Meter(Callback):
    """Measures the allocations of one step."""

    def __init__(self, step: int) -> None:
        self.step, self.bytes = step, 0
        self._meter: Iterator[int] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self._meter = _metered(pl_module.device)
            next(self._meter)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step + 1 and self._meter is not None:
            self.bytes = next(self._meter)


def _metered(device: torch.device) -> Iterator[int]:
    """Starts at the first ``next``; the second gives the largest number of bytes held at a time in between."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield 0
        yield torch.cuda.max_memory_allocated()
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it reports each start and stop otherwise
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    recorder.start()
    yield 0
    recorder.stop()
    events = recorder.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()  # type: ignore[union-attr]
        peak = max(peak, live)
    yield peak


def alternate(
    blocks: Mapping[str, Callable[[], float]], rounds: int, budget: float = math.inf
) -> dict[str, list[float]]:
    """What each block returns, by name and round.

    Args:
        blocks: What takes turns, in an order that rotates.
        rounds: Turns of each.
        budget: Seconds after which no other round begins; three rounds are run whatever they take.
    """
    results: dict[str, list[float]] = {name: [] for name in blocks}
    names, start = list(blocks), time.perf_counter()
    for index in range(rounds):
        if index >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            results[name].append(blocks[name]())
    return results


def interleave(
    variants: Sequence[Variant], batches: Sequence[Any], rounds: int, steps: int, budget: float = math.inf
) -> dict[str, list[float]]:
    """Mean seconds of a step, for each variant and round.

    Args:
        variants: What to compare.
        batches: Training batches, repeated as often as needed.
        rounds: Blocks of each variant.
        steps: Timed steps in a block.
        budget: As for ``alternate``.
    """
    with quiet():
        return alternate({v.name: partial(_seconds, v, batches, steps) for v in variants}, rounds, budget)


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """20th, 50th and 80th percentile of the ratios of blocks in the same round."""
    return percentiles([time / base for time, base in zip(times, baseline, strict=True)])


def percentiles(values: Sequence[float]) -> Ratio:
    """20th, 50th and 80th percentile of anything."""
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Ratio(*torch.tensor(values, dtype=torch.float64).quantile(shares).tolist())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes allocated at a time while ``step`` runs, counted as by ``peak_allocation``."""
    meter = _metered(device)
    next(meter)
    step()
    return next(meter)


def peak_allocation(variant: Variant, batches: Sequence[Any]) -> int:
    """Largest number of bytes allocated at a time within one step: forward, backward and optimizer.

    On CPU what a step allocates, counted from zero at its start by torch's profiler; on CUDA the allocator's peak,
    parameters and optimizer state included. A process's resident set would say little: freed memory stays in it.
    """
    meter = _Meter(WARMUP)
    with quiet():
        _fit(variant, batches, WARMUP + 1, meter)
    return meter.bytes


def gradients(variant: Variant, batches: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Gradients of the first step, by the names the parameters have without parametrizations."""
    probe = _FirstGradients()
    with quiet():
        _fit(variant, batches, 1, probe)
    return probe.gradients


def _seconds(variant: Variant, batches: Sequence[Any], steps: int) -> float:
    clock = _Clock(WARMUP, WARMUP + steps)
    _fit(variant, batches, WARMUP + steps + 1, clock)
    return (clock.starts[-1] - clock.starts[WARMUP]) / steps


def _fit(variant: Variant, batches: Sequence[Any], steps: int, probe: Callback) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "max_steps": steps, "accelerator": "auto", "devices": 1, "logger": CSVLogger(folder),
            "log_every_n_steps": LOG_EVERY, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "limit_val_batches": 0, "callbacks": [probe, *variant.callbacks()],
        }  # fmt: skip
        trainer = pl.Trainer(**{**arguments, **variant.trainer})
        trainer.fit(variant.model(), _Batches(batches, steps))


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in convolutions, where torch allows it by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def quiet() -> Iterator[None]:
    """No table of sites and no advice for each of many short trainings."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
