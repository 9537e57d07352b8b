"""ProSparse on a language model: page, table and picture, written from stored runs alone."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from experiments.evidence import Interval, Record, Store, interval, paired, provenance

UNTRAINED, SHIFTED = "untrained", "prosparse_shifted"
LABELS = {
    UNTRAINED: "as it comes, SiLU", "silu": "SiLU", "relu": "ReLU", "shifted_relu": "shifted ReLU",
    "constant_l1": "constant L1", "prosparse": "ProSparse, no shift", SHIFTED: "**ProSparse**", "hoyer": "Hoyer-square",
    "controller": "controller, L1",
}  # fmt: skip
# sparsity in percent and average score of LLaMA2-7B: Tables 1, 4 and 5, all but the first trained on 34.6 B tokens
PAPER = {UNTRAINED: (None, 37.96), "relu": (66.0, 41.40), "shifted_relu": (69.6, 41.33), "constant_l1": (88.62, 36.34),
         "prosparse": (88.11, 38.31), SHIFTED: (89.32, 38.46)}  # fmt: skip
HEADLINE = PAPER[SHIFTED][0]
COLOURS = {"silu": "#000000", "relu": "#0072b2", "shifted_relu": "#56b4e9", "constant_l1": "#e69f00",
           "prosparse": "#d55e00", SHIFTED: "#8b2c00", "hoyer": "#009e73", "controller": "#cc79a7"}  # fmt: skip
MODELS = {"smollm2": "SmolLM2-135M-Instruct, dequantised from its 4-bit GGUF file,",
          "scratch": "A small Llama over bytes, trained from scratch,"}  # fmt: skip
COMPARABLE = 0.01  # nats: 1 % of the perplexity
MATCHED = 0.01  # sparsities that are compared
FIELDS = (
    "arm", "strength", "learning_rate", "seed", "loss", "sparsity", "chunk_sparsity", "dead", "truncated_sparsity",
    "shifted_loss", "shifted_sparsity", "shifted_chunk_sparsity", "steps", "tokens", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """Reported runs of an arm at one strength, by seed."""

    name: str
    strength: float
    learning_rate: float
    results: Mapping[int, Mapping[str, Any]]

    def values(self, quantity: str) -> dict[int, float]:
        """By seed."""
        return {seed: result[quantity] for seed, result in self.results.items()}

    def mean(self, quantity: str) -> Interval:
        """Over seeds."""
        return interval(list(self.values(quantity).values()))

    def less(self, other: "Arm", quantity: str = "loss") -> Interval:
        """This arm minus another, paired by seed."""
        return paired(self.values(quantity), other.values(quantity))

    def layers(self, quantity: str = "layer_sparsity") -> list[float]:
        """Mean over seeds, by layer."""
        columns = zip(*(result[quantity] for result in self.results.values()))
        return [sum(column) / len(column) for column in columns]


def write_results(store: Store, folder: Path, tuning_seed: int, sparsity: float) -> Path:
    """Write ``prosparse_lm.csv``, ``.png`` and ``.md`` and return the page."""
    records = store.read()
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(records, folder / "prosparse_lm.csv")
    before = next((r["result"] for r in records if r["settings"]["arm"] == UNTRAINED), None)
    arms = reported(records, tuning_seed)
    draw(arms, records, before, tuning_seed, folder / "prosparse_lm.png")
    lines = [
        "# Nine tenths of the activations at comparable quality? ProSparse on a small language model", "",
        *introduction(records, tuning_seed, sparsity), "",
    ]  # fmt: skip
    if arms or before:
        lines += ["![loss over sparsity, sparsity by layer](prosparse_lm.png)", "", "## What it says", ""]
        lines += [
            *out_of_reach(records, tuning_seed, sparsity),
            *reading(arms, before, sparsity),
            "",
            "## Every arm, at equal tokens",
            "",
        ]
        lines += [*table(arms, before), "", "## Beside the paper", "", *paper_table(arms, before), ""]
        lines += ["## What was tried", "", *tried_table(records, tuning_seed), ""]
        lines += ["## What differs from the paper", "", *deviations(records, tuning_seed), ""]
    lines += ["## Where the numbers come from", "", f"- `{command(records, tuning_seed)}`"]
    lines += [f"- {line}" for line in provenance(records)] if records else ["- no runs yet"]
    if arms:
        seeds = sorted({seed for arm in arms.values() for seed in arm.results})
        lines += [f"- seeds {', '.join(map(str, seeds))}, and {tuning_seed} for the search"]
    (folder / "prosparse_lm.md").write_text("\n".join(lines) + "\n")
    return folder / "prosparse_lm.md"


def reported(records: Sequence[Record], tuning_seed: int) -> dict[str, Arm]:
    """Arms in the order of the page; of one that has runs at several strengths that with most seeds."""
    groups: dict[tuple[str, float, float], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        own = record["settings"]
        if own["arm"] != UNTRAINED and own["seed"] != tuning_seed:
            groups.setdefault((own["arm"], own["strength"], own["learning_rate"]), {})[own["seed"]] = record["result"]
    arms: dict[str, Arm] = {}
    for (name, strength, rate), results in sorted(groups.items(), key=lambda group: len(group[1])):
        arms[name] = Arm(name, strength, rate, results)
    if "prosparse" in arms:
        base = arms["prosparse"]
        shifted = {seed: result["shifted"] for seed, result in base.results.items() if "shifted" in result}
        if shifted:
            arms[SHIFTED] = Arm(SHIFTED, base.strength, base.learning_rate, shifted)
    return {name: arms[name] for name in LABELS if name in arms}


def command(records: Sequence[Record], tuning_seed: int) -> str:
    """That makes such runs, with what the configuration may say otherwise by now."""
    steps = sorted({r["result"]["steps"] for r in records if r["settings"]["arm"] != UNTRAINED})
    grid = ", ".join(f"{arm}: [{rates(records, arm, tuning_seed)}]" for arm in ("silu", "relu"))
    start = "python -m experiments.prosparse_lm"
    return f"{start} steps={steps[0]} 'learning_rates={{{grid}}}'" if len(steps) == 1 else start


def rates(records: Sequence[Record], arm: str, tuning_seed: int) -> str:
    """Learning rates that an arm tried."""
    tried = [r["settings"] for r in records if r["settings"]["seed"] == tuning_seed]
    return ", ".join(f"{rate:g}" for rate in sorted({run["learning_rate"] for run in tried if run["arm"] == arm}))


def introduction(records: Sequence[Record], tuning_seed: int, sparsity: float) -> list[str]:
    """What was done."""
    if not records:
        return []
    facts = records[-1]["result"]
    trained = [r["result"] for r in records if r["settings"]["arm"] != UNTRAINED]
    length = {f"{r['steps']} steps of {r['batch_size']} windows of {r['length']} tokens" for r in trained}
    first = (
        f"{MODELS[facts['model']]} with {millions(facts['parameters'])} million parameters, {facts['layers']} gated "
        f"MLPs of width {facts['width']} and SiLU, is continued on Python's documentation: "
        f"{', '.join(sorted(length))}, the same windows for all arms of a seed. ProSparse (Song et al. 2024, arXiv "
        "2402.13516) replaces SiLU by ReLU, adds an L1 of the input of each down-projection that rises in stages, and "
        "raises the thresholds of the ReLUs after training."
    )
    second = (
        "*Sparsity* is the share of exact zeros in the inputs of the down-projections, as the mean over layers; *of "
        "chunks* the share of neurons that stay 0 over 8 tokens. *At +1 % perplexity* is the largest truncation of "
        "small contributions that was found, one CETT for all layers, which keeps a model within 1 % of its own "
        "perplexity, on the first windows: it says how much of a model can go, not which model is better. Loss is in "
        f"nats a token, on {facts['val_tokens']} tokens of held-out files, which also chose the learning rates. "
        f"Strengths were searched, with another seed ({tuning_seed}), for {100 * sparsity:g} % sparsity. ± is the 95 % "
        "interval over seeds (Student's t) on the same held-out text, paired in differences; **bold** leaves out 0."
    )
    return [*wrap(first, 118), "", *wrap(second, 118)]


def reading(arms: Mapping[str, Arm], before: Mapping[str, Any] | None, sparsity: float) -> list[str]:
    """What the intervals say, in words."""
    lines = []
    if before and "swapped" in before:
        lines += [
            f"- As it comes the model has a loss of {before['loss']:.3f} (perplexity {exp(before['loss']):.1f}); with "
            f"ReLU in place of SiLU and no training {before['swapped']['loss']:.3f}, at "
            f"{100 * before['swapped']['sparsity']:.1f} % sparsity."
        ]
    last = arms.get(SHIFTED)
    if last:
        found = last.mean("sparsity")
        lines += [
            f"- **Sparsity of {HEADLINE} %** (the paper's, after the shift): {percent(found)} %, {reached(found)}."
        ]
        bases = {"SiLU at equal tokens": arms.get("silu"), "ReLU at equal tokens": arms.get("relu")}
        if before:
            bases = {"the model as it comes, the paper's comparison": _constant(before, last), **bases}
        for name, base in bases.items():
            if base:
                lines += [
                    f"- **Comparable quality** to {name}: {nats(last.less(base))} nats, {comparable(last.less(base))}."
                ]
    if before and "relu" in arms:
        found = arms["relu"].less(_constant(before, arms["relu"]))
        lines += [
            f"- ReLU, trained, is {nats(found)} nats from the model as it comes, which never saw this text: a "
            "comparison with that is lenient."
        ]
    lines += [
        line
        for line in (
            versus(arms, "prosparse", "constant_l1", "Progressive against constant (paper: better)"),
            versus(arms, "hoyer", "constant_l1", "Hoyer-square against a constant L1"),
            versus(arms, "controller", "constant_l1", "Controller against a constant L1"),
        )
        if line
    ]
    if last and "prosparse" in arms:
        more, cost = last.less(arms["prosparse"], "sparsity"), last.less(arms["prosparse"])
        lines += [
            f"- **Threshold shift**: {percent(more, '+')} points of sparsity for {nats(cost)} nats (paper: "
            f"{PAPER[SHIFTED][0] - PAPER['prosparse'][0]:+.2f} points)."
        ]
    cut = {name: interval(truncated_of(arm)) for name, arm in arms.items() if truncated_of(arm)}
    if cut:
        said = ", ".join(f"{LABELS[name]} {percent(found)} %" for name, found in cut.items())
        lines += [f"- **Sparsity within 1 % of a model's own perplexity**: {said}."]
    if "controller" in arms:
        found = arms["controller"].mean("sparsity")
        off = abs(found.mean - sparsity)
        lines += [f"- **Controller** asked for {100 * sparsity:g} %: {percent(found)} %, {100 * off:.1f} points off."]
    if "relu" in arms:
        lines += [f"- **ReLU alone**: {percent(arms['relu'].mean('sparsity'))} % (paper: {PAPER['relu'][0]} %)."]
    if "prosparse" in arms:
        layers = arms["prosparse"].layers()
        third = max(1, len(layers) // 3)
        low, high = sum(layers[:third]) / third, sum(layers[-third:]) / third
        more = interval([
            (sum(result["layer_sparsity"][-third:]) - sum(result["layer_sparsity"][:third])) / third
            for result in arms["prosparse"].results.values()
        ])  # fmt: skip
        word = ("so here" if more.mean > 0 else "the opposite here") if more.clear else "no clear difference"
        lines += [
            f"- **Lower layers are denser** (paper): the first third has {100 * low:.1f} % sparsity, the last "
            f"{100 * high:.1f} %, {percent(more, '+')} points more: {word}."
        ]
    return lines


def _constant(before: Mapping[str, Any], like: Arm) -> Arm:
    """The model as it comes, the same for every seed."""
    return Arm(UNTRAINED, 0.0, 0.0, dict.fromkeys(like.results, before))


def truncated_of(arm: Arm) -> list[float]:
    """Sparsity at 1 % more perplexity of each seed."""
    return [result["truncated"]["sparsity"] for result in arm.results.values() if "truncated" in result]


def reached(sparsity: Interval) -> str:
    """Whether it is that of the paper, by the whole interval or by its mean."""
    if 100 * sparsity.mean < HEADLINE:
        return "not reached"
    return "reached" if 100 * (sparsity.mean - sparsity.half) >= HEADLINE else "reached on average"


def comparable(cost: Interval) -> str:
    """Whether a loss is within 1 % of the perplexity, by the whole interval."""
    if cost.count < 2:
        return "one seed says nothing"
    if cost.mean + cost.half <= COMPARABLE:
        return f"so here (at most {COMPARABLE} worse)"
    return f"not here (more than {COMPARABLE} worse)" if cost.mean - cost.half > COMPARABLE else "not clear"


def versus(arms: Mapping[str, Arm], ours: str, base: str, title: str) -> str:
    """Two arms at equal sparsity, or that they are not; nothing if one is missing."""
    if ours not in arms or base not in arms:
        return ""
    cost, more = arms[ours].less(arms[base]), arms[ours].less(arms[base], "sparsity")
    said = f"- **{title}**: {nats(cost)} nats at {percent(more, '+')} points of sparsity, "
    if abs(more.mean) > MATCHED:  # no equal sparsity
        worse = cost.clear and cost.mean > 0 and more.mean < 0
        better = cost.clear and cost.mean < 0 and more.mean > 0
        apart = f"more than {100 * MATCHED:g} point apart, so not comparable."
        return said + ("worse in both." if worse else "better in both." if better else apart)
    if not cost.clear:
        return said + "no clear difference."
    return said + ("better." if cost.mean < 0 else "worse.")


def table(arms: Mapping[str, Arm], before: Mapping[str, Any] | None) -> list[str]:
    """Loss and sparsities of every arm."""
    lines = row(["arm", "strength", "learning rate", "seeds", "loss", "- SiLU", "- ReLU", "sparsity, %", "of chunks, %",
                 "dead neurons, %", "sparsity at +1 % perplexity, %"], head=True)  # fmt: skip
    if before:
        shares = [before["sparsity"], before["chunk_sparsity"], before["dead"], before["truncated"]["sparsity"]]
        cells = [
            LABELS[UNTRAINED],
            "",
            "",
            "",
            f"{before['loss']:.4f}",
            "",
            "",
            *(f"{100 * share:.1f}" for share in shares),
        ]
        lines += row(cells)
    for arm in arms.values():
        differences = [
            nats(arm.less(arms[base])) if base in arms and base != arm.name else "" for base in ("silu", "relu")
        ]
        truncated = interval(truncated_of(arm))
        lines += row([
            LABELS[arm.name], f"{arm.strength:g}" if arm.strength else "", f"{arm.learning_rate:g}",
            str(len(arm.results)), plain(arm.mean("loss")), *differences,
            *(percent(arm.mean(key)) for key in ("sparsity", "chunk_sparsity", "dead")),
            percent(truncated) if truncated.count else "",
        ])  # fmt: skip
    return lines


def paper_table(arms: Mapping[str, Arm], before: Mapping[str, Any] | None) -> list[str]:
    """The paper's numbers and ours."""
    lines = row(
        ["arm", "paper: sparsity, %", "paper: score - ReLU, points", "sparsity, %", "loss - ReLU, nats"], head=True
    )
    for name, (sparsity, score) in PAPER.items():
        arm = arms.get(name)
        if name == UNTRAINED and before and "relu" in arms:
            arm = _constant(before, arms["relu"])
        ours = percent(arm.mean("sparsity")) if arm else ""
        cost = nats(arm.less(arms["relu"])) if arm and "relu" in arms and name != "relu" else ""
        against = f"{score - PAPER['relu'][1]:+.2f}" if name != "relu" else ""
        lines += row([LABELS[name], "" if sparsity is None else f"{sparsity:g}", against, ours, cost])
    return [
        *lines, "",
        "LLaMA2-7B: Tables 1, 4 and 5, 34.6 billion tokens but for the first line; the score is an average over "
        "benchmarks, higher is better.",
    ]  # fmt: skip


