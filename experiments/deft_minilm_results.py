"""DEFT on MiniLM: page, table and picture, written from stored runs alone."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.evidence import Interval, Record, Store, interval, paired, provenance

Cell = tuple[str, str, str]  # task, tuning, activation

NAMES = {"bbc": "BBC News", "movies": "movie reviews", "full": "whole model", "lora": "LoRA", "gelu": "GELU",
         "relu": "ReLU"}  # fmt: skip
MEASURES = {"density_padded": "as the paper: ≠ 0, with padding", "density": "≠ 0, without padding",
            "large": "large, without padding"}  # fmt: skip
PAPER = (("RoBERTa-Large, GLUE, at most (v1)", 50.72), ("RoBERTa-Large, GLUE, at most (v2)", 44.94),
         ("Flan-T5-XXL, SQuAD, encoder", 53.19), ("Flan-T5-XXL, SQuAD, decoder", 90.60))  # fmt: skip
COLOURS, MARKERS = {"gelu": "#0072b2", "relu": "#d55e00"}, {"none": "o", "paper": "X", "density": "s", "target": "^"}
WANTED, COST = 50.0, 1.0  # percent lower density, points of accuracy
FIELDS = ("task", "tuning", "activation", "arm", "epsilon", "weight", "target", "seed")


def choose(records: Sequence[Record], cell: Mapping[str, str], tuning_seed: int, allowed: float) -> dict | None:
    """The sparsest setting of a cell's grid that costs at most ``allowed`` validation accuracy; None if none does."""
    place = cell["task"], cell["tuning"], cell["activation"]
    own = [r for r in records if cell_of(r) == place and r["settings"]["seed"] == tuning_seed]
    plain = next((r["result"]["val_accuracy"] for r in own if r["settings"]["arm"] == "none"), 1.0)
    tried = [r for r in own if r["settings"]["arm"] == "density"]
    # accuracies are counts: 0.01 less must not fail by rounding
    good = [r for r in tried if r["result"]["val_accuracy"] >= plain - allowed - 1e-9]
    if not good:
        return None
    best = min(good, key=lambda record: record["result"]["val_large"])
    return arm_of(best)


@dataclass(frozen=True)
class Compared:
    """An arm beside a plain fine-tuning: paired over seeds, in points of test accuracy and percent of the density."""

    accuracy: Interval
    lower: Mapping[str, Interval]  # by measure

    def verdict(self, measure: str = "density_padded") -> str:
        """Whether the density is halved within a point of accuracy, by the means and by the intervals."""
        lower = self.lower[measure]
        if lower.mean < WANTED or self.accuracy.mean < -COST:
            return "no"
        sure = (
            lower.count > 1 and lower.mean - lower.half >= WANTED and self.accuracy.mean - self.accuracy.half >= -COST
        )
        return "**yes**" if sure else "yes, on average"


@dataclass(frozen=True)
class Arm:
    """Reported runs of one setting in a cell, by seed."""

    cell: Cell
    settings: Mapping[str, Any]
    results: Mapping[int, Mapping[str, Any]]

    @property
    def label(self) -> str:
        """As the tables say it."""
        given = self.settings
        return {
            "none": "plain", "paper": "the public code's loss: ε 1e-07, weight 1, padding in it",
            "density": f"chosen: ε {given.get('epsilon', 0):g}, weight {given.get('weight', 0):g}",
            "target": f"controller, density {given.get('target', 0):g}",
        }[given["arm"]]  # fmt: skip

    def percent(self, quantity: str) -> dict[int, float]:
        """By seed."""
        return {seed: 100 * result[f"test_{quantity}"] for seed, result in self.results.items()}

    def mean(self, quantity: str) -> Interval:
        """Over seeds, in percent."""
        return interval(list(self.percent(quantity).values()))

    def against(self, plain: "Arm") -> Compared:
        """Beside a plain fine-tuning."""
        lower = {
            measure: interval([
                100 * (1 - own[seed] / base[seed])
                for own, base in [(self.percent(measure), plain.percent(measure))]
                for seed in sorted(own.keys() & base.keys())
            ])
            for measure in MEASURES
        }  # fmt: skip
        return Compared(paired(self.percent("accuracy"), plain.percent("accuracy")), lower)


