"""A report of a run as one HTML file that opens from disk: python -m experiments.report outputs/quickstart/<run>."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.charts import GEOMETRY, Chart, Points, Series, heat_map, layer_colour, line_chart
from experiments.runs import Arm, load_run
from experiments.summary import comparison, verdict

TEMPLATES = Path(__file__).parent / "templates"
ARM_COLOURS = {"regularized": "var(--accent)", "plain": "var(--muted)"}


@dataclass(frozen=True)
class Section:
    """Charts under a heading, with a few words on how to read them."""

    title: str
    text: str
    charts: list[Chart] = field(default_factory=list)


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a finished run and return its path."""
    summary, arms = load_run(folder)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        summary=summary, arms=arms, rows=comparison(summary, arms), verdict=verdict(summary),
        sections=[section for section in sections(arms) if section.charts], heat=heat(arms), geometry=GEOMETRY,
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    # the resolved path would show where this machine keeps things; the relative one is what the user can type
    return Path(os.path.relpath(path))


def sections(arms: Sequence[Arm]) -> list[Section]:
    """Everything but the heat map, which sits between entropy and density."""
    return [
        Section(
            "Learning",
            "Losses are cross-entropy without penalties, so the two arms can be compared. The training loss is that of "
            "single batches, which is why it is noisy.",
            [_compare(arms, title, key) for title, key in _LEARNING if any(key in arm.metrics for arm in arms)],
        ),
        Section(
            "Attention entropy",
            "How widely a query spreads its attention: 1 is uniform over all keys, 0 is a single key. Heads that fall "
            "towards 0 have collapsed, and training often becomes unstable then; heads that stay at 1 have not learnt "
            "to choose. How hard the regularizer pulls is shown at the end.",
            [_mean_of(arms, "attention_entropy", "mean of all heads"),
             *_by_site(arms, "attention_entropy", low=0, high=1)],
        ),
        Section(
            "Stability",
            "What runs away before the loss does: the largest attention logit, the least entropy of a head and the "
            "number of keys it still sees, the output's logits (log Z), outliers in the residual stream, and the "
            f"gradient. {_alarms(arms)}",
            _stability(arms),
        ),
        Section(
            "Activation density",
            "The share of MLP activations that are not exactly 0, on training batches. Lower is sparser. Sparsity is "
            "only worth something where accuracy holds; it saves time with kernels made for it, not by itself.",
            [_mean_of(arms, "activation_density", "mean of all layers"), *_by_site(arms, "activation_density", low=0)],
        ),
        Section(
            "Progressive sparsity",
            "The weight of the penalty rises in stages; the first leaves the model time to get used to its activation. "
            "Beside it what the stages did to the density, and to the loss on images never trained on.",
            _progress(arms),
        ),
        Section(
            "Spectral norms",
            "The largest singular value of each weight in use. Where it grows without bound, attention logits grow "
            "with it and entropy collapses. sigma-Reparam makes it a learned number of each weight.",
            _by_site(arms, "spectral_norm", low=0),
        ),
        Section(
            "Strength of the penalties",
            "The weight of each penalty in the loss, after its schedule, and what it contributed.",
            _strengths(arms),
        ),
    ]  # fmt: skip


def heat(arms: Sequence[Arm]) -> dict[str, Any] | None:
    """Entropy of each layer and head for every logged step, with an empty map for each arm."""
    watched = [arm for arm in arms if any(line.get("attention_entropy") for line in arm.monitor)]
    if not watched:
        return None
    sites = list(watched[0].monitor[-1]["attention_entropy"])
    columns = max(len(heads) for heads in watched[0].monitor[-1]["attention_entropy"].values())
    steps = [line["step"] for line in watched[0].monitor]
    values = {
        arm.name: [[_rounded(line["attention_entropy"].get(site, [])) for site in sites] for line in arm.monitor]
        for arm in watched
    }
    charts = {arm.name: heat_map(arm.name, short_names(sites), columns) for arm in watched}
    return {"steps": steps, "values": values, "charts": charts}


def _rounded(heads: list[float]) -> list[float]:
    return [round(value, 3) for value in heads]


def short_names(sites: Sequence[str]) -> list[str]:
    """Site names without the dotted parts that all share: ``net.blocks.0.attn`` becomes ``0`` among its peers."""
    parts = [site.split(".") for site in sites]
    shortest = min((len(names) for names in parts), default=0)
    head = next((i for i in range(shortest) if len({names[i] for names in parts}) > 1), 0)
    tail = next((i for i in range(shortest - head) if len({names[-1 - i] for names in parts}) > 1), 0)
    names = [".".join(names[head : len(names) - tail]) for names in parts]
    return [f"layer {name}" if name.isdigit() else name for name in names]


