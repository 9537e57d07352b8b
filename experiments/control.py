"""Densities asked for, densities reached: python -m experiments.control.

On the quickstart's data and ViT, at two widths: a controller for each target, unchanged, beside fixed weights. Every
run appends a line to ``control.csv`` in the output folder, and is not repeated when the folder is given again.
"""

from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from experiments.measure import held_out_density
from experiments.run_info import ROOT, run_info
from experiments.sparsity import append, read
from experiments.train import build
from lightning_reg.callbacks import ActivationL1Regularizer
from lightning_reg.schedules import TargetController

FIELDS = ("seed", "width", "kind", "asked", "density", "accuracy", "weight")


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="control")
def main(cfg: DictConfig) -> None:
    """Every seed, width, target and fixed weight."""
    torch.set_num_threads(cfg.threads)
    path = Path(cfg.output_dir) / "control.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(int(r["seed"]), int(r["width"]), r["kind"], float(r["asked"])) for r in read(path)}
    asked = [("target", target) for target in cfg.targets] + [("weight", weight) for weight in cfg.weights]
    for seed in cfg.seeds:
        for width in cfg.widths:
            for kind, number in asked:
                if (seed, width, kind, float(number)) not in done:
                    append(path, run(cfg, seed, width, kind, number), FIELDS)
    write_table(path)


def run(cfg: DictConfig, seed: int, width: int, kind: str, asked: float) -> dict[str, Any]:
    """Train once; the density is counted on the test images, apart from what the controller saw."""
    cfg = OmegaConf.merge(cfg, {"seed": seed, "model": {"net": {"embed_dim": width}}})  # type: ignore[assignment]
    pl.seed_everything(seed, workers=True, verbose=False)
    data, model = build(cfg.data.datamodule), build(cfg.model)
    regularizer = (
        ActivationL1Regularizer(1.0, schedule=TargetController(asked))
        if kind == "target"
        else ActivationL1Regularizer(asked)
    )
    trainer = build(
        cfg.trainer, callbacks=[regularizer], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, data)
    (scores,) = trainer.test(model, data, verbose=False)
    density = held_out_density(model.net, data.test_dataloader())["density/exact"]
    return {
        "seed": seed, "width": width, "kind": kind, "asked": asked, "density": density,
        "accuracy": scores["test/accuracy"], "weight": regularizer.strength,
    }  # fmt: skip


def write_table(path: Path) -> Path:
    """Print the table, and write it as ``control.md`` beside the runs."""
    rows = read(path)
    widths, seeds = sorted({int(row["width"]) for row in rows}), sorted({int(row["seed"]) for row in rows})
    header = ["asked for", *(f"width {width}, seed {seed}" for width in widths for seed in seeds), "accuracy"]
    by_run = {(row["kind"], row["asked"], int(row["width"]), int(row["seed"])): row for row in rows}
    lines = []
    for kind, asked in dict.fromkeys((row["kind"], row["asked"]) for row in rows):
        runs = [by_run.get((kind, asked, width, seed)) for width in widths for seed in seeds]
        accuracies = [float(run["accuracy"]) for run in runs if run]
        lines.append([
            f"{'density' if kind == 'target' else 'weight'} {float(asked):g}", *(_cell(run) for run in runs),
            f"{100 * sum(accuracies) / len(accuracies):.1f} %",
        ])  # fmt: skip
    table = Table(*header)
    for line in lines:
        table.add_row(*line)
    Console(width=140).print(table)
    text = [f"- {key}: {value}" for key, value in {"command": "python -m experiments.control", **run_info()}.items()]
    text += ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", *(f"| {' | '.join(x)} |" for x in lines)]
    path.with_name("control.md").write_text("\n".join(text) + "\n")
    return path.with_name("control.md")


def _cell(run: dict[str, str] | None) -> str:
    if run is None:
        return ""
    density = float(run["density"])
    off = f" ({density / float(run['asked']) - 1:+.0%})" if run["kind"] == "target" else ""
    return f"{density:.3f}{off}"


if __name__ == "__main__":
    main()
