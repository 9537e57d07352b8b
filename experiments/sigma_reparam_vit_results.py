"""sigma-Reparam on a ViT: page, table and picture, written from stored runs alone."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.evidence import Interval, Record, Store, interval, paired, provenance

LABELS = {
    "deit": "DeiT's recipe", "sigma_reparam": "sigma-Reparam",
    "sigma_reparam_slow_gains": "sigma-Reparam, LR / 10 for gains", "spectral_norm": "spectral norm, no gain",
    "weight_norm": "weight norm", "weight_norm_lars": "weight norm, same recipe", "no_norm": "same recipe alone",
}  # fmt: skip
PAPER = {"deit": 81.8, "sigma_reparam": 82.2, "spectral_norm": 69.81, "weight_norm": 77.51}  # ImageNet-1k, ViT-B
COLOURS = {
    "deit": "black", "sigma_reparam": "#d55e00", "sigma_reparam_slow_gains": "#e69f00", "spectral_norm": "#0072b2",
    "weight_norm": "#009e73", "weight_norm_lars": "#cc79a7", "no_norm": "#7f7f7f",
}  # fmt: skip
BASELINE = "deit"
NEAR = 5.0  # points below its best learning rate at which a training still counts as one that works
CURVES = {"entropy_mean": "attention entropy, mean of heads", "entropy_min": "attention entropy, lowest head",
          "sharpness": "sharpness, |λ| max of the Hessian"}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """Runs of an arm: at every learning rate with the tuning seed, and at the best one with the others."""

    name: str
    recipe: Mapping[str, Any]
    tuning: list[Record]
    best: float
    reported: list[Record]

    def by_seed(self, quantity: str = "test_accuracy") -> dict[int, float]:
        """In percent, of the reported runs."""
        return {record["settings"]["seed"]: 100 * record["result"][quantity] for record in self.reported}

    def rates(self) -> list[tuple[float, float]]:
        """Learning rate and validation accuracy in percent, of the tuning runs."""
        pairs = [(r["settings"]["learning_rate"], 100 * r["result"]["val_accuracy"]) for r in self.tuning]
        return sorted(pairs)

    def trains(self) -> tuple[float, float]:
        """First and last of the unbroken learning rates around the best whose accuracy is within ``NEAR`` of it."""
        pairs = self.rates()
        peak = next(place for place, (rate, _) in enumerate(pairs) if rate == self.best)
        near = [accuracy >= pairs[peak][1] - NEAR for _, accuracy in pairs]
        first, last = peak, peak
        while first > 0 and near[first - 1]:
            first -= 1
        while last < len(pairs) - 1 and near[last + 1]:
            last += 1
        return pairs[first][0], pairs[last][0]

    def at_edge(self) -> bool:
        """Whether the best learning rate is the first or last that was tried."""
        return self.best in (self.rates()[0][0], self.rates()[-1][0])


def best_rate(tuning: Sequence[Record]) -> float:
    """The learning rate of the run with the highest validation accuracy; the lowest of equal ones."""
    ordered = sorted(tuning, key=lambda record: record["settings"]["learning_rate"])
    return max(ordered, key=lambda record: record["result"]["val_accuracy"])["settings"]["learning_rate"]


def arms_of(records: Sequence[Record], tuning_seed: int) -> dict[str, Arm]:
    """Arms in the order of ``LABELS``; those without a tuned learning rate are left out."""
    arms = {}
    for name in LABELS:
        own = [record for record in records if record["settings"]["arm"] == name]
        tuning = [record for record in own if record["settings"]["seed"] == tuning_seed]
        if tuning:
            best = best_rate(tuning)
            reported = [r for r in own if r not in tuning and r["settings"]["learning_rate"] == best]
            arms[name] = Arm(name, tuning[0]["result"]["recipe"], tuning, best, reported)
    return arms


def write_results(store: Store, folder: Path, tuning_seed: int) -> Path:
    """Write ``sigma_reparam_vit.csv``, ``.png`` and ``.md`` and return the page."""
    records = store.read()
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(records, folder / "sigma_reparam_vit.csv")
    arms = arms_of(records, tuning_seed)
    draw(arms, folder / "sigma_reparam_vit.png")
    lines = [
        "# A ViT without norms, warm-up, weight decay and Adam: sigma-Reparam", "",
        "The table of sigma-Reparam (Zhai et al. 2023, arXiv 2303.06296) on Fashion-MNIST. *Spectral norm* is",
        "sigma-Reparam with its gain held at 1; *weight norm* has the paper's recipe, and below it sigma-Reparam's;",
        "*same recipe alone* is sigma-Reparam's recipe without it. Each arm runs at every learning rate with one seed;",
        "the best by validation accuracy runs with the seeds that are reported. ± is the 95 % interval over seeds",
        "(Student's t) on the same test images, of paired differences in the columns of differences; **bold** leaves",
        "out 0.", "",
    ]  # fmt: skip
    if arms:
        lines += [*accuracy_table(arms), "", *reading(arms), "", "![curves](sigma_reparam_vit.png)", ""]
        lines += ["## Learning rates that train", "", *rate_table(arms), ""]
        lines += ["## Entropy and sharpness", "", *curve_table(arms), ""]
        lines += ["## What differs from the paper", "", *deviations(records), ""]
    lines += ["## Where the numbers come from", "", "- `python -m experiments.sigma_reparam_vit`"]
    lines += [f"- {line}" for line in provenance(records)] if records else ["- no runs yet"]
    seeds = sorted({record["settings"]["seed"] for arm in arms.values() for record in arm.reported})
    lines += [f"- seeds {', '.join(map(str, seeds))}, after one for the learning rates"] if arms else []
    (folder / "sigma_reparam_vit.md").write_text("\n".join(lines) + "\n")
    return folder / "sigma_reparam_vit.md"


def accuracy_table(arms: Mapping[str, Arm]) -> list[str]:
    """Recipe, accuracy and its difference to the baseline, ours beside the paper's."""
    header = ("arm", "norm layers", "warm-up", "weight decay", "optimizer", "LR", "test top-1, %", "seeds",
              "- DeiT", "paper, %", "- DeiT")  # fmt: skip
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for name, arm in arms.items():
        recipe, scores = arm.recipe, interval(list(arm.by_seed().values()))
        flags = ["yes" if recipe[key] else "no" for key in ("layer_norm", "warmup", "weight_decay")]
        optimizer = {"lars": "LARS", "adam": "AdamW" if recipe["weight_decay"] else "Adam"}[recipe["optimizer"]]
        lines.append(
            f"| {LABELS[name]} | {' | '.join(flags)} | {optimizer} | {arm.best:g} | {_plain(scores)} | {scores.count} "
            f"| {_difference(arms, name)} | {_number(PAPER.get(name))} | {_number(paper_difference(name), '+')} |"
        )
    return lines


