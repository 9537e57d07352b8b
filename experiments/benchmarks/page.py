"""The results page of the GPU benchmarks, from their CSV files: python -m experiments.benchmarks.page.

Every number on the page comes from a line of a file; what people have to say stands in ``notes.md`` beside the files
and is taken over as it is.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from experiments.benchmarks import attention, distributed, steps
from experiments.benchmarks.arms import ARMS, NONE, TRAINER, USUAL
from experiments.benchmarks.results import DIRECTORY, Row, number
from experiments.benchmarks.tasks import TASKS
from experiments.benchmarks.training import MODES

# of DESIGN section 8, on ViT-B/16: time and memory, against the same step without the regularizer
BARS = {"entropy": (1.05, 1.02), "sigma": (1.03, 1.02), "density": (1.03, 1.01), "all": (1.10, 1.05)}
FLASH_BAR, BEST_BAR, EAGER_BAR, EAGER_MEMORY_BAR = 1.10, 1.5, 15.0, 30.0
FLASH_LENGTHS, EAGER_LENGTHS = range(1024, 16385), range(2048, 131073)
ENTROPY_BAR, GRADIENT_BAR = 1e-5, 1.5
OURS = [name for name, arm in ARMS.items() if arm.ours]
MIB, GIB = 2**20, 2**30
DASH = "-"
# told apart by colour-blind readers too
COLOURS = {
    "entropy": "#0072b2", "sigma": "#d55e00", "density": "#009e73", "all": "#000000", "entropy" + USUAL: "#0072b2",
    "sigma" + USUAL: "#d55e00", "density" + USUAL: "#009e73", "all" + USUAL: "#000000",
    "fused": "#0072b2", "flash": "#d55e00", "cudnn": "#009e73", "efficient": "#cc79a7", "eager": "#7f7f7f",
}  # fmt: skip
AXES = {"length": "tokens", "layers": "layers", "width": "width"}

HOW = """`make bench-gpu` measures (`experiments/benchmarks/`), `python -m experiments.benchmarks.page`
writes this page; every number is in `speed/*.csv`, with hardware, versions and code in each line.

An arm is timed only after its gradients were found to be those of the usual way (of the decomposition for
sigma-Reparam, to the error of the mean for a sample of queries) on a two-layer copy of the model with the same tokens
and heads, in float32 to 1e-4 of the largest and in bf16 to 1.5 times the usual way's own error plus 0.01; compiled,
those of the same step in eager code. All arms of a table live in one process and run in blocks that alternate in
rotating order. **Time** is the median of the ratios to the baseline's block of the same round [20th, 80th percentile];
**memory** is the ratio of the largest sum of allocations within a step, parameters and optimizer state included: each
arm's own, what the other arms hold between steps is taken off. **Host** is how long the CPU takes to queue a step:
where it is close to the time, the GPU waits for Python. *The usual way* is what public code does: materialised
probabilities, `torch.nn.utils.parametrizations.spectral_norm`, `x^2 / (x^2 + eps)` on hooks, logits in float32.
"""
KERNELS = """## Attention with entropy, as a kernel

`functional.attention_with_entropy` against torch's attention without entropy; 16 heads, 16384 tokens in a call (32768
at that length). Time on the device of forward, or of forward and backward (both), medians; `/ flash` is of paired
ratios. Memory is beyond the inputs.
"""
SEVERAL = """## Several GPUs