def write_results(store: Store, folder: Path, tuning_seed: int, allowed: float) -> Path:
    """Write ``deft_minilm.csv``, ``.png`` and ``.md`` and return the page."""
    records = store.read()
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(records, folder / "deft_minilm.csv")
    cells = reported(records, tuning_seed, allowed)
    draw(cells, records, tuning_seed, folder / "deft_minilm.png")
    lines = [
        "# Half the activations at equal accuracy? DEFT on MiniLM", "",
        f"MiniLM (BERT, 6 layers, 22.7 million parameters) fine-tuned on {said(records, 0)}; {said(records, 1)};",
        f"with {said(records, 2)}. The density loss of DEFT (Runwal et al. 2024, arXiv 2402.01911) acts on the input",
        "of each MLP's down-projection. Every cell tries a grid of ε and weight with one seed; *chosen* is its",
        f"sparsest, by large activations, within {100 * allowed:g} point of validation accuracy, run with the seeds",
        f"that are reported on the test texts. *Large* counts activations above {100 * limit_of(records):g} % of the",
        "largest of their token; *accuracy without the small* is measured with the rest set to 0. Densities are means",
        "over layers. ± is the 95 % interval over seeds (Student's t) on the same test texts, paired in differences.",
        "",
    ]  # fmt: skip
    if cells:
        chosen = {cell: choose(records, dict(zip(FIELDS, cell, strict=False)), tuning_seed, allowed) for cell in cells}
        lines += ["## What it says", "", *reading(cells, chosen), "", "![accuracy over density](deft_minilm.png)", ""]
        for task in dict.fromkeys(cell[0] for cell in cells):
            own = {cell: arms for cell, arms in cells.items() if cell[0] == task}
            lines += [f"## {NAMES[task]}", "", *table(own), ""]
        lines += ["## Beside the paper", "", *paper_table(cells), ""]
        lines += ["## ReLU against the model as it comes", "", *relu_table(cells), ""]
        lines += ["## The grid, one seed", "", *grid_table(records, tuning_seed), ""]
        lines += ["## What differs from the paper", "", *deviations(records), ""]
    lines += ["## Where the numbers come from", "", "- `python -m experiments.deft_minilm`", *origin(records)]
    (folder / "deft_minilm.md").write_text("\n".join(lines) + "\n")
    return folder / "deft_minilm.md"


def said(records: Sequence[Record], place: int) -> str:
    """The tasks, tunings or activations that were run."""
    return " and ".join(NAMES[name] for name in sorted({cell_of(record)[place] for record in records})) or "nothing yet"


def limit_of(records: Sequence[Record]) -> float:
    """Share of a token's largest activation above which one counts as large."""
    return next((record["result"]["limit"] for record in records), 0.01)


def reported(records: Sequence[Record], tuning_seed: int, allowed: float) -> dict[Cell, list[Arm]]:
    """Arms of each cell that has a plain one, that first; of the grid only what was chosen."""
    cells: dict[Cell, list[Arm]] = {}
    for cell in sorted({cell_of(record) for record in records}):
        own = [r for r in records if cell_of(r) == cell and r["settings"]["seed"] != tuning_seed]
        by_arm: dict[tuple, dict[int, Mapping[str, Any]]] = {}
        for record in own:
            by_arm.setdefault(tuple(arm_of(record).items()), {})[record["settings"]["seed"]] = record["result"]
        arms = [Arm(cell, dict(settings), results) for settings, results in by_arm.items()]
        arms.sort(key=lambda arm: list(MARKERS).index(arm.settings["arm"]))
        if arms and arms[0].settings["arm"] == "none":
            cells[cell] = arms
    return cells