def paper_difference(name: str) -> float | None:
    """Points above the baseline in the paper's table."""
    return PAPER[name] - PAPER[BASELINE] if name in PAPER and name != BASELINE else None


def ours(arms: Mapping[str, Arm], name: str, other: str = BASELINE) -> Interval:
    """Points above another arm, by seed."""
    if not {name, other} <= arms.keys():
        return interval([])
    return paired(arms[name].by_seed(), arms[other].by_seed())


def reading(arms: Mapping[str, Arm]) -> list[str]:
    """What reproduced and what did not, from the intervals."""
    claims = [
        ("sigma_reparam", BASELINE, "sigma-Reparam is as good as DeiT's recipe, or better, with none of it", ">="),
        ("spectral_norm", "sigma_reparam", "without its gain it is worse", "<"),
        ("weight_norm", "sigma_reparam", "weight norm is worse than sigma-Reparam", "<"),
        ("weight_norm_lars", "sigma_reparam", "weight norm in the same recipe is worse too", "<"),
        ("no_norm", "sigma_reparam", "the same recipe alone is worse", "<"),
        ("sigma_reparam_slow_gains", BASELINE, "with slower gains sigma-Reparam is as good as DeiT's recipe", ">="),
    ]
    lines = []
    for name, other, claim, wanted in claims:
        found = ours(arms, name, other)
        if found.count:
            claimed = {name, other} <= PAPER.keys()
            paper = f"; paper {PAPER[name] - PAPER[other]:+.1f}" if claimed else "; not in the paper"
            lines.append(f"- **{verdict(found, wanted, claimed)}**: {claim}. {_plain(found, '+')} points{paper}.")
    plain = ours(arms, "no_norm")
    if plain.count > 1 and not (plain.clear and plain.mean < 0):
        lines.append(
            "- The same recipe without sigma-Reparam is not clearly below DeiT's: without norms, warm-up and Adam "
            "nothing breaks here that sigma-Reparam could mend, so this measures what it costs."
        )
    return lines