Parameters after five steps of a small copy in float32 against one process with whole batches and the hand-written
terms (with ours where sigma-Reparam is involved), relative to the largest; then the full model in bf16, of which the
slowest process counts.
"""

Lines = Sequence[Row]
Cells = list[Sequence[str]]


def render(directory: Path) -> str:
    """The page as Markdown.

    Raises:
        FileNotFoundError: If nothing was measured.
    """
    lines = {
        "steps": steps.table(directory).latest(),
        "attention": attention.table(directory).latest(),
        "distributed": distributed.table(directory).latest(),
    }
    if not any(lines.values()):
        raise FileNotFoundError(f"There are no measurements in {directory}: run `make bench-gpu` on a GPU.")
    notes = directory / "notes.md"
    missed: list[str] = []
    hardware = _main_hardware(lines)
    chosen = {name: [row for row in rows if row["hardware"] == hardware] for name, rows in lines.items()}
    parts = [_head(chosen)]
    parts += [_vit(chosen["steps"], mode, missed) for mode in MODES]
    parts += [_models(chosen["steps"], mode) for mode in MODES]
    parts += [_kernels(chosen["attention"], causal, missed) for causal in ("True", "False")]
    if any(row["heads"] == "16" for row in chosen["attention"]):
        parts += [f"![time and memory over the length]({directory.name}/attention.png)"]
    parts += [_other_attention(chosen["attention"]), _memory(chosen["attention"])]
    parts += [_accuracy(chosen["attention"], missed), _growth(chosen["steps"], directory.name)]
    parts += [_distributed([row for row in lines["distributed"] if _same_card(row, hardware)])]
    parts += [_missed(missed), notes.read_text() if notes.exists() else "", _provenance(chosen, lines)]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def write(directory: Path) -> Path:
    """Draw the plots, write the page beside the folder, and return its path."""
    page = directory.with_suffix(".md")
    text = render(directory)
    draw(directory)
    page.write_text(text)
    return page


# --- sections --------------------------------------------------------------------------------------------------------


def _head(lines: Mapping[str, Lines]) -> str:
    rows = [row for own in lines.values() for row in own]
    return f"# Speed on a GPU\n\n{rows[0]['hardware']}, bf16. {HOW}"


def _vit(rows: Lines, mode: str, missed: list[str]) -> str:
    name = TASKS["vit"].name
    own = _by_arm(rows, name, mode)
    if not own:
        return ""
    table: Cells = [("added", "time", "bar", "memory", "bar", "host, ms", "the usual way: time", "memory",
                     "fp32 error", "bf16 error")]  # fmt: skip
    for arm in [arm for arm in OURS if arm in own]:
        row, usual = own[arm], own.get(arm + USUAL)
        bars = BARS.get(arm, (None, None))
        for column, what, bar in (("time_p50", "time", bars[0]), ("memory", "memory", bars[1])):
            _note(missed, bar, number(row, column), f"{name}, {MODES[mode]}, {ARMS[arm].label}: {what}")
        if row["error"]:
            missed.append(f"{name}, {MODES[mode]}, {ARMS[arm].label}: no numbers, {row['error']}")
        table.append((
            ARMS[arm].label, _ratio(row), _bar(bars[0], number(row, "time_p50")), _times(row, "memory", 3),
            _bar(bars[1], number(row, "memory")), _cell(row, "host_ms", 1), _ratio(usual), _times(usual, "memory", 2),
            _small(row, "error_fp32"), _small(row, "error_bf16"),
        ))  # fmt: skip
    base, trainer = own.get(NONE), own.get(TRAINER)
    said = _base(base, "The step without anything")
    if trainer and mode == "eager":
        said += f" The monitors are against a Trainer without callbacks, {number(trainer, 'ms'):.1f} ms a step; "
        said += "they look at one step in 50."
    graphs = _graphs(own) if mode != "eager" else ""
    return f"## {name}: {MODES[mode]}\n\n{said}{graphs}\n\n{_markdown(table)}"


def _graphs(own: dict[str, Row]) -> str:
    ours = [row for arm, row in own.items() if ARMS[arm].ours and not row["error"]]
    broken = [ARMS[arm].label for arm, row in own.items() if row["breaks"]]
    text = f" Graph breaks in {len(ours)} arms of ours: {sum(bool(row['breaks']) for row in ours)}."
    return text + (f" With graph breaks: {', '.join(broken)}." if broken else "")


def _models(rows: Lines, mode: str) -> str:
    names = [task.name for key, task in TASKS.items() if key != "vit"]
    found = {name: own for name in names if (own := _by_arm(rows, name, mode))}
    if not found:
        return ""
    table: Cells = [("added", *(part for name in found for part in (f"{name}: time", "memory")))]
    for arm in [*OURS, *(name for name in ARMS if name.endswith(USUAL))]:
        if any(arm in own for own in found.values()):
            cells = [cell for own in found.values() for cell in _pair(own.get(arm))]
            table.append((ARMS[arm].label, *cells))
    said = [_base(own.get(NONE), name) for name, own in found.items() if NONE in own]
    return f"## Other models: {MODES[mode]}\n\n{' '.join(said)}\n\n{_markdown(table)}"


def _kernels(rows: Lines, causal: str, missed: list[str]) -> str:
    own = [row for row in rows if row["causal"] == causal and row["heads"] == "16" and row["head_dim"] != "0"]
    kind = "causal" if causal == "True" else "not causal"
    parts = []
    for head_dim in sorted({int(row["head_dim"]) for row in own}):
        table: Cells = [("tokens", "direction", "output and entropy, ms", "/ flash", "/ fastest of torch",
                         "entropy only / flash", "eager with entropy /", "memory, MiB",
                         "eager's memory /")]  # fmt: skip
        for length in sorted({int(row["length"]) for row in own if row["head_dim"] == str(head_dim)}):
            for direction in attention.PASSES:
                case = {r["variant"]: r for r in own if (r["length"], r["head_dim"], r["direction"])
                        == (str(length), str(head_dim), direction)}  # fmt: skip
                if attention.FUSED in case:
                    where = f"attention, {kind}, {length} tokens, head dim {head_dim}, {direction}"
                    table.append((str(length), direction, *_kernel_cells(case, length, causal, where, missed)))
        parts.append(f"### {kind}, head dim {head_dim}\n\n{_markdown(table)}")
    if not parts:
        return ""
    return "\n\n".join([*([KERNELS.strip()] if causal == "True" else []), *parts])


def _kernel_cells(case: dict[str, Row], length: int, causal: str, where: str, missed: list[str]) -> list[str]:
    fused = case[attention.FUSED]
    ms = number(fused, "ms")
    if fused["error"]:
        missed.append(f"{where}: no numbers, {fused['error']}")
        return [fused["error"], *[DASH] * 6]
    fastest = min((number(case[name], "ms") for name in attention.BACKENDS if _measured(case.get(name))), default=0.0)
    eager = case.get(attention.EAGER)
    if causal == "True" and length in FLASH_LENGTHS:
        _note(missed, FLASH_BAR, number(fused, "time_p50"), f"{where}: / flash")
    if length in FLASH_LENGTHS and fastest:
        _note(missed, BEST_BAR, ms / fastest, f"{where}: / fastest")
    saved = _over(eager, "ms", fused), _over(eager, "memory", fused)
    if length in EAGER_LENGTHS and eager is not None and not eager["error"]:
        _note(missed, EAGER_BAR, saved[0], f"{where}: eager's time /", least=True)
        _note(missed, EAGER_MEMORY_BAR, saved[1], f"{where}: eager's memory /", least=True)
    no_eager = "" if eager is None else eager["error"]
    return [
        f"{ms:.3f}", _ratio(fused), f"x{ms / fastest:.2f}" if fastest else DASH,
        _ratio(case.get(attention.ENTROPY)), f"x{saved[0]:.1f}" if saved[0] == saved[0] else no_eager or DASH,
        f"{number(fused, 'memory') / MIB:.0f}", f"x{saved[1]:.1f}" if saved[1] == saved[1] else no_eager or DASH,
    ]  # fmt: skip


def _other_attention(rows: Lines) -> str:
    own = [row for row in rows if row["heads"] not in ("16", "4")]
    table: Cells = [("attention", "direction", "ours, ms", "/ flash", "fastest of torch, ms", "eager with entropy, ms",
                     "ours, MiB", "eager, MiB")]  # fmt: skip
    for batch, heads, length, head_dim, direction in dict.fromkeys(
        (row["batch"], row["heads"], row["length"], row["head_dim"], row["direction"]) for row in own
    ):
        case = {row["variant"]: row for row in own if (row["batch"], row["heads"], row["length"], row["head_dim"],
                row["direction"]) == (batch, heads, length, head_dim, direction)}  # fmt: skip
        fastest = [number(case[name], "ms") for name in attention.BACKENDS if _measured(case.get(name))]
        name = f"{length} scores, as in CLAM" if head_dim == "0" else f"({batch}, {heads}, {length}, {head_dim})"
        fused, eager = case[attention.FUSED], case.get(attention.EAGER)
        table.append((
            name, direction, _cell(fused, "ms", 3), _ratio(fused), f"{min(fastest):.3f}" if fastest else DASH,
            _cell(eager, "ms", 3), _cell(fused, "memory", 1, MIB), _cell(eager, "memory", 1, MIB),
        ))  # fmt: skip
    if len(table) == 1:
        return ""
    return f"### A ViT's attention, and bags of instances\n\n{_markdown(table)}"


def _memory(rows: Lines) -> str:
    own = [row for row in rows if row["heads"] == "4" and row["variant"] == attention.FUSED]
    table: Cells = [("tokens", "direction", "ms", "MiB", "bytes a token and head")]
    for row in sorted(own, key=lambda row: (row["direction"], int(row["length"]))):
        each = number(row, "memory") / (float(row["length"]) * float(row["heads"]) * float(row["batch"]))
        megabytes = _cell(row, "memory", 1, MIB)
        table.append((row["length"], row["direction"], _cell(row, "ms", 2), megabytes, f"{each:.0f}"))
    if not own:
        return ""
    head = "### Memory grows with the length, not with its square\n\nOne sequence, 4 heads of 64, causal."
    return f"{head}\n\n{_markdown(table)}"


def _accuracy(rows: Lines, missed: list[str]) -> str:
    own = [row for row in rows if row["variant"] == attention.FUSED and row["entropy_error"]]
    if not own:
        return ""
    entropy = max(own, key=lambda row: number(row, "entropy_error"))
    of_attention = [row for row in own if row["sdpa_error"]]
    text = f"### Errors\n\nAgainst float64 with the same inputs, {len(own)} checks: the entropy is off by at most "
    text += f"{number(entropy, 'entropy_error'):.1e} nats ({entropy['length']} tokens)"
    _note(missed, ENTROPY_BAR, number(entropy, "entropy_error"), "attention: largest error of the entropy, nats")
    if of_attention:
        ratios = {_relative_error(row): row for row in of_attention}
        worst = max(ratios)
        _note(missed, GRADIENT_BAR, worst, "attention: error of the gradients / torch's own")
        text += f"; gradients by at most x{worst:.2f} of what torch's own attention is off by "
        text += f"({ratios[worst]['length']} tokens, head dim {ratios[worst]['head_dim']}; "
        text += f"{number(ratios[worst], 'gradient_error'):.1e} relative in norm)"
    return text + "."


def _growth(rows: Lines, folder: str) -> str:
    parts = []
    for axis, label in AXES.items():
        own = [row for row in rows if row["growth"] == axis and row["mode"] == "eager"]
        values = sorted({int(row[axis]) for row in own})
        if not values:
            continue
        arms = [arm for arm in ARMS if arm not in (NONE, TRAINER) and any(row["arm"] == arm for row in own)]
        table: Cells = [(label, "ms without", *(ARMS[arm].label for arm in arms))]
        for value in values:
            at = {row["arm"]: row for row in own if int(row[axis]) == value}
            table.append((str(value), _cell(at.get(NONE), "ms", 1), *(_ratio(at.get(arm)) for arm in arms)))
        models = "; ".join(dict.fromkeys(row["model"] for row in own))
        head = f"### With the {axis}\n\n{models}; batch {_span(row['batch'] for row in own)}."
        parts.append(f"{head}\n\n{_markdown(table)}\n\n![step time over {label}]({folder}/{axis}.png)")
    return "## How the cost grows\n\n" + "\n\n".join(parts) if parts else ""


def _distributed(rows: Lines) -> str:
    if not rows:
        return ""
    table: Cells = [("model", "strategy", "GPUs", "added", "ms", "time", "parameters off by", "off without it")]
    for row in rows:
        off = (row["error"], DASH) if row["error"] else (_small(row, "distance"), _small(row, "without"))
        table.append((
            row["model"], {"ddp": "DDP", "fsdp2": "FSDP2"}[row["strategy"]], row["processes"],
            "nothing" if row["arm"] == NONE else ARMS[row["arm"]].label, _cell(row, "ms", 1), _ratio(row), *off,
        ))  # fmt: skip
    return f"{SEVERAL}\n{_markdown(table)}"


def _missed(missed: list[str]) -> str:
    if not missed:
        return "## Bars\n\nAll are met."
    return "## Bars that are missed\n\n" + "\n".join(f"- {text}" for text in missed)


def _provenance(chosen: Mapping[str, Lines], lines: Mapping[str, Lines]) -> str:
    rows = [row for own in chosen.values() for row in own]
    codes = Counter((row["commit"], row["source"]) for row in rows)
    text = [f"- {versions}" for versions in dict.fromkeys(row["versions"] for row in rows)]
    text += [f"- commit {commit}, code {source}: {count} lines" for (commit, source), count in codes.items()]
    others = Counter(row["hardware"] for own in lines.values() for row in own if row not in rows)
    text += [f"- {count} lines of {hardware} are in the files and not above" for hardware, count in others.items()]
    return "## Where the numbers come from\n\n" + "\n".join(text)


# --- cells -----------------------------------------------------------------------------------------------------------


def _main_hardware(lines: Mapping[str, Lines]) -> str:
    return Counter(row["hardware"] for own in lines.values() for row in own).most_common(1)[0][0]


def _same_card(row: Row, hardware: str) -> bool:
    return row["hardware"] == hardware


def _by_arm(rows: Lines, model: str, mode: str) -> dict[str, Row]:
    return {row["arm"]: row for row in rows if row["model"] == model and row["mode"] == mode and not row["growth"]}


def _measured(row: Row | None) -> bool:
    return row is not None and bool(row["ms"])


def _ratio(row: Row | None) -> str:
    """Median and spread of the time's ratio, or why there is none."""
    if row is None or not row["time_p50"]:
        return DASH if row is None or not row["error"] else row["error"]
    low, median, high = (number(row, f"time_p{share}") for share in (20, 50, 80))
    return f"x{median:.3f} [{low:.3f}, {high:.3f}]"


