"""What attention-entropy maximisation did to the bags, as a page, a table and a picture: from stored runs alone."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.pyplot as plt

from experiments.evidence import Interval, Record, Store, interval, paired, provenance

ARMS = {
    "none": "none", "aem_constant": "AEM, constant", "aem_cosine": "AEM, cosine", "floor": "entropy floor",
    "target": "entropy controller", "dropout": "dropout", "weight_decay": "weight decay",
    "learning_rate": "learning rate",
}  # fmt: skip
BASELINE = "none"
ROWS = {"restarts": "new starts", **{arm: name for arm, name in ARMS.items() if arm != BASELINE}}
MODELS = {"abmil": "gated ABMIL", "dsmil": "DSMIL", "transformer": "class-token transformer"}
TASKS = {
    "musk1": "MUSK1", "musk2": "MUSK2", "elephant": "Elephant", "ucsb_breast_cancer": "UCSB breast cancer",
}  # fmt: skip
FAMILIES = {"images": "Fashion-MNIST bags", "classical": "classical sets"}
QUANTITIES = {"auc": "bag AUC", "instance_auc": "instance AUC", "entropy": "attention entropy / log(instances)"}
# ABMIL on ViT-S features (AEM, MICCAI 2025, Table 1), as two public notes on the paper quote it
PAPER = {"CAMELYON16": (0.945, 0.974), "CAMELYON17": (0.853, 0.887), "LBC": (0.831, 0.879)}

Chosen: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]]  # model task arm seed


def write_results(store: Store, folder: Path) -> Path:
    """Write ``aem_mil.csv``, ``aem_mil.png`` and ``aem_mil.md`` and return the page."""
    records = store.read()
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(records, folder / "aem_mil.csv")
    chosen = chosen_of(records)
    draw(chosen, folder / "aem_mil.png")
    lines = [
        "# Does attention-entropy maximisation help multiple-instance models?", "",
        "AEM ([2406.15303](https://arxiv.org/abs/2406.15303)) adds -weight x entropy of a bag's attention to the loss.",
        "Here it stands beside other ways to hold the entropy and beside usual remedies. Every arm has as many trials;",
        "each seed's own validation bags choose one, by AUC, and its test bags are reported. Differences are from the",
        "same start without a regularizer, paired by seed: the same bags, the same first weights. *New starts* are as",
        "many trials of nothing: what choosing gives by itself, and what a gain must be held against. ± is the 95 %",
        "interval over seeds (Student's t); **bold** leaves out 0, as one interval in twenty does by chance.",
        *few_seeds(chosen), "",
        *reading(chosen), "", "![differences from no regularizer](aem_mil.png)", "",
        "## Bag AUC, mean over the tasks of a family", "", "Difference from no regularizer.", "",
        *pooled_table(chosen, "auc"),
    ]  # fmt: skip
    for model in chosen:
        lines += ["", f"## {MODELS[model]}: bag AUC by task", "", *task_table(chosen, model, "auc")]
    lines += ["", "## What the attention does", ""]
    for quantity, name in (*list(QUANTITIES.items())[1:], ("loss", "bag cross-entropy")):
        lines += [f"Difference in {name}:", "", *pooled_table(chosen, quantity), ""]
    lines += ["Without a regularizer:", "", *level_table(chosen)]
    lines += ["", "## Each strength", "", *strengths(records), "", "## The paper", "", *paper(chosen)]
    lines += ["", "## What differs from the papers", "", *deviations(records)]
    lines += ["", "## Where the numbers come from", "", "- `python -m experiments.aem_mil`"]
    lines += [f"- {line}" for line in provenance(records)] if records else ["- no runs yet"]
    if records:
        seeds = sorted({record["settings"]["seed"] for record in records})
        trained = sum(len(record["result"]["trials"]) for record in records)
        lines += [f"- seeds {', '.join(map(str, seeds))}; {trained} trainings; minutes by the clock, of all processes"]
    (folder / "aem_mil.md").write_text("\n".join(lines) + "\n")
    return folder / "aem_mil.md"


# --- choice and differences ------------------------------------------------------------------------------------------


def choose(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The trial of the highest validation AUC, of equals that of the lowest validation loss."""
    return max(trials, key=lambda trial: (trial["val"]["auc"], -trial["val"]["loss"]))


