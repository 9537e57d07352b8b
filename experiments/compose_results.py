"""Main effects and interactions of the methods, as a page, a table and a picture: written from stored runs alone."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.evidence import Interval, Record, Store, interval, provenance

METHODS = ("sigma_reparam", "aem", "deft", "z_loss")
LABELS = {"sigma_reparam": "sigma-Reparam", "aem": "AEM", "deft": "density loss", "z_loss": "z-loss"}
TASKS = {"vit": "ViT on digits", "lm": "Llama on Python's documentation"}
QUANTITIES = {"loss": "held-out loss", "accuracy": "accuracy", "entropy": "attention entropy", "density": "density",
              "z": "z^2"}  # fmt: skip

Effect = tuple[str, ...]  # of one method, or the interaction of two


def write_results(store: Store, folder: Path) -> Path:
    """Write ``compose.csv``, ``compose.png`` and ``compose.md`` and return the page."""
    records = store.read()
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(records, folder / "compose.csv")
    effects = {task: effects_of(records, task) for task in TASKS}
    draw(effects, folder / "compose.png")
    lines = [
        "# Four methods together: do they help or fight?", "",
        "Every subset of sigma-Reparam, attention-entropy maximisation (AEM), the density loss (DEFT) and the z-loss,",
        "with paired seeds. An effect is the mean over the eight pairs of arms that differ in one method; an",
        "interaction of two is half of what the effect of one changes by when the other is on. ± is the 95 % interval",
        "over seeds (Student's t); **bold** leaves out 0. A negative effect on the loss is an improvement.", "",
        "![effects on the loss](compose.png)",
    ]  # fmt: skip
    for task, by_quantity in effects.items():
        if by_quantity:
            lines += ["", f"## {TASKS[task]}", "", *table(by_quantity), "", *reading(by_quantity["loss"])]
    if records:
        lines += ["", "## What was trained", "", *trained(records)]
    lines += ["", "## Where the numbers come from", "", "- `python -m experiments.compose`"]
    lines += [f"- {line}" for line in provenance(records)] if records else ["- no runs yet"]
    (folder / "compose.md").write_text("\n".join(lines) + "\n")
    return folder / "compose.md"


def trained(records: Sequence[Record]) -> list[str]:
    """Sizes, steps and seeds of each task, and the weights, as the runs say."""
    lines = []
    for task, title in TASKS.items():
        own = [record for record in records if record["settings"]["task"] == task]
        if own:
            first = min((record["result"] for record in own), key=lambda result: result["parameters"])
            batch = f"{first['batch_size']} images" if task == "vit" else (
                f"{first['batch_size']} windows of {first['length']} bytes")  # fmt: skip
            seeds = sorted({record["settings"]["seed"] for record in own})
            lines.append(
                f"- {title}: {first['parameters'] / 1e6:.2f} million parameters, {first['steps']} steps of {batch}, "
                f"seeds {', '.join(map(str, seeds))}"
            )
    weights = records[0]["result"]["weights"]
    said = ", ".join(f"{LABELS[method]} {weight:g}" for method, weight in weights.items())
    return [
        *lines,
        f"- weights: {said}; sigma-Reparam starts from the function it finds",
        "- one weight for each method and one learning rate for all arms: what others would give is not asked, and "
        "sigma-Reparam wants a higher one",
        "- no paper has this design",
    ]


def effects_of(records: Sequence[Record], task: str) -> dict[str, dict[Effect, Interval]]:
    """Main effects and interactions by quantity, over the seeds that have all sixteen arms."""
    by_seed: dict[int, dict[frozenset[str], Mapping[str, float]]] = defaultdict(dict)
    for record in records:
        if record["settings"]["task"] == task:
            on = frozenset(record["settings"]["arm"].split("+")) - {"none"}
            by_seed[record["settings"]["seed"]][on] = record["result"]
    complete = [arms for _, arms in sorted(by_seed.items()) if len(arms) == 2 ** len(METHODS)]
    if not complete:
        return {}
    asked = [(method,) for method in METHODS] + list(combinations(METHODS, 2))
    return {
        quantity: {effect: interval([contrast(arms, effect, quantity) for arms in complete]) for effect in asked}
        for quantity in QUANTITIES
        if all(quantity in result for arms in complete for result in arms.values())
    }


def contrast(arms: Mapping[frozenset[str], Mapping[str, float]], effect: Effect, quantity: str) -> float:
    """Of a full design: mean where an even number of the effect's methods is off, minus mean where it is odd."""
    signed = [(-1) ** len(set(effect) - on) * result[quantity] for on, result in arms.items()]
    return sum(signed) / (len(signed) / 2)


def table(by_quantity: Mapping[str, Mapping[Effect, Interval]]) -> list[str]:
    """Effects down, quantities across."""
    header = ["effect", *(QUANTITIES[quantity] for quantity in by_quantity)]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for effect in by_quantity["loss"]:
        cells = [by_quantity[quantity][effect] for quantity in by_quantity]
        shown = [f"**{cell}**" if cell.clear else str(cell) for cell in cells]
        lines.append(f"| {name(effect)} | {' | '.join(shown)} |")
    return lines


def reading(loss: Mapping[Effect, Interval]) -> list[str]:
    """What the intervals of the loss say, in words."""
    pairs = {effect: found for effect, found in loss.items() if len(effect) == 2 and found.clear}
    helping = [name(effect) for effect, found in pairs.items() if found.mean < 0]
    fighting = [name(effect) for effect, found in pairs.items() if found.mean > 0]
    return [
        f"Together better than the sum of their effects: {', '.join(helping) or 'no pair'}. Worse: "
        f"{', '.join(fighting) or 'no pair'}. The other {6 - len(pairs)} pairs add up, within the intervals."
    ]


def name(effect: Effect) -> str:
    """As the table says it."""
    return " x ".join(LABELS[method] for method in effect)


def draw(effects: Mapping[str, Mapping[str, Mapping[Effect, Interval]]], path: Path) -> None:
    """Effects on the loss, a panel for each task."""
    shown = {task: found["loss"] for task, found in effects.items() if found}
    figure, axes = plt.subplots(1, max(1, len(shown)), figsize=(6 * max(1, len(shown)), 4), squeeze=False)
    for axis, (task, loss) in zip(axes[0], shown.items(), strict=False):
        places = range(len(loss))[::-1]
        axis.axvline(0, color="#999999", linewidth=1)
        axis.errorbar(
            [found.mean for found in loss.values()], list(places), xerr=[found.half for found in loss.values()],
            fmt="o", color="#0072b2", capsize=3,
        )  # fmt: skip
        axis.set_yticks(list(places), [name(effect) for effect in loss])
        axis.set_xlabel("effect on the held-out loss (left is better)")
        axis.set_title(TASKS[task])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Every run in a line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["task", "seed", "arm", *QUANTITIES, "seconds"], restval="",
                                extrasaction="ignore")  # fmt: skip
        writer.writeheader()
        for record in records:
            writer.writerow({**record["settings"], **record["result"], "seconds": round(record["seconds"], 2)})