_GUARD = re.compile(r"reg/[^/]+/active")
_LEARNING = (("training loss", "train/loss"), ("validation loss", "val/loss"), ("validation accuracy", "val/accuracy"))


def _compare(arms: Sequence[Arm], title: str, key: str) -> Chart:
    return _arms_chart(title, [(arm.name, arm.metrics.get(key, [])) for arm in arms])


def _mean_of(arms: Sequence[Arm], quantity: str, title: str) -> Chart:
    return _arms_chart(title, [(arm.name, arm.mean(quantity)) for arm in arms])


def _arms_chart(title: str, lines: Sequence[tuple[str, Points]]) -> Chart:
    return line_chart(title, [Series(name, points, ARM_COLOURS[name]) for name, points in lines])


def _by_site(arms: Sequence[Arm], quantity: str, low: float | None = None, high: float | None = None) -> list[Chart]:
    """One chart for each arm, on one scale, with a line for each site."""
    lines = {arm.name: arm.sites(quantity) for arm in arms}
    values = [value for sites in lines.values() for points in sites.values() for _, value in points]
    charts = []
    for name, sites in lines.items():
        colours = [layer_colour(index, len(sites)) for index in range(len(sites))]
        labels = short_names(list(sites))
        series = [Series(*line) for line in zip(labels, sites.values(), colours, strict=True)]
        top = max(values, default=1.0) if high is None else high
        charts += [line_chart(f"{name}, by layer", series, low=low, high=top)] if series else []
    return charts


def _progress(arms: Sequence[Arm]) -> list[Chart]:
    """Schedule, density and loss on one axis of steps, where a schedule of stages was used."""
    key = "reg/progressive_sparsity/weight"
    weights = [(arm.name, arm.metrics[key]) for arm in arms if key in arm.metrics]
    if not weights:
        return []
    density = _mean_of(arms, "activation_density", "activation density, mean of all layers")
    return [_arms_chart("weight of the penalty", weights), density, _compare(arms, "validation loss", "val/loss")]


_HEADLINES = {
    "max_logit": "largest |attention logit|",
    "entropy_min": "entropy of the lowest head, 1 = uniform",
    "effective_keys_min": "keys that the most concentrated head sees, exp(H)",
    "log_z": "mean log Z of the output's logits",
    "massive_activation": "max / median of a block's output, largest",
    "gradient_rms": "root mean square of the gradient",
}


def _stability(arms: Sequence[Arm]) -> list[Chart]:
    """Headlines of the stability monitor, and when a guard acted."""
    charts = [
        _arms_chart(title, [(arm.name, arm.headline(name)) for arm in arms])
        for name, title in _HEADLINES.items()
        if any(arm.headline(name) for arm in arms)
    ]
    guards = dict.fromkeys(key for arm in arms for key in arm.metrics if _GUARD.fullmatch(key))
    return charts + [_compare(arms, f"{key.split('/')[1]}: 1 while it acts", key) for key in guards]


def _alarms(arms: Sequence[Arm]) -> str:
    """The alarms in a sentence each."""
    told = [
        f"{arm.name}, step {step}: {alarm['kind']}, {alarm['quantity']} = {_shown(alarm['value'])} (level "
        f"{alarm['level']:g})."
        for arm in arms
        for step, alarm in arm.alarms()
    ]
    return " ".join(["Alarms:", *told]) if told else "No alarm went off."


def _shown(value: float | None) -> str:
    """A number of the history, which cannot hold those that are not finite."""
    return "not finite" if value is None else f"{value:.3g}"


def _strengths(arms: Sequence[Arm]) -> list[Chart]:
    charts = []
    for arm in arms:
        for key, points in arm.metrics.items():
            if key.startswith("reg/") and key.endswith("/weight"):
                name = key.split("/")[1]
                charts.append(line_chart(f"{name}: weight", [Series("weight", points, ARM_COLOURS[arm.name])], low=0))
                weighted = arm.metrics.get(f"reg/{name}/weighted", [])
                charts.append(
                    line_chart(f"{name}: added to the loss", [Series("added", weighted, ARM_COLOURS[arm.name])])
                )
    return charts


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