def tried_table(records: Sequence[Record], tuning_seed: int) -> list[str]:
    """Runs of the tuning seed."""
    lines = row(["arm", "strength", "learning rate", "loss", "sparsity, %"], head=True)
    own = [r for r in records if r["settings"]["seed"] == tuning_seed and r["settings"]["arm"] != UNTRAINED]
    order = list(LABELS)
    for record in sorted(own, key=lambda r: (order.index(r["settings"]["arm"]), r["settings"]["strength"])):
        given, result = record["settings"], record["result"]
        strength = f"{given['strength']:g}" if given["strength"] else ""
        lines += row([LABELS[given["arm"]], strength, f"{given['learning_rate']:g}", f"{result['loss']:.4f}",
                      f"{100 * result['sparsity']:.1f}"])  # fmt: skip
    return lines


def deviations(records: Sequence[Record], tuning_seed: int) -> list[str]:
    """From the paper, as the runs say."""
    trained = [r["result"] for r in records if r["settings"]["arm"] != UNTRAINED]
    facts = trained[-1] if trained else records[-1]["result"]
    errors = sorted({result["shifted"]["error"] for result in trained if "shifted" in result})
    thresholds = [t for result in trained if "shifted" in result for t in result["shifted"]["thresholds"]]
    shift = (
        f"thresholds by layer, by a CETT of {', '.join(f'{e:g}' for e in errors)} on training text: "
        f"{min(thresholds):.3g} to {max(thresholds):.3g}"
        if thresholds else "not measured"
    )  # fmt: skip

    def at_edge(arm: str) -> str:
        tried = {r["settings"]["learning_rate"] for r in records if r["settings"]["arm"] == arm
                 and r["settings"]["seed"] == tuning_seed}  # fmt: skip
        used = {r["settings"]["learning_rate"] for r in records if r["settings"]["arm"] == arm
                and r["settings"]["seed"] != tuning_seed}  # fmt: skip
        return "at the edge of its grid" if used & {min(tried, default=0), max(tried, default=0)} else "inside its grid"

    lines = [
        f"{millions(facts['parameters'])} million parameters and {millions(facts['tokens'])} million tokens a run; the "
        "paper's headline has 7 billion and 34.6 billion.",
        "Quality is the held-out loss of the text that is trained on, not benchmarks; that text is one, not a mixture.",
        "The L1 is a mean over tokens, width and layers, the paper's a sum. Its stages are those of the 7B model as "
        "shares of the training, their last weight searched; its constant weight too.",
        f"Threshold shift: {shift}; the paper's is 0.01 for all layers.",
        f"AdamW; peak learning rate: the best of {rates(records, 'silu', tuning_seed) or 'none'} for SiLU, of "
        f"{rates(records, 'relu', tuning_seed) or 'none'} for ReLU and the rest, "
        f"by validation loss of seed {tuning_seed} (SiLU's is {at_edge('silu')}, ReLU's {at_edge('relu')}); 5 % "
        f"warm-up, cosine to {facts['minimum']:g} of the peak, gradients clipped at norm {facts['gradient_clip']:g}, "
        f"{facts['precision']}.",
        "Hoyer-square and the controller are not in the paper.",
    ]
    return [f"- {line}" for line in lines]


