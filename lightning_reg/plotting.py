"""Figures of what `RegMonitor` measures, and the one place that knows how each logger takes a figure.

matplotlib is imported on first use, without pyplot: nothing global changes, and no display is needed.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_LABEL = 32  # characters of a module's name beside an axis
MOST_NUMBERS = 200  # cells up to which their values are written into a heat map
MOST_TICKS = 40
DPI = 150


def check_matplotlib() -> None:
    """Raise if figures cannot be drawn.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; names the extra that brings it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("figures need matplotlib: `pip install 'lightning_reg[plots]'`.")


def head_heatmap(entropy: Mapping[str, Sequence[float | None]], *, title: str) -> "Figure":
    """Attention entropy by layer and head.

    Args:
        entropy: Normalised entropy in [0, 1] of each head, by site; None where a head saw no choice of keys. Sites may
            have different numbers of heads.
        title: Title of the figure.

    Returns:
        A figure on a colour scale fixed to [0, 1], so that figures of one training can be compared.
    """
    heads = max(map(len, entropy.values()))
    rows = [[*values, *[None] * (heads - len(values))] for values in entropy.values()]
    figure, axes, image = _grid(rows, list(entropy), title=title, limits=(0.0, 1.0), cell=0.5)
    axes.set_xlabel("head")
    axes.set_xticks(range(0, heads, 1 + heads // MOST_TICKS))
    axes.set_ylabel("attention layer")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label("entropy / log(visible keys)\n0 = one key, 1 = uniform")
    if heads * len(rows) <= MOST_NUMBERS:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value is not None:
                    colour = "black" if value > 0.55 else "white"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    return figure


def layer_histograms(
    counts: Mapping[str, Sequence[float]], edges: Sequence[str], *, title: str, axis: str, layers: str, of: str
) -> "Figure":
    """Histograms of all layers as one image: a row is a layer, the colour of a cell the share of its values there.

    Args:
        counts: Values in each bin, by site.
        edges: Labels of the edges between bins, one fewer than bins.
        title: Title of the figure.
        axis: What is counted, with its unit.
        layers: What a row is.
        of: What a share is of.
    """
    rows = [[number / max(1.0, sum(row)) for number in row] for row in counts.values()]
    most = max(max(row) for row in rows)
    figure, axes, image = _grid(rows, list(counts), title=title, limits=(0.0, most or 1.0), cell=0.38)
    axes.set_xlabel(axis)
    step = 1 + len(edges) // 12
    axes.set_xticks([place + 0.5 for place in range(step - 1, len(edges), step)], labels=edges[step - 1 :: step])
    axes.set_ylabel(layers)
    figure.colorbar(image, ax=axes).set_label(f"share of the layer's {of}")
    return figure


def _grid(
    rows: Sequence[Sequence[float | None]], names: list[str], *, title: str, limits: tuple[float, float], cell: float
) -> tuple["Figure", Any, Any]:
    check_matplotlib()
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers = np.ma.masked_invalid(np.array(rows, dtype=float))
    labels = [_shorten(name) for name in names]
    margin = 1.9 + 0.07 * max(map(len, labels))  # names at the left, colour bar at the right
    size = (max(5.0, margin + cell * numbers.shape[1]), min(24.0, max(2.6, 1.3 + 0.32 * len(rows))))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["viridis"].with_extremes(bad="0.85")
    image = axes.imshow(numbers, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    step = 1 + len(rows) // (2 * MOST_TICKS)
    axes.set_yticks(range(0, len(rows), step), labels=labels[::step], fontsize=8)
    axes.set_title(title, fontsize=10)
    return figure, axes, image


def _shorten(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else "…" + name[-LONGEST_LABEL + 1 :]


def log_figure(logger: Any, key: str, figure: "Figure", step: int, *, directory: str | Path | None = None) -> None:
    """Hand a figure to a Lightning logger, or write it as PNG where the logger keeps its files.

    Args:
        logger: W&B, TensorBoard and MLflow show the figure; any other gets a file `<log_dir>/figures/<key>_<step>.png`.
        key: Name of the figure, with slashes.
        figure: A matplotlib figure.
        step: Step of the x-axis that Lightning gives its own metrics.
        directory: Where the file goes when the logger keeps none.

    Raises:
        ValueError: If the logger has no figures and no directory.
    """
    # by name: importing a logger's library only to ask is what a user without it would not expect
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    if "WandbLogger" in kinds:
        import wandb

        # `step=` would move W&B's own counter, which Lightning leaves alone
        logger.experiment.log({key: wandb.Image(_picture(figure)), "trainer/global_step": step})
    elif "TensorBoardLogger" in kinds:
        logger.experiment.add_figure(key, figure, global_step=step, close=False)
    elif "MLFlowLogger" in kinds:
        logger.experiment.log_figure(logger.run_id, figure, f"{key}/{step:08d}.png")
    else:
        directory = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or directory
        if directory is None:
            raise ValueError(
                f"`logger` must take figures or have a `log_dir`, got {type(logger).__name__}. Set `directory`."
            )
        save_figure(directory, key, figure, step)


def save_figure(directory: str | Path, key: str, figure: "Figure", step: int) -> Path:
    """Write `<directory>/figures/<key>_<step>.png` and return its path."""
    path = Path(directory) / "figures" / f"{key.replace('/', '_')}_{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _picture(figure: "Figure") -> Any:
    """As PIL image: W&B would import pyplot for a matplotlib figure."""
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)