def table(cells: Mapping[Cell, Sequence[Arm]]) -> list[str]:
    """Accuracy and densities of every arm, with differences to the plain one of its cell."""
    header = ["", "arm", "seeds", "test accuracy, %", "- plain, points"]
    for measure in MEASURES.values():
        header += [f"density {measure}, %", "lower by, %"]
    header += ["accuracy without the small, %", "halved within a point?"]
    lines = row(header, head=True)
    for cell, arms in cells.items():
        for arm in arms:
            compared = arm.against(arms[0]) if arm is not arms[0] else None
            cells_of_row = [in_words(cell[1:]), arm.label, str(len(arm.results)), plus(arm.mean("accuracy"), 1)]
            cells_of_row.append(plus(compared.accuracy, 1, "+") if compared else "")
            for measure in MEASURES:
                cells_of_row += [plus(arm.mean(measure), 1), plus(compared.lower[measure], 1) if compared else ""]
            cells_of_row += [plus(arm.mean("large_accuracy"), 1), compared.verdict() if compared else ""]
            lines += row(cells_of_row)
    return lines


def reading(cells: Mapping[Cell, Sequence[Arm]], chosen: Mapping[Cell, Any]) -> list[str]:
    """What the intervals say, in words; ``chosen`` holds the setting of each cell, or None."""
    lines = []
    for measure, name in MEASURES.items():
        verdicts = {cell: verdict_of(arms, measure) for cell, arms in cells.items()}
        sure = [in_words(cell) for cell, verdict in verdicts.items() if verdict == "**yes**"]
        likely = [in_words(cell) for cell, verdict in verdicts.items() if verdict == "yes, on average"]
        rest = [in_words(cell) for cell, verdict in verdicts.items() if verdict == "no"]
        lines += [
            f"- **Density {name}**: lower by {WANTED:g} % or more within {COST:g} point of accuracy, with the whole "
            f"intervals, in {len(sure)} of {len(cells)} cells ({'; '.join(sure) or 'none'}); by the means alone in "
            f"{len(likely)} more ({'; '.join(likely) or 'none'}); not in {'; '.join(rest) or 'none'}."
        ]
    lines += own_activation(cells)
    failed = [in_words(cell) for cell in cells if not chosen[cell]]
    if failed:
        lines += [f"- No setting of the grid was accurate enough to be chosen in {'; '.join(failed)}."]
    for cell, arms in cells.items():
        lines += [
            f"- A controller asked for a density of {100 * arm.settings['target']:g} % in {in_words(cell)} ended at "
            f"{plus(arm.mean('density'), 1)} % on the test texts."
            for arm in arms if arm.settings["arm"] == "target"
        ]  # fmt: skip
    return lines


def own_activation(cells: Mapping[Cell, Sequence[Arm]]) -> list[str]:
    """What was reached with the activation that the model comes with, as the paper's models keep theirs."""
    found, failed = [], []
    for cell, arms in cells.items():
        for arm in arms[1:] if cell[2] == "gelu" else ():
            compared = arm.against(arms[0])
            lower = compared.lower["density_padded"]
            if compared.accuracy.mean >= -COST:
                found.append((lower.mean, f"{plus(lower, 1)} % ({in_words(cell)}, {arm.label})"))
            elif lower.mean >= WANTED:
                accuracy = plus(arm.mean("accuracy"), 1)
                failed.append(f"{in_words(cell)}, {arm.label}: {plus(lower, 1)} % at an accuracy of {accuracy} %")
    lines = []
    if found:
        lines += [
            f"- **GELU, the activation MiniLM comes with**: at most {max(found)[1]} lower within {COST:g} point of "
            "accuracy; the cells above that halve it have ReLU."
        ]
    return lines + [f"- Halved, and no model any more: {text}." for text in failed]


def verdict_of(arms: Sequence[Arm], measure: str) -> str:
    """The best verdict of a cell's arms."""
    found = {arm.against(arms[0]).verdict(measure) for arm in arms[1:]}
    return next((verdict for verdict in ("**yes**", "yes, on average") if verdict in found), "no")


def paper_table(cells: Mapping[Cell, Sequence[Arm]]) -> list[str]:
    """Reductions as the paper measures them, its numbers first."""
    lines = row(["", "density lower by, %", "accuracy, points"], head=True)
    for name, lower in PAPER:
        lines += row([f"paper: {name}", f"{lower:.2f}", ""])
    for cell, arms in cells.items():
        for arm in arms[1:]:
            compared = arm.against(arms[0])
            numbers = [plus(compared.lower["density_padded"], 1), plus(compared.accuracy, 1, "+")]
            lines += row([f"{in_words(cell)}, {arm.label}", *numbers])
    return lines