def _times(row: Row | None, column: str, digits: int) -> str:
    return DASH if row is None or not row[column] else f"x{number(row, column):.{digits}f}"


def _pair(row: Row | None) -> tuple[str, str]:
    return _ratio(row), _times(row, "memory", 3)


def _small(row: Row, column: str) -> str:
    return f"{number(row, column):.0e}" if row[column] else DASH


def _cell(row: Row | None, column: str, digits: int, unit: float = 1.0) -> str:
    if row is None or not row[column] or not _measured(row):
        return DASH if row is None or not row["error"] else row["error"]
    return f"{number(row, column) / unit:.{digits}f}"


def _base(row: Row | None, name: str) -> str:
    if row is None or not _measured(row):
        return ""
    queued = f", queued in {number(row, 'host_ms'):.1f} ms" if row["host_ms"] else ""
    return f"{name}: {number(row, 'ms'):.1f} ms, {number(row, 'peak') / GIB:.2f} GiB{queued}."


def _over(row: Row | None, column: str, ours: Row) -> float:
    """A value of another in units of ours; NaN where there is none."""
    if row is None or not _measured(row) or not number(ours, column):
        return float("nan")
    return number(row, column) / number(ours, column)


def _relative_error(row: Row) -> float:
    return number(row, "gradient_error") / number(row, "sdpa_error")