def chosen_of(records: Iterable[Record]) -> Chosen:
    """Test results of the chosen trials; the baseline is the first start of the arm without a regularizer."""
    found: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for record in records:
        run, trials = record["settings"], record["result"]["trials"]
        arms = found[run["model"]][run["task"]]
        if run["arm"] == BASELINE:
            arms[BASELINE][run["seed"]] = trials[0]["test"]
        arms["restarts" if run["arm"] == BASELINE else run["arm"]][run["seed"]] = choose(trials)["test"]
    return {
        model: {task: found[model][task] for task in sorted(found[model], key=task_order)}
        for model in MODELS
        if model in found
    }


def task_order(task: str) -> tuple[int, int, str]:
    """Bags of images first, by their number."""
    kind, _, number = task.partition("_")
    return (list(TASKS).index(task) + 1 if task in TASKS else 0, int(number) if number.isdigit() else 0, kind)


def family(task: str) -> str:
    """``images`` or ``classical``."""
    return "classical" if task in TASKS else "images"


def difference(arms: Mapping[str, Any], arm: str, quantity: str, baseline: str = BASELINE) -> Interval:
    """Of an arm from the baseline in one task."""
    ours, theirs = (of(arms.get(name, {}), quantity) for name in (arm, baseline))
    return paired(ours, theirs)


def pooled(tasks: Mapping[str, Any], arm: str, quantity: str, which: str, baseline: str = BASELINE) -> Interval:
    """By seed the mean difference over the tasks of a family, over the seeds that have them all in both arms."""
    pairs = [
        (of(arms.get(arm, {}), quantity), of(arms.get(baseline, {}), quantity))
        for task, arms in tasks.items()
        if family(task) == which and of(arms.get(baseline, {}), quantity)
    ]
    if not pairs:
        return interval([])
    seeds = set.intersection(*(set(ours) & set(theirs) for ours, theirs in pairs))
    return interval([sum(a[seed] - b[seed] for a, b in pairs) / len(pairs) for seed in sorted(seeds)])


def of(seeds: Mapping[int, Mapping[str, float]], quantity: str) -> dict[int, float]:
    """A quantity by seed, where it is known."""
    return {seed: result[quantity] for seed, result in seeds.items() if quantity in result}


def shown(found: Interval) -> str:
    """For a cell of a table."""
    if not found.count:
        return ""
    return f"**{found}**" if found.clear else str(found)


def few_seeds(chosen: Chosen) -> list[str]:
    """A warning where intervals are for the form's sake."""
    counts = [len(seeds) for tasks in chosen.values() for arms in tasks.values() for seeds in arms.values()]
    return (
        [f"Some cells have {min(counts)} seeds only: no interval of these means much."]
        if min(counts, default=9) < 5
        else []
    )


# --- words -----------------------------------------------------------------------------------------------------------


def reading(chosen: Chosen) -> list[str]:
    """What the intervals say, in words."""
    lines = []
    for arm in ROWS:
        cells = [difference(arms, arm, "auc") for tasks in chosen.values() for arms in tasks.values()]
        cells = [cell for cell in cells if cell.count > 1]
        if not cells:
            continue
        up, down = count(cells)
        fair = [
            difference(arms, arm, "auc", "restarts") for tasks in chosen.values() for arms in tasks.values()
            if arm != "restarts"
        ]  # fmt: skip
        fair = [cell for cell in fair if cell.count > 1]
        more, less = count(fair)
        against = f"; than new starts: {more} and {less}" if fair else ", though it is nothing but a choice"
        by_model = [
            f"{MODELS[model]} {pooled(tasks, arm, 'auc', 'images')}"
            for model, tasks in chosen.items()
            if pooled(tasks, arm, "auc", "images").clear
        ]
        clear = f"; over the image bags: {', '.join(by_model)}" if by_model else "; over the image bags: none is clear"
        lines.append(
            f"- {ROWS[arm]}: bag AUC clearly higher than one start in {up} and clearly lower in {down} of {len(cells)} "
            f"tasks and models{against}{clear}."
        )
    for rival in ("restarts", "dropout", "learning_rate"):
        against = []
        for model, tasks in chosen.items():
            found = pooled(tasks, "aem_cosine", "auc", "images", baseline=rival)
            word = ("better" if found.mean > 0 else "worse") if found.clear else "not clearly different"
            against += [f"{MODELS[model]} {found}, {word}"] if found.count > 1 else []
        lines += [f"- AEM with a cosine against {ROWS[rival]}, image bags: {'; '.join(against)}."] if against else []
    return lines or ["Too few runs for a difference."]


