"""Attention made to collapse, and what helps: python -m experiments.collapse.

Every run appends a line to ``collapse.csv`` in the output folder, and is not repeated when the folder is given again.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
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
    "seed", "protocol", "remedy", "entropy_before", "collapsed_before", "entropy", "entropy_min", "collapsed_share",
    "max_logit", "loss", "accuracy",
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
    """Every seed, protocol and remedy."""
    torch.set_num_threads(cfg.threads)
    path = Path(cfg.output_dir) / "collapse.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(int(row["seed"]), row["protocol"], row["remedy"]) for row in read(path)}
    runs = [(seed, protocol, remedy) for seed in cfg.seeds for protocol in cfg.protocols for remedy in cfg.remedies]
    with Progress() as progress:
        task = progress.add_task("runs", total=len(runs), completed=len([run for run in runs if run in done]))
        collapsed: dict[int, Any] = {}
        for seed, protocol, remedy in [run for run in runs if run not in done]:
            if protocol == "rescue" and seed not in collapsed:
                collapsed[seed] = fit(cfg, seed, "none", None)
            row = fit(cfg, seed, remedy, collapsed[seed][1] if protocol == "rescue" else None)[0]
            before = collapsed[seed][0] if protocol == "rescue" else {}
            append(path, {"seed": seed, "protocol": protocol, "remedy": remedy, **_before(before), **row}, FIELDS)
            progress.advance(task)
    write_table(path, cfg.collapsed)


def _before(row: dict[str, Any]) -> dict[str, Any]:
    return {"entropy_before": row.get("entropy", ""), "collapsed_before": row.get("collapsed_share", "")}


def fit(cfg: DictConfig, seed: int, remedy: str, start: nn.Module | None) -> tuple[dict[str, Any], nn.Module]:
    """Train, from a collapsed model if there is a ``start``; what was measured last, and the model."""
    cfg = OmegaConf.merge(cfg, {"seed": seed})  # type: ignore[assignment]
    pl.seed_everything(seed, workers=True, verbose=False)
    data, model = build(cfg.data.datamodule), build(cfg.model)
    if start is not None:
        model.load_state_dict(start.state_dict())
    temperature = Temperature(cfg.temperature, 0 if start is not None else round(cfg.steps * cfg.warmup))
    monitor = StabilityMonitor(every_n_steps=10, collapse=cfg.collapsed, warn={}, rows=10**6)
    callbacks = [*build(OmegaConf.create({"x": cfg.remedies[remedy]})).x, temperature, monitor]
    trainer = build(
        cfg.trainer, callbacks=callbacks, max_steps=cfg.steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, log_every_n_steps=10,
    )  # fmt: skip
    trainer.fit(model, data)
    last = monitor.latest
    (scores,) = trainer.test(model, data, verbose=False)
    row = {key: last.get(key) for key in HEAD}
    row["entropy"] = row.pop("entropy_mean")
    return {**row, "loss": scores["test/loss"], "accuracy": scores["test/accuracy"]}, deepcopy(model)


def verdict(rows: list[dict[str, str]], collapsed: float) -> str:
    """What a remedy did, by the share of heads that are collapsed, over the seeds.

    ``yes`` when at most a tenth of the heads is left collapsed, ``no`` when at least half of those without remedy, or
    of those at the start of a rescue, are.
    """
    share = sum(float(row["collapsed_share"]) for row in rows) / len(rows)
    return "yes" if share <= 0.1 else "partly" if share <= collapsed else "no"


def write_table(path: Path, collapsed: float) -> Path:
    """Print the table, and write it as ``collapse.md`` beside the runs."""
    rows = read(path)
    header = ["remedy", *(f"{protocol}: {name}" for protocol in ("prevent", "rescue") for name in
                          ("holds", "collapsed heads", "entropy", "max logit", "accuracy"))]  # fmt: skip
    by_run: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        by_run.setdefault((row["remedy"], row["protocol"]), []).append(row)
    lines = []
    for remedy in dict.fromkeys(row["remedy"] for row in rows):
        cells = [remedy]
        for protocol in ("prevent", "rescue"):
            of_run = by_run.get((remedy, protocol), [])
            without = by_run.get(("none", protocol), [])
            half = _mean(without, "collapsed_share") / 2
            cells += [verdict(of_run, half), *_cells(of_run)] if of_run else [""] * 5
        lines.append(cells)
    table = Table(*header)
    for line in lines:
        table.add_row(*line)
    Console(width=200).print(table)
    text = [f"- {key}: {value}" for key, value in {"command": "python -m experiments.collapse", **run_info()}.items()]
    text += ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", *(f"| {' | '.join(x)} |" for x in lines)]
    path.with_name("collapse.md").write_text("\n".join(text) + "\n")
    return path.with_name("collapse.md")


def _mean(rows: list[dict[str, str]], key: str) -> float:
    return sum(float(row[key]) for row in rows) / max(1, len(rows))


def _cells(rows: list[dict[str, str]]) -> list[str]:
    return [
        f"{_mean(rows, 'collapsed_share'):.0%}", f"{_mean(rows, 'entropy'):.2f}", f"{_mean(rows, 'max_logit'):.3g}",
        f"{_mean(rows, 'accuracy'):.1%}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