def _span(values: Iterable[str]) -> str:
    """Smallest to largest."""
    numbers = sorted({int(value) for value in values})
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _bar(bar: float | None, value: float) -> str:
    if bar is None or value != value:
        return DASH
    return f"x{bar:.2f} {'met' if value <= bar else 'missed'}"


def _note(missed: list[str], bar: float | None, value: float, where: str, least: bool = False) -> None:
    """Write down a bar that is missed."""
    if bar is not None and value == value and (value < bar if least else value > bar):
        missed.append(f"{where} is {value:.4g}, the bar {'at least' if least else 'at most'} {bar:.4g}.")


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rows = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([head, "|" + " --- |" * len(table[0]), *rows])


# --- plots -----------------------------------------------------------------------------------------------------------


def draw(directory: Path) -> list[Path]:
    """Step time along each axis of growth, and time and memory of the kernels over the length."""
    lines = {"steps": steps.table(directory).latest(), "attention": attention.table(directory).latest()}
    hardware = _main_hardware(lines)
    chosen = {name: [row for row in rows if row["hardware"] == hardware] for name, rows in lines.items()}
    paths = []
    for axis, label in AXES.items():
        rows = [row for row in chosen["steps"] if row["growth"] == axis and row["mode"] == "eager"]
        if rows:
            paths.append(_plot_growth(rows, axis, label, directory / f"{axis}.png"))
    kernels = [row for row in chosen["attention"] if row["heads"] == "16" and row["direction"] == "both"]
    if kernels:
        paths.append(_plot_kernels(kernels, directory / "attention.png"))
    return paths