def count(cells: Sequence[Interval]) -> tuple[int, int]:
    """Clearly above 0, and clearly below."""
    up, down = (sum(cell.clear and sign * cell.mean > 0 for cell in cells) for sign in (1, -1))
    return up, down


def paper(chosen: Chosen) -> list[str]:
    """The paper's gains beside ours."""
    lines = ["| ABMIL, bag AUC | without | with AEM | difference |", "| --- | --- | --- | --- |"]
    lines += [f"| {name}, paper | {a:.3f} | {b:.3f} | {b - a:+.3f} |" for name, (a, b) in PAPER.items()]
    for task, arms in chosen.get("abmil", {}).items():
        base, ours = (interval(list(of(arms.get(arm, {}), "auc").values())) for arm in (BASELINE, "aem_cosine"))
        if base.count and ours.count:
            found = difference(arms, "aem_cosine", "auc")
            lines.append(f"| {label(task)}, here, cosine | {base.mean:.3f} | {ours.mean:.3f} | {shown(found)} |")
    found = pooled(chosen.get("abmil", {}), "aem_cosine", "auc", "images")
    if found.count < 2:
        return lines
    fair = pooled(chosen["abmil"], "aem_cosine", "auc", "images", baseline="restarts")
    base, word = (found, "one start") if fair.count < 2 else (fair, "the best of as many starts")
    verdict = "the paper's direction reproduces" if base.mean > 0 else "the paper's direction does not reproduce"
    verdict = f"{verdict}, with a clear interval" if base.clear else "no gain can be told"
    least = min(b - a for a, b in PAPER.values())
    size = "as large as" if found.mean >= least else "smaller than"
    return [
        *lines, "", "The paper's numbers are as two public notes quote its table; its text was not at hand.", "",
        f"Over the image bags AEM is {found} above one start without it, and {base} above {word}: {verdict}. "
        f"The first is {size} the paper's smallest gain, {least:+.3f}.",
    ]  # fmt: skip


def deviations(records: Sequence[Record]) -> list[str]:
    """Where this is not what the papers did."""
    lengths = Counter(
        (family(record["settings"]["task"]) if "fixed" not in record["settings"]["task"] else "fixed lists",
         record["result"]["steps"], record["result"]["batch_size"])
        for record in records
    )  # fmt: skip
    rates = " or ".join(f"{rate:g}" for rate in sorted({record["result"]["learning_rate"] for record in records}))
    steps = "; ".join(f"{FAMILIES.get(name, name)} {steps} steps of {size} bags" for name, steps, size in lengths)
    return [
        "- AEM's slides (CAMELYON16 and 17, LBC) are not public without registration; bags of Fashion-MNIST and four"
        " small sets stand in. Most bags have a few to some tens of instances, slides thousands.",
        "- An instance is 64 principal components of an image, fitted without classes, in place of a pathology encoder"
        " (AEM) or a LeNet trained along (Ilse et al.). MUSK, Elephant and UCSB come as features.",
        f"- AdamW and a cosine as in AEM, but batches of several bags, padded and masked, at {rates}: {steps}. A fixed"
        " length in place of the best epoch.",
        "- Ilse's protocol draws its bags from Fashion-MNIST (target: ankle boot) and adds 100 validation bags; the"
        " fixed lists of Grahn give 2000 of the 12032 training bags to validation.",
        "- MUSK1, MUSK2, Elephant and UCSB: a random split of 60, 20 and 20 % by seed, not ten-fold cross-validation;"
        " at most 64 instances of a bag in a training step.",
        "- A bag of DSMIL is predicted by the mean of its two streams. The transformer is an encoder layer with a class"
        " token, whose row of attention is regularized; the paper's is an attention with one learned query.",
        "- Not blind: common learning rate, steps, scale of the components, the transformer, the controller's ramp and"
        " the baseline (first start, not the best of the starts) were settled after pilots with seeds 0 and 1 had shown"
        " test results, some with AEM.",
        "- Weights go beyond AEM's own, which are 0.001 to 0.2.",
        "- ± holds for these test bags. Seeds draw others in Ilse's protocol; the fixed lists have one test set, and"
        " the four small sets are split anew from the same few bags, so that their intervals are too narrow.",
        "- The controller can raise the entropy and not lower it: a target below what training gives leaves it alone.",
    ]


