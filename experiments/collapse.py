"""Attention made to collapse, and what helps: python -m experiments.collapse.

Every run appends a line to ``collapse.csv`` in the output folder, and is not repeated when the folder is given again.
"""

from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from experiments.run_info import ROOT, run_info
from experiments.sparsity import append, read
from experiments.train import build
from lightning_reg import rewriting
from lightning_reg.callbacks import StabilityMonitor

FIELDS = (
    "temperature", "seed", "protocol", "remedy", "entropy_before", "collapsed_before", "entropy", "entropy_min",
    "collapsed_share", "max_logit", "loss", "accuracy",
)  # fmt: skip
HEAD = ("entropy_mean", "entropy_min", "collapsed_share", "max_logit")


class Tempered(rewriting.Rewrite):
    """Attention logits divided by a temperature."""

    kind = "temperature"
    order = -1
    temperature = 1.0

    def attention(
        self, module: nn.Module, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        **arguments: Any,
    ) -> Tensor:  # fmt: skip
        return attend(query / self.temperature, key, value, **arguments)


class Temperature(Callback):
    """Lets the temperature of every attention fall from 1 to ``end`` over ``steps``; at 0 steps it is there at once."""

    def __init__(self, end: float, steps: int) -> None:
        self.end, self.steps, self.rewrite = end, steps, Tempered()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        rewriting.remove_all(pl_module, Tempered.kind)
        rewriting.install_everywhere(pl_module, self.rewrite)
        self.rewrite.temperature = 1.0 if stage == "fit" and self.steps else self.end

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        share = min(1.0, trainer.global_step / self.steps) if self.steps else 1.0
        self.rewrite.temperature = 1.0 + (self.end - 1.0) * share


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="collapse")
def main(cfg: DictConfig) -> None:
    """Every temperature, seed, protocol and remedy."""
    torch.set_num_threads(cfg.threads)
    path = Path(cfg.output_dir) / "collapse.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(float(row["temperature"]), int(row["seed"]), row["protocol"], row["remedy"]) for row in read(path)}
    runs = list(product(cfg.temperatures, cfg.seeds, cfg.protocols, cfg.only or list(cfg.remedies)))
    with Progress() as progress:
        task = progress.add_task("runs", total=len(runs), completed=len([run for run in runs if run in done]))
        for run in [run for run in runs if run not in done]:
            append(path, measure(cfg, *run), FIELDS)
            progress.advance(task)
    write_results(path, {"command": "python -m experiments.collapse", **run_info(), "steps": cfg.steps})


def measure(cfg: DictConfig, temperature: float, seed: int, protocol: str, remedy: str) -> dict[str, Any]:
    """One run, and where it is a rescue what it began with."""
    cfg = OmegaConf.merge(cfg, {"seed": seed, "temperature": temperature})  # type: ignore[assignment]
    run = {"temperature": temperature, "seed": seed, "protocol": protocol, "remedy": remedy}
    if protocol == "prevent":
        return {**run, **fit(cfg, remedy)[0]}
    before, collapsed = collapse(cfg)
    start = {"entropy_before": before["entropy"], "collapsed_before": before["collapsed_share"]}
    return {**run, **start, **fit(cfg, remedy, collapsed)[0]}


_collapsed: dict[str, tuple[dict[str, Any], nn.Module]] = {}


def collapse(cfg: DictConfig) -> tuple[dict[str, Any], nn.Module]:
    """The model that every rescue of a seed and temperature begins with, trained once."""
    key = f"{cfg.seed} {cfg.temperature}"
    if key not in _collapsed:
        _collapsed[key] = fit(cfg, "none")
    return _collapsed[key]


def fit(cfg: DictConfig, remedy: str, start: nn.Module | None = None) -> tuple[dict[str, Any], nn.Module]:
    """Train, from a collapsed model if there is a ``start``; what was measured last, and the model."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data, model = build(cfg.data.datamodule), build(cfg.model)
    if start is not None:
        model.load_state_dict(start.state_dict())
    temperature = Temperature(cfg.temperature, 0 if start is not None else round(cfg.steps * cfg.warmup))
    monitor = StabilityMonitor(every_n_steps=10, collapse=cfg.collapsed, warn={}, rows=10**6)
    remedies = [build(callback) for callback in cfg.remedies[remedy]]
    trainer = build(
        cfg.trainer, callbacks=[*remedies, temperature, monitor], max_steps=cfg.steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        log_every_n_steps=10, default_root_dir=cfg.output_dir,
    )  # fmt: skip
    trainer.fit(model, data)
    last = {"entropy" if key == "entropy_mean" else key: monitor.latest[key] for key in HEAD}
    (scores,) = trainer.test(model, data, verbose=False)
    return {**last, "loss": scores["test/loss"], "accuracy": scores["test/accuracy"]}, deepcopy(model)


# --- results ---------------------------------------------------------------------------------------------------------


def verdict(share: float, without: float) -> str:
    """What a remedy did, by the share of collapsed heads.

    ``yes`` where at most a tenth of the heads is collapsed, ``no`` where at least half as many are as without a remedy.
    """
    return "yes" if share <= 0.1 else "no" if share >= without / 2 else "partly"


def summary(path: Path) -> pd.DataFrame:
    """Means over the seeds, by temperature, protocol and remedy, with the verdict."""
    keys = ["temperature", "protocol", "remedy"]
    means = pd.read_csv(path).groupby(keys, sort=False).mean(numeric_only=True).reset_index()
    without = means[means.remedy == "none"].set_index(["temperature", "protocol"]).collapsed_share
    places = list(zip(means.temperature, means.protocol, strict=True))
    means["helps"] = [
        "" if remedy == "none" else verdict(share, without.get(place, float("nan")))
        for remedy, share, place in zip(means.remedy, means.collapsed_share, places, strict=True)
    ]
    return means


def write_results(path: Path, header: dict[str, Any]) -> Path:
    """Print the table, and write it as ``collapse.md`` beside the runs."""
    means = summary(path)
    columns = list(dict.fromkeys(zip(means.temperature, means.protocol, strict=True)))
    cells = {(row.remedy, row.temperature, row.protocol): _cell(row) for row in means.itertuples()}
    lines = [
        [remedy, *(cells.get((remedy, *column), "") for column in columns)] for remedy in dict.fromkeys(means.remedy)
    ]
    titles = ["remedy", *(f"{protocol}, temperature {temperature:g}" for temperature, protocol in columns)]
    table = Table(*titles, caption="helps: collapsed heads, mean entropy, test accuracy")
    for line in lines:
        table.add_row(*(cell.replace("*", "") for cell in line))
    Console(width=180).print(table)
    text = [f"- {key}: {value}" for key, value in header.items()]
    text += ["", f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}", *(f"| {' | '.join(x)} |" for x in lines)]
    path.with_name("collapse.md").write_text("\n".join(text) + "\n")
    return path.with_name("collapse.md")


def _cell(row: Any) -> str:
    helps = f"**{row.helps}**: " if row.helps else ""
    return f"{helps}{row.collapsed_share:.0%}, {row.entropy:.2f}, {row.accuracy:.1%}"


if __name__ == "__main__":
    main()