def _plot_growth(rows: Lines, axis: str, label: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for place, column in zip(axes, ("time_p50", "memory"), strict=True):
        for arm in [arm for arm in ARMS if arm in COLOURS]:
            points = sorted((int(row[axis]), number(row, column)) for row in rows if row["arm"] == arm and row[column])
            if points:
                style = "--" if arm.endswith(USUAL) else "-"
                place.plot(*zip(*points), style, marker="o", markersize=4, color=COLOURS[arm], label=ARMS[arm].label)
        place.axhline(1.0, color="grey", linewidth=0.8)
        place.set(xscale="log", xlabel=label, ylabel="step time" if column == "time_p50" else "peak memory")
        ticks = sorted({int(row[axis]) for row in rows})
        place.set_xticks(ticks, [str(tick) for tick in ticks])
        place.minorticks_off()
        place.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("in units of the step without anything", fontsize=10)
    figure.savefig(path, dpi=130)
    return path


def _plot_kernels(rows: Lines, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    value: tuple[Callable[[Row], float], Callable[[Row], float]] = (
        lambda row: number(row, "ms"), lambda row: number(row, "memory") / MIB,
    )  # fmt: skip
    for line, head_dim in zip(figure.subplots(2, 2), ("64", "128"), strict=True):
        own = [row for row in rows if row["head_dim"] == head_dim and row["causal"] == "True" and row["ms"]]
        for place, of, name in zip(line, value, ("ms, forward and backward", "MiB beyond the inputs"), strict=True):
            for variant in [variant for variant in attention.VARIANTS if variant in COLOURS]:
                points = sorted((int(row["length"]), of(row)) for row in own if row["variant"] == variant)
                if points:
                    label = {"fused": "output and entropy", "eager": "eager, with entropy"}.get(variant, variant)
                    place.plot(*zip(*points), marker="o", markersize=4, color=COLOURS[variant], label=label)
            place.set(xscale="log", yscale="log", xlabel="tokens", ylabel=name, title=f"causal, head dim {head_dim}")
            place.grid(alpha=0.3)
        line[0].legend(fontsize=8, framealpha=0.8)
    figure.savefig(path, dpi=130)
    return path


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=DIRECTORY, help="folder of the CSV files")
    print(write(parser.parse_args().results))


if __name__ == "__main__":
    main()