def verdict(found: Interval, wanted: str, claimed: bool = True) -> str:
    """Of a claim on a difference: ``<`` below 0, ``>=`` not below it; ``claimed`` by the paper, or asked here."""
    if found.count < 2:
        return "one seed, no verdict"
    if not found.clear:
        return "not told apart"
    holds = (found.mean < 0) == (wanted == "<")
    return ("reproduced" if holds else "not reproduced") if claimed else ("so here" if holds else "the opposite here")


def rate_table(arms: Mapping[str, Arm]) -> list[str]:
    """Validation accuracy at each place of the grid, by optimizer."""
    seed = next(iter(arms.values())).tuning[0]["settings"]["seed"]
    lines = [
        f"Validation accuracy in % by peak learning rate, seed {seed}.",
        f"*Trains*: the unbroken range around the best that stays within {NEAR:g} points of it, and its width; a range",
        "that ends with the grid may be wider; it is one seed, whose noise moves both ends and the best. ✕: the loss",
        "became no number.",
    ]
    for optimizer in dict.fromkeys(arm.recipe["optimizer"] for arm in arms.values()):
        own = [arm for arm in arms.values() if arm.recipe["optimizer"] == optimizer]
        grid = sorted({rate for arm in own for rate, _ in arm.rates()})
        header = [optimizer.capitalize() if optimizer == "adam" else "LARS", *(f"{rate:g}" for rate in grid), "trains"]
        lines += ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        for arm in own:
            stopped = {r["settings"]["learning_rate"] for r in arm.tuning if r["result"]["stopped"] is not None}
            accuracy = dict(arm.rates())
            cells = [f"{accuracy[x]:.1f}{' ✕' if x in stopped else ''}" if x in accuracy else "" for x in grid]
            low, high = arm.trains()
            cells.append(f"{low:g} to {high:g} (x{high / low:.0f}){', best at the edge' if arm.at_edge() else ''}")
            lines.append(f"| {LABELS[arm.name]} | {' | '.join(cells)} |")
    return lines