# --- tables ----------------------------------------------------------------------------------------------------------


def pooled_table(chosen: Chosen, quantity: str) -> list[str]:
    """Arms down; families and models across."""
    columns = [
        (which, model)
        for which in FAMILIES
        for model, tasks in chosen.items()
        if any(family(task) == which and of(arms.get(BASELINE, {}), quantity) for task, arms in tasks.items())
    ]
    lines = row(["arm", *(f"{FAMILIES[which]}: {MODELS[model]}" for which, model in columns)], head=True)
    for arm, name in ROWS.items():
        cells = [shown(pooled(chosen[model], arm, quantity, which)) for which, model in columns]
        lines += row([name, *cells]) if any(cells) else []
    return lines


def task_table(chosen: Chosen, model: str, quantity: str) -> list[str]:
    """Tasks down, arms across."""
    arms = [arm for arm in ROWS if any(arm in found for found in chosen[model].values())]
    lines = row(["task", "none", *(ROWS[arm] for arm in arms)], head=True)
    for task, found in chosen[model].items():
        base = interval(list(of(found.get(BASELINE, {}), quantity).values()))
        lines += row(
            [
                label(task),
                f"{base.mean:.3f}" if base.count else "",
                *(shown(difference(found, arm, quantity)) for arm in arms),
            ]
        )
    return lines


def level_table(chosen: Chosen) -> list[str]:
    """Instance AUC and entropy without a regularizer."""
    lines = row(
        ["task", *(f"{MODELS[model]}: {name}" for model in chosen for name in ("instance AUC", "entropy"))], True
    )
    for task in sorted({task for tasks in chosen.values() for task in tasks}, key=task_order):
        cells = []
        for tasks in chosen.values():
            for quantity in ("instance_auc", "entropy"):
                values = list(of(tasks.get(task, {}).get(BASELINE, {}), quantity).values())
                cells.append(f"{interval(values).mean:.3f}" if values else "")
        lines += row([label(task), *cells])
    return lines


def strengths(records: Sequence[Record]) -> list[str]:
    """Bag AUC of every strength against the same start without a regularizer, whatever the validation bags chose."""
    first: dict[tuple[Any, ...], float] = {}
    others: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    picked: Counter[tuple[str, float]] = Counter()
    entropies: Any = defaultdict(list)
    for record in records:
        run = record["settings"]
        if run["arm"] == BASELINE:
            first[run["model"], run["task"], run["seed"]] = record["result"]["trials"][0]["test"]["auc"]
        picked[run["arm"], choose(record["result"]["trials"])["value"]] += 1
    for record in records:
        run = record["settings"]
        key = (run["model"], run["task"], run["seed"])
        if run["arm"] != BASELINE and key in first and family(run["task"]) == "images":
            for trial in record["result"]["trials"]:
                found = trial["test"]["auc"] - first[key]
                others[run["arm"], trial["value"]][run["model"]][run["seed"]].append(found)
                entropies[run["arm"], trial["value"]].append(trial["test"]["entropy"])
    models = [model for model in MODELS if any(model in by_model for by_model in others.values())]
    lines = row(["arm", "strength", *(MODELS[model] for model in models), "entropy", "chosen"], head=True)
    for arm, value in sorted(others, key=lambda key: (list(ARMS).index(key[0]), key[1])):
        cells = [
            shown(interval([sum(found) / len(found) for found in others[arm, value][model].values()]))
            for model in models
        ]
        entropy = interval(entropies[arm, value]).mean
        lines += row([ARMS[arm], f"{value:g}", *cells, f"{entropy:.3f}", str(picked[arm, value])])
    return [
        "Difference in test AUC over the image bags from the same start without a regularizer. No choice among these",
        "was made; the last column counts how often the validation bags of all tasks did choose them. The entropy is",
        "the mean over these tasks and models, and what a floor or a controller should hold.", "", *lines,
    ]  # fmt: skip