def relu_table(cells: Mapping[Cell, Sequence[Arm]]) -> list[str]:
    """ReLU, alone and with the density loss, against the plain fine-tuning with GELU."""
    lines = [
        "ReLU has zeros of its own, before any penalty, and another accuracy: both together, against plain fine-tuning",
        "with GELU.", "",
        *row(["", "arm", "accuracy - plain GELU, points", "density ≠ 0, without padding, lower by, %",
              "large, lower by, %", "halved within a point?"], head=True),
    ]  # fmt: skip
    for cell, arms in cells.items():
        plain = cells.get((*cell[:2], "gelu"), ())
        if cell[2] != "relu" or not plain:
            continue
        for arm in arms:
            compared = arm.against(plain[0])
            lines += row([
                in_words(cell[:2]), arm.label, plus(compared.accuracy, 1, "+"), plus(compared.lower["density"], 1),
                plus(compared.lower["large"], 1), compared.verdict("density"),
            ])  # fmt: skip
    return lines


def grid_table(records: Sequence[Record], tuning_seed: int) -> list[str]:
    """Validation accuracy and densities of what was tried."""
    lines = row(["", "ε", "weight", "validation accuracy, %", "≠ 0, without padding, %", "large, %"], head=True)
    tuning = [r for r in records if r["settings"]["seed"] == tuning_seed]
    order = sorted(tuning, key=lambda r: (cell_of(r), r["settings"].get("epsilon", 0), r["settings"].get("weight", 0)))
    for record in order:
        settings, result = record["settings"], record["result"]
        penalty = [f"{settings[key]:g}" if key in settings else "" for key in ("epsilon", "weight")]
        numbers = [f"{100 * result[f'val_{key}']:.1f}" for key in ("accuracy", "density", "large")]
        lines += row([in_words(cell_of(record)), *penalty, *numbers])
    return lines


def deviations(records: Sequence[Record]) -> list[str]:
    """What our runs do in another way than the paper and its public code."""
    results = {record["settings"]["task"]: record["result"] for record in records}
    some = next(iter(results.values()))
    trainings = "; ".join(
        f"{NAMES[task]}: {result['sizes']['train']} texts, {result['steps']} steps of {result['batch_size']} texts of "
        f"{result['length']} tokens ({result['steps'] * result['batch_size'] / result['sizes']['train']:.1f} epochs)"
        for task, result in sorted(results.items())
    )
    rates = {NAMES[r["settings"]["tuning"]]: r["result"]["recipe"]["learning_rate"] for r in records}
    lora = some["lora"]
    lines = [
        "- Model and data: MiniLM for RoBERTa-Large and T5, text classification for GLUE and SQuAD.",
        f"- {trainings}. The public code trains 10 epochs of 64 or 128.",
        f"- AdamW, linear warm-up over 6 % and linear decay as there; peak learning rates "
        f"{', '.join(f'{name} {rate:g}' for name, rate in sorted(rates.items()))}, from pilots, where it has 3e-4.",
        f"- LoRA of rank {lora['rank']}, alpha {lora['alpha']}, dropout {lora['dropout']:g} as there, on "
        f"{', '.join(lora['targets'])}, where it has query and value.",
        "- Training the whole model is not in the paper; ReLU for GELU, the choice of ε and the controller are ours.",
        "- The loss leaves padding out, but for the arm that repeats the public code's; it is computed in float32.",
        "- The grid ends at a weight of 0.3, which most cells chose; the public code's weight of 1 is outside.",
        f"- Weights are stored in {some['weights']}; trained in {some['precision']}, measured in float32.",
    ]  # fmt: skip
    if "bbc" in results:
        lines += ["- The articles of BBC News fill their length, so padding makes no difference there."]
    return lines


