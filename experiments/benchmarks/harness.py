"""Step time and peak memory of trainings that differ in one thing, measured side by side in one process.

Each variant trains in blocks through the real Trainer. The blocks of all variants alternate and their order rotates, so
that whatever else the machine does hits all alike; a round gives one ratio to the baseline, and the median and the 20th
and 80th percentile of these paired ratios are reported. Nothing here is about CPUs except ``peak_allocation``'s source.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.profiler import ProfilerActivity, profile

WARMUP = 5  # the first steps find sites, allocate optimizer state and fill caches
LOG_EVERY = 10  # the cost of logging belongs to a step: blocks hold whole multiples


@dataclass
class Variant:
    """A training to be measured: both parts are built anew for each block."""

    name: str
    model: Callable[[], pl.LightningModule]
    callbacks: Callable[[], list[Callback]] = field(default=list)


@dataclass(frozen=True)
class Ratio:
    """Median and spread of the paired ratios to the baseline."""

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

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
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
    """Profiles the allocations of the last step."""

    def __init__(self, step: int) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it reports each start and stop otherwise
        self.step, self.bytes, self.profile = step, 0, profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            torch.cuda.reset_peak_memory_stats() if pl_module.device.type == "cuda" else self.profile.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step + 1:
            cuda = pl_module.device.type == "cuda"
            self.bytes = torch.cuda.max_memory_allocated() if cuda else self._peak_on_cpu()

    def _peak_on_cpu(self) -> int:
        self.profile.stop()
        events = self.profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        live = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
            live += event.nbytes()  # type: ignore[union-attr]
            peak = max(peak, live)
        return peak


def interleave(variants: Sequence[Variant], batches: Sequence[Any], rounds: int, steps: int) -> dict[str, list[float]]:
    """Mean seconds of a step, for each variant and round.

    Args:
        variants: What to compare.
        batches: Training batches, repeated as often as needed.
        rounds: Blocks of each variant.
        steps: Timed steps in a block.
    """
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    with _quiet():
        for index in range(rounds):
            start = index % len(variants)
            for variant in [*variants[start:], *variants[:start]]:
                times[variant.name].append(_seconds(variant, batches, steps))
    return times


def paired_ratio(times: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """20th, 50th and 80th percentile of the ratios of blocks in the same round."""
    pairs = torch.tensor(times, dtype=torch.float64) / torch.tensor(baseline, dtype=torch.float64)
    low, median, high = pairs.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Ratio(low, median, high)


def peak_allocation(variant: Variant, batches: Sequence[Any]) -> int:
    """Largest number of bytes allocated at a time within one step: forward, backward and optimizer.

    On CPU what a step allocates, counted from zero at its start by torch's profiler; on CUDA the allocator's peak,
    parameters and optimizer state included. A process's resident set would say little: freed memory stays in it.
    """
    meter = _Meter(WARMUP)
    with _quiet():
        _fit(variant, batches, WARMUP + 1, meter)
    return meter.bytes


def gradients(variant: Variant, batches: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Gradients of the first step, by the names the parameters have without parametrizations."""
    probe = _FirstGradients()
    with _quiet():
        _fit(variant, batches, 1, probe)
    return probe.gradients


def _seconds(variant: Variant, batches: Sequence[Any], steps: int) -> float:
    clock = _Clock()
    _fit(variant, batches, WARMUP + steps + 1, clock)
    return (clock.starts[-1] - clock.starts[WARMUP]) / steps


def _fit(variant: Variant, batches: Sequence[Any], steps: int, probe: Callback) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps, accelerator="auto", devices=1, logger=CSVLogger(folder), log_every_n_steps=LOG_EVERY,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            callbacks=[probe, *variant.callbacks()],
        )  # fmt: skip
        trainer.fit(variant.model(), _Batches(batches, steps))


@contextmanager
def _quiet() -> Iterator[None]:
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