def row(cells: Sequence[str], head: bool = False) -> list[str]:
    """Of a table; a head has a rule below it."""
    return [f"| {' | '.join(cells)} |", *([f"|{' --- |' * len(cells)}"] if head else [])]


def label(task: str) -> str:
    """As the tables say it."""
    kind, _, number = task.partition("_")
    return TASKS.get(task) or (f"Ilse, {number} bags" if kind == "ilse" else f"fixed lists, class {number}")


# --- files -----------------------------------------------------------------------------------------------------------


def draw(chosen: Chosen, path: Path) -> None:
    """Differences from no regularizer: quantities down, models across, a point for each task and a mean by family."""
    arms = list(ROWS)
    colors = {"images": "#0072b2", "classical": "#d55e00"}
    figure, axes = plt.subplots(
        len(QUANTITIES), max(1, len(chosen)), figsize=(4.6 * max(1, len(chosen)), 9), squeeze=False, sharex="row"
    )
    for (quantity, title), panels in zip(QUANTITIES.items(), axes, strict=True):
        for (model, tasks), axis in zip(chosen.items(), panels, strict=False):
            axis.axvline(0, color="#999999", linewidth=1)
            for which, color in colors.items():
                for place, found in places(tasks, arms, quantity, which):
                    axis.plot(found.mean, place, ".", color=color, alpha=0.35, markersize=5)
                means = [pooled(tasks, arm, quantity, which) for arm in arms]
                heights = [height(arms, arm, which) for arm in arms]
                axis.errorbar(
                    [mean.mean for mean in means], heights, xerr=[mean.half for mean in means],
                    fmt="o", color=color, capsize=3, markersize=4, label=FAMILIES[which],
                )  # fmt: skip
            axis.set_yticks(range(len(arms)), [ROWS[arm] for arm in reversed(arms)] if axis is panels[0] else [])
            axis.set_ylim(-0.6, len(arms) - 0.4)
            axis.set_xlabel(f"difference in {title}")
            axis.set_title(MODELS[model], fontsize=10)
    if chosen:
        axes[0][0].legend(fontsize=7, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def places(
    tasks: Mapping[str, Any], arms: Sequence[str], quantity: str, which: str
) -> Iterator[tuple[float, Interval]]:
    """Height and difference of each task and arm."""
    for task, found in tasks.items():
        for arm in arms:
            cell = difference(found, arm, quantity)
            if family(task) == which and cell.count:
                yield height(arms, arm, which), cell


def height(arms: Sequence[str], arm: str, which: str) -> float:
    """First arm on top, the families beside each other."""
    return len(arms) - 1 - arms.index(arm) + (0.15 if which == "images" else -0.15)


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Every trial in a line."""
    names = ["task", "model", "arm", "seed", "value", "chosen"]
    measured = [f"{part}_{name}" for part in ("val", "test") for name in ("auc", "loss", "entropy", "instance_auc")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *measured], restval="")
        writer.writeheader()
        for record in records:
            trials = record["result"]["trials"]
            for trial in trials:
                found = {f"{part}_{name}": trial[part][name] for part in ("val", "test") for name in trial[part]}
                picked = int(trial is choose(trials))
                writer.writerow({**record["settings"], "value": trial["value"], "chosen": picked, **found})