def curve_table(arms: Mapping[str, Arm]) -> list[str]:
    """Ends and extremes of the curves, means over seeds."""
    lines = [
        "Of the reported runs, mean and 95 % interval; of sharpness the geometric mean and the range. Entropy is",
        "normalised by log of the keys: 1 is uniform, 0 one key. Sharpness is that of the parameters the optimizer",
        "trains; a reparametrization gives them another scale, and Adam and LARS rescale it too, so compare its course",
        "within an arm before its size between arms.", "",
        "| arm | lowest entropy of a head | mean entropy at the end | sharpness at the start | largest | at the end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, arm in arms.items():
        low = [min(values) for record in arm.reported if (values := _values(record, "entropy_min"))]
        last = [values[-1] for record in arm.reported if (values := _values(record, "entropy_mean"))]
        sharp = [values for record in arm.reported if (values := _values(record, "sharpness"))]
        cells = [_plain(interval(low), digits=3), _plain(interval(last), digits=3)]
        cells += [_geometric([values[0] for values in sharp]), _geometric([max(values) for values in sharp]),
                  _geometric([values[-1] for values in sharp])]  # fmt: skip
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    return lines


def deviations(records: Sequence[Record]) -> list[str]:
    """From the paper's training, as the runs say."""
    found = {key: sorted({str(r["result"][key]) for r in records}) for key in ("steps", "batch_size", "width", "depth")}
    said = {key: ", ".join(values) for key, values in found.items()}
    images = [r["result"]["steps"] * r["result"]["batch_size"] for r in records]
    precision = ", ".join(sorted({r["result"]["precision"] for r in records}))
    return [
        "- Fashion-MNIST (55 000 training images, 28x28; no augmentation but shifts by 2 pixels), not ImageNet-1k",
        f"- a ViT of depth {said['depth']}, width {said['width']} and patches of 4, mean-pooled, not ViT-B",
        f"- {said['steps']} steps of {said['batch_size']} images ({max(images) / 55000:.1f} epochs), not 300 epochs; "
        f"precision {precision}",
        "- LARS (timm's, momentum 0.9, trust coefficient 0.001) adapts gains and biases too; of a gain, a scalar, that "
        "leaves the sign of its gradient",
        "- the gain starts at 1, as the paper has it and its JAX code; its PyTorch code starts at the spectral norm",
        "- LARS takes a tensor of norm 0 as one of norm 1 x its gradient: biases, 0 at the start, first move by the "
        "learning rate times their gradient, in all of its arms",
        "- the arm with slower gains was added after the others had been seen",
        "- sharpness is measured at nine places of a training, on 256 training images, by ten Hessian products",
        "- query, key and value of the fused projection have a gain each; the singular vectors follow once a step",
        "- the loss is not smoothed, and there is no mixup, cutmix, random erasing or stochastic depth in any arm",
    ]


def draw(arms: Mapping[str, Arm], path: Path) -> None:
    """Accuracy over learning rate, then the curves of the reported runs: each seed thin, their mean thick."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for name, arm in arms.items():
        best = max(accuracy for _, accuracy in arm.rates())
        axes[0, 0].plot(
            [rate / arm.best for rate, _ in arm.rates()], [accuracy for _, accuracy in arm.rates()], "o-", markersize=4,
            color=COLOURS[name], label=f"{LABELS[name]} ({best:.1f} at {arm.best:g})",
        )  # fmt: skip
        for axis, (key, label) in zip(axes.flat[1:], CURVES.items(), strict=True):
            for record in arm.reported:
                axis.plot(*_points(record, key), color=COLOURS[name], alpha=0.3, linewidth=0.8)
            axis.plot(*_mean_curve(arm.reported, key), color=COLOURS[name], linewidth=1.8)
            axis.set(xlabel="step", ylabel=label)
    axes[0, 0].set(xscale="log", xlabel="learning rate / best of the arm", ylabel="validation accuracy, %")
    axes[1, 1].set_yscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    if arms:
        axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Every run in a line; the curves stay in its file."""
    columns = ("val_accuracy", "test_accuracy", "stopped", "steps")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "learning_rate", "seed", *columns, "seconds"])
        for record in records:
            result = [record["result"][column] for column in columns]
            writer.writerow([*record["settings"].values(), *result, round(record["seconds"], 2)])


def _points(record: Record, key: str) -> tuple[list[int], list[float]]:
    known = [(step, value) for step, value in record["result"][key] if value is not None and math.isfinite(value)]
    return [step for step, _ in known], [value for _, value in known]


def _values(record: Record, key: str) -> list[float]:
    return _points(record, key)[1]


def _mean_curve(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """At the steps that every run has."""
    curves = [dict(zip(*_points(record, key), strict=True)) for record in records]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return steps, [statistics.mean(curve[step] for curve in curves) for step in steps]


def _difference(arms: Mapping[str, Arm], name: str) -> str:
    found = ours(arms, name)
    if name == BASELINE or not found.count:
        return ""
    return f"**{_plain(found, '+')}**" if found.clear else _plain(found, "+")


def _plain(found: Interval, sign: str = "", digits: int = 2) -> str:
    if not found.count:
        return ""
    mean = f"{found.mean:{sign}.{digits}f}"
    return f"{mean} ± {found.half:.{digits}f}" if found.count > 1 else mean


def _geometric(values: Sequence[float]) -> str:
    """Geometric mean, and the range."""
    positive = [value for value in values if value > 0]
    if not positive:
        return ""
    return f"{statistics.geometric_mean(positive):.3g} ({min(positive):.3g} to {max(positive):.3g})"


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.1f}"
