"""What each callback costs on the quickstart's model, on this machine: python -m experiments.benchmarks.overhead.

Steps of the real Trainer, against the same training without callbacks and against the usual way of adding the term.
Before anything is timed each callback must give the gradients of that usual way; sigma-Reparam, which has no equal in
torch, those of its formula by singular value decomposition; and the monitor those of no callback.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.benchmarks import usual
from experiments.benchmarks.harness import Ratio, Variant, gradients, interleave, paired_ratio, peak_allocation
from experiments.run_info import ROOT, run_info
from experiments.train import build
from lightning_reg.callbacks import (
    ActivationDensityRegularizer,
    AttentionEntropyRegularizer,
    RegMonitor,
    SigmaReparam,
    StabilityMonitor,
)

BASELINE = "no callback"
ENTROPY_WEIGHT, DENSITY_WEIGHT, EPSILON = 0.1, 0.1, 1e-3
TOLERANCE = 1e-4  # of the largest gradient: the usual entropy carries an epsilon inside its log
BAR = 1.15  # of DESIGN: each callback alone, on CPU


@dataclass(frozen=True)
class Contest:
    """A callback and the usual way of doing the same."""

    name: str
    callbacks: Callable[[], list[Callback]]
    usual: Callable[[usual.HookedClassifier], None] | None


def contests() -> list[Contest]:
    """One row of the table each."""

    def entropy() -> Callback:
        return AttentionEntropyRegularizer(ENTROPY_WEIGHT)

    def density() -> Callback:
        return ActivationDensityRegularizer(DENSITY_WEIGHT, epsilon=EPSILON)

    def all_usual(model: usual.HookedClassifier) -> None:
        usual_entropy(model)
        usual_density(model)
        usual.add_spectral_norm(model.net)

    def usual_entropy(model: usual.HookedClassifier) -> None:
        usual.add_entropy(model.net, model.terms, ENTROPY_WEIGHT)

    def usual_density(model: usual.HookedClassifier) -> None:
        usual.add_density(model.net, model.terms, DENSITY_WEIGHT, EPSILON)

    return [
        Contest("attention entropy", lambda: [entropy()], usual_entropy),
        Contest("density loss", lambda: [density()], usual_density),
        Contest("sigma-Reparam", lambda: [SigmaReparam()], lambda model: usual.add_spectral_norm(model.net)),
        Contest("all three", lambda: [SigmaReparam(), entropy(), density()], all_usual),
        Contest("monitor", lambda: [RegMonitor()], None),
        Contest("stability monitor", lambda: [StabilityMonitor()], None),
    ]


class Setup:
    """The quickstart's model and batches.

    Args:
        sharpness: Factor on the query, key and value weights. At the start attention is all but uniform, where entropy
            has no gradient to be checked.
    """

    def __init__(self, sharpness: float = 1.0) -> None:
        self.sharpness = sharpness
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            self.config: DictConfig = hydra.compose("train", ["experiment=quickstart", "output_dir=unused"])
        data = build(self.config.data.datamodule)
        data.setup("fit")
        self.batches = list(data.train_dataloader())

    def model(self) -> pl.LightningModule:
        """The model as it is."""
        return self._sharpen(build(self.config.model))

    def hooked(self, add: Callable[[usual.HookedClassifier], None]) -> pl.LightningModule:
        """The model with the usual way added."""
        model = usual.HookedClassifier(build(self.config.model.net), learning_rate=self.config.model.learning_rate)
        add(self._sharpen(model))
        return model

    @torch.no_grad()
    def _sharpen(self, model: Any) -> Any:
        for block in model.net.blocks:
            block.attn.qkv.weight.mul_(self.sharpness)
        return model


def check(setup: Setup, rows: Sequence[Contest]) -> None:
    """Compare the gradients of the first step.

    Raises:
        RuntimeError: If a callback does not compute what it is compared with.
    """
    plain = gradients(Variant(BASELINE, setup.model), setup.batches)
    for row in rows:
        if row.name == "all three":
            continue  # its parts are checked
        ours = gradients(Variant(row.name, setup.model, row.callbacks), setup.batches)
        if row.name == "sigma-Reparam":
            expected = reparametrized(plain, setup)
        else:
            expected = plain if row.usual is None else gradients(_usual(setup, row), setup.batches)
        if (error := distance(ours, expected)) > TOLERANCE:
            raise RuntimeError(f"{row.name}: gradients differ by {error:.1e} of the largest; its cost means nothing.")
        if row.usual is not None and distance(ours, plain) < 10 * TOLERANCE:
            raise RuntimeError(f"{row.name} leaves the gradients as they are, so the comparison shows nothing.")


def reparametrized(plain: dict[str, Tensor], setup: Setup) -> dict[str, Tensor]:
    """Gradients under sigma-Reparam from plain ones: ``G - <G, W> / sigma * u v^T``, by decomposition."""
    torch.manual_seed(0)
    expected = dict(plain)
    for name, weight in setup.model().named_parameters():
        if name.endswith(".weight") and weight.dim() > 1:
            parts = 3 if "qkv" in name else 1
            pairs = zip(plain[name].flatten(1).chunk(parts), weight.detach().flatten(1).chunk(parts))
            expected[name] = torch.cat([_without_scale(*pair) for pair in pairs]).view_as(weight)
    return expected


def _without_scale(gradient: Tensor, weight: Tensor) -> Tensor:
    u, sigma, v = torch.linalg.svd(weight.double(), full_matrices=False)
    along = (gradient * weight).sum() / sigma[0]
    return (gradient - along * torch.outer(u[:, 0], v[0])).float()


def distance(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients in units of the largest gradient."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((ours[name] - gradient).abs().max()) for name, gradient in expected.items()) / largest


def _usual(setup: Setup, row: Contest) -> Variant:
    assert row.usual is not None
    add = row.usual
    return Variant(f"{row.name}, the usual way", lambda: setup.hooked(add))


def measure(setup: Setup, rows: Sequence[Contest], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Time and memory ratios to no callback, for each callback and its usual way."""
    variants = [Variant(BASELINE, setup.model)]
    for row in rows:
        variants += [Variant(row.name, setup.model, row.callbacks), *([_usual(setup, row)] if row.usual else [])]
    times = interleave(variants, setup.batches, rounds, steps)
    memory = {variant.name: peak_allocation(variant, setup.batches) for variant in variants}
    table = []
    for variant in variants:
        ratio = paired_ratio(times[variant.name], times[BASELINE])
        milliseconds = 1e3 * sorted(times[variant.name])[rounds // 2]
        table.append({"variant": variant.name, "ms": milliseconds, "time": ratio, "bytes": memory[variant.name],
                      "memory": memory[variant.name] / memory[BASELINE]})  # fmt: skip
    return table


def show(table: Sequence[dict[str, Any]], info: dict[str, str], rounds: int, steps: int) -> None:
    """Print where the numbers come from, and the numbers."""
    console = Console(width=110)
    for key, value in info.items():
        console.print(f"{key}: {value}", highlight=False, soft_wrap=True)
    console.print(
        f"Whole Trainer steps, logging every tenth included: {rounds} blocks of {steps} steps of each variant, "
        "interleaved, order rotated. Time: median of the paired ratios [20 %, 80 %]. Memory: largest sum of bytes that "
        "a step holds at a time, by torch's profiler; parameters and optimizer state, the same for all, not counted.\n",
        highlight=False,
    )
    rich_table = Table("variant", "ms a step", "step time", "peak memory", f"bar x{BAR}", title="Ratio to no callback")
    for row in table:
        # the bar is for one callback at a time
        barless = row["variant"] in (BASELINE, "all three") or "usual" in row["variant"]
        within = "-" if barless else _bar(row["time"])
        rich_table.add_row(row["variant"], f"{row['ms']:.1f}", str(row["time"]), f"x{row['memory']:.2f}", within)
    console.print(rich_table)


def _bar(ratio: Ratio) -> str:
    return "met" if ratio.median <= BAR else "missed"


def write(path: Path, table: Sequence[dict[str, Any]], info: dict[str, str]) -> None:
    """The same as CSV, one line for each variant, with hardware, versions and commit in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "ms", "time_p20", "time_p50", "time_p80", "bytes", "memory", *info])
        for row in table:
            ratio = row["time"]
            numbers = [f"{row['ms']:.3f}", *(f"{value:.4f}" for value in (ratio.low, ratio.median, ratio.high))]
            writer.writerow([row["variant"], *numbers, row["bytes"], f"{row['memory']:.4f}", *info.values()])


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each variant")
    parser.add_argument("--steps", type=int, default=20, help="timed steps in a block")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more than free cores ruins the timing")
    parser.add_argument("--csv", type=Path, default=Path("outputs/benchmarks/overhead.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setup, rows = Setup(), contests()
    check(Setup(sharpness=10), rows)
    table = measure(setup, rows, arguments.rounds, arguments.steps)
    info = run_info()
    show(table, info, arguments.rounds, arguments.steps)
    write(arguments.csv, table, info)
    print(f"\nWritten to {arguments.csv}")


if __name__ == "__main__":
    main()