def encloses(found: Iterable[float], sparsity: float) -> bool:
    """Whether tries reached ``sparsity`` from both sides."""
    values = list(found)
    return min(values) <= sparsity <= max(values)


def out_of_reach(records: Sequence[Record], tuning_seed: int, sparsity: float) -> list[str]:
    """Arms whose tries stayed on one side of the sparsity asked for: the nearest try is reported."""
    said = []
    for arm in sorted({r["settings"]["arm"] for r in records}):
        own = [r for r in records if r["settings"]["arm"] == arm]
        tried = {r["settings"]["strength"]: r["result"] for r in own if r["settings"]["seed"] == tuning_seed}
        used = {r["settings"]["strength"] for r in own if r["settings"]["seed"] != tuning_seed}
        if len(tried) < 2 or not used or encloses([result["sparsity"] for result in tried.values()], sparsity):
            continue
        nearest = tried[min(tried, key=lambda strength: abs(strength - min(used)))]
        said.append(
            f"{LABELS[arm]} at {min(used):g} after tries of {min(tried):g} to {max(tried):g}, of which the nearest "
            f"gave {100 * nearest['sparsity']:.1f} % at {nearest['loss']:.2f} nats"
        )
    if not said:
        return []
    return [f"- **Strengths that no two tries enclose**, so that sparsity may miss its mark: {'; '.join(said)}."]