def origin(records: Sequence[Record]) -> list[str]:
    """Hardware, versions, commit, seeds, tokens, wall time."""
    if not records:
        return ["- no runs yet"]
    libraries = sorted({record["result"]["libraries"] for record in records})
    tokens = sum(r["result"]["steps"] * r["result"]["batch_size"] * r["result"]["length"] for r in records)
    seeds = sorted({record["settings"]["seed"] for record in records})
    facts = [
        *provenance(records),
        f"libraries: {'; '.join(libraries)}",
        f"seeds {seeds}, {tokens / 1e6:.1f} million tokens",
    ]
    return [f"- {fact}" for fact in facts]


def draw(cells: Mapping[Cell, Sequence[Arm]], records: Sequence[Record], tuning_seed: int, path: Path) -> None:
    """Test accuracy over density, a panel for each task and tuning; the grid is faint."""
    panels = list(dict.fromkeys(cell[:2] for cell in cells)) or [("movies", "full")]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 3.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        own = [record for record in records if cell_of(record)[:2] == panel]
        for record in own:
            if record["settings"]["seed"] == tuning_seed:
                axis.plot(100 * record["result"]["test_density"], 100 * record["result"]["test_accuracy"], ".",
                          alpha=0.4, color=COLOURS[record["settings"]["activation"]])  # fmt: skip
        for activation, colour in COLOURS.items():
            for arm in cells.get((*panel, activation), ()):
                x, y = arm.mean("density"), arm.mean("accuracy")
                bars = [[bar.half] if bar.count > 1 else None for bar in (x, y)]
                kind = arm.settings["arm"]
                axis.errorbar([x.mean], [y.mean], xerr=bars[0], yerr=bars[1], color=colour, marker=MARKERS[kind],
                              markersize=8, markeredgecolor="white", elinewidth=1, capsize=2, linestyle="",
                              label=f"{NAMES[activation]}, {SHORT[kind]}")  # fmt: skip
                if kind == "none":
                    axis.axhline(y.mean - COST, color=colour, linestyle=":", linewidth=1)
        if own:  # the interval of two seeds would flatten everything else
            seen = [100 * record["result"]["test_accuracy"] for record in own]
            axis.set_ylim(min(seen) - 2, max(seen) + 2)
        axis.set(
            xscale="log", xlabel="density ≠ 0, without padding, %", ylabel="test accuracy, %", title=in_words(panel)
        )
        axis.grid(alpha=0.3)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if handles:
            axis.legend(handles.values(), handles.keys(), frameon=False, fontsize=7)
    figure.suptitle("dotted: a point below plain with that activation; faint: the grid, one seed", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


SHORT = {"none": "plain", "paper": "public code's setting", "density": "chosen", "target": "controller"}


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Every run in a line."""
    names = [f"{part}_{key}" for part in ("val", "test") for key in ("accuracy", *MEASURES, "large_accuracy")]
    layers = max((len(record["result"]["test_layers"]) for record in records), default=0)
    by_layer = [f"test_density_{layer}" for layer in range(layers)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *names, *by_layer, "seconds"], restval="")
        writer.writeheader()
        for record in records:
            result = record["result"]
            numbers = {name: result[name] for name in names} | dict(zip(by_layer, result["test_layers"], strict=False))
            writer.writerow({**record["settings"], **numbers, "seconds": round(record["seconds"], 2)})


def cell_of(record: Record) -> Cell:
    """Task, tuning and activation of a run."""
    return tuple(record["settings"][key] for key in ("task", "tuning", "activation"))  # type: ignore[return-value]


def arm_of(record: Record) -> dict[str, Any]:
    """Settings of a run without its cell and seed."""
    return {key: value for key, value in record["settings"].items() if key in FIELDS[3:-1]}


def in_words(parts: Sequence[str]) -> str:
    """A cell, or parts of one."""
    return ", ".join(NAMES[part] for part in parts)


def plus(found: Interval, digits: int, sign: str = "") -> str:
    """Mean and half width."""
    half = f" ± {found.half:.{digits}f}" if found.count > 1 else ""
    return f"{found.mean:{sign}z.{digits}f}{half}"


def row(cells: Sequence[str], head: bool = False) -> list[str]:
    """A line of a table, with the one that follows a header."""
    line = f"| {' | '.join(cells)} |"
    return [line, f"|{' --- |' * len(cells)}"] if head else [line]