def millions(count: int) -> str:
    """To three digits."""
    return f"{count / 1e6:.3g}"


def draw(
    arms: Mapping[str, Arm], records: Sequence[Record], before: Mapping[str, Any] | None, tuning_seed: int, path: Path
) -> None:
    """Loss over sparsity; sparsity by layer, of zeros and at 1 % more perplexity."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.6))
    for record in records:
        name, result = record["settings"]["arm"], record["result"]
        if name in COLOURS and record["settings"]["seed"] == tuning_seed:
            left.scatter(100 * result["sparsity"], result["loss"], s=14, facecolors="none", edgecolors=COLOURS[name])
    if before:
        left.axhline(before["loss"], color="#999999", linestyle="--", linewidth=1, label=LABELS[UNTRAINED])
    for name, arm in arms.items():
        colour, label = COLOURS[name], LABELS[name].strip("*")
        found = [100 * share for share in arm.values("sparsity").values()]
        left.scatter(found, list(arm.values("loss").values()), s=28, color=colour, label=label)
        places = range(1, len(arm.layers()) + 1)
        if name != "silu":
            middle.plot(places, [100 * share for share in arm.layers()], color=colour, marker=".", label=label)
        cut = [result["truncated"]["layer_sparsity"] for result in arm.results.values() if "truncated" in result]
        if cut:
            means = [100 * sum(column) / len(column) for column in zip(*cut)]
            right.plot(places, means, color=colour, marker=".", label=label)
    left.set(xlabel="sparsity, % (a point a seed; hollow: tried)", ylabel="held-out loss, nats a token")
    middle.set(xlabel="layer", ylabel="sparsity, %", title="exact zeros")
    right.set(xlabel="layer", ylabel="sparsity, %", title="at 1 % more perplexity")
    for axis in (left, middle, right):
        if axis is not left:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    if arms:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, fontsize=9, loc="lower center", ncols=len(labels))
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Every run in a line."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore")
        writer.writeheader()
        for record in records:
            result = record["result"]
            inner = {f"shifted_{key}": value for key, value in result.get("shifted", {}).items()}
            if "truncated" in result:
                inner["truncated_sparsity"] = result["truncated"]["sparsity"]
            writer.writerow({**record["settings"], **result, **inner, "seconds": round(record["seconds"], 2)})


def row(cells: Sequence[str], head: bool = False) -> list[str]:
    """A line of a table, with the line below its head."""
    return [f"| {' | '.join(cells)} |", *([f"|{' --- |' * len(cells)}"] if head else [])]


def nats(found: Interval) -> str:
    """A difference of losses, bold where it is clear."""
    return f"**{found}**" if found.clear else str(found)


def plain(found: Interval) -> str:
    """A loss."""
    return f"{found.mean:.4f}" + (f" ± {found.half:.4f}" if found.count > 1 else "")


def percent(found: Interval, sign: str = "") -> str:
    """A share, in percent."""
    return f"{100 * found.mean:{sign}.1f}" + (f" ± {100 * found.half:.1f}" if found.count > 1 else "")
