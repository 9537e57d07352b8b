"""Ways to sparse activations, compared at equal tokens: python -m experiments.sparsity.

Every run appends a line to ``sparsity.csv`` in the output folder; the table and the picture are drawn from it. A run
that is there already is not repeated, so ``output_dir=<folder>`` continues an interrupted comparison.
"""

import csv
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress
from torch import Tensor, nn

from experiments.run_info import ROOT, run_info
from experiments.sparsity_results import write_results
from experiments.train import build
from lightning_reg import capture
from lightning_reg.activations import restore_activations
from lightning_reg.calibration import calibrate_fatrelu
from lightning_reg.metrics import ActivationDensity, DeadNeurons

FIELDS = ("seed", "arm", "strength", "loss", "density", "shifted_loss", "shifted_density", "dead", "seconds", "steps")

OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="sparsity")
def main(cfg: DictConfig) -> None:
    """Pretrain, continue every arm, write the results."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sparsity.csv"
    runs = [(seed, arm, strength) for seed in cfg.seeds for arm in cfg.arms for strength in cfg.arms[arm].strengths]
    done = {(int(row["seed"]), row["arm"], float(row["strength"])) for row in read(path)}
    with Progress() as progress:
        task = progress.add_task("runs", total=len(runs), completed=len(done))
        for seed in cfg.seeds:
            pretrained = None
            for run in [run for run in runs if run[0] == seed and run not in done]:
                pretrained = pretrained or pretrain(cfg, seed)
                append(path, continue_arm(cfg, *run, deepcopy(pretrained)))
                progress.advance(task)
    write_results([path], {"command": "python -m experiments.sparsity", **run_info(), "steps": cfg.steps})


def pretrain(cfg: DictConfig, seed: int) -> nn.Module:
    """The network with its own activation, trained from scratch."""
    cfg = OmegaConf.merge(cfg, {"seed": seed})  # type: ignore[assignment]
    pl.seed_everything(seed, workers=True, verbose=False)
    model = build(cfg.model)
    fit(cfg, model, [], cfg.pretrain_steps)
    return model.net


def continue_arm(cfg: DictConfig, seed: int, arm: str, strength: float, net: nn.Module) -> dict[str, Any]:
    """Train one arm from the pretrained network and measure it on the held-out text."""
    # other windows than the pretraining saw, the same for every arm
    cfg = OmegaConf.merge(cfg, {"seed": seed + 1000, "strength": strength})  # type: ignore[assignment]
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    model = build(cfg.model, net=None, learning_rate=cfg.continue_learning_rate)
    model.net = net
    start = time.perf_counter()
    data = fit(cfg, model, list(build(cfg.arms[arm].callbacks).values()), cfg.steps)
    seconds = time.perf_counter() - start
    measured = measure(model, data)
    shifted = {"loss": "", "density": ""}
    if measured["density"] < 0.999:
        try:
            calibrate_fatrelu(model, data.train_dataloader(), run=run, target=cfg.shift_error, method="cett")
            shifted = measure(model, data)
        except ValueError:  # an activation with a threshold of its own
            restore_activations(model)
    return {
        "seed": seed, "arm": arm, "strength": strength, **measured, "shifted_loss": shifted["loss"],
        "shifted_density": shifted["density"], "seconds": seconds, "steps": cfg.steps,
    }  # fmt: skip


def fit(cfg: DictConfig, model: pl.LightningModule, callbacks: list[pl.Callback], steps: int) -> pl.LightningDataModule:
    """Train for a number of steps on windows that the seed of ``cfg`` chooses."""
    data = build(cfg.data.datamodule, steps=steps)
    trainer = build(
        cfg.trainer, callbacks=callbacks, max_steps=steps, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    return data


def run(model: pl.LightningModule, batch: Tensor) -> Tensor:
    """The loss, on the model's device."""
    return model(batch.to(model.device))


@torch.no_grad()
def measure(model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, Any]:
    """Loss in nats per byte, share of exact non-zeros and of neurons that never fire, on the held-out text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    names = capture.find_down_projections(model)
    density, dead = ActivationDensity().to(device), {name: DeadNeurons().to(device) for name in names}
    modules = capture.named_modules(model)

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            density.update(args[0])
            dead[name].update(args[0])

        return hook

    handles = [modules[name].register_forward_pre_hook(see(name)) for name in names]
    losses = [float(model(batch.to(device))) for batch in data.val_dataloader()]
    for handle in handles:
        handle.remove()
    shares = [float(metric.compute()) for metric in dead.values()]
    return {"loss": sum(losses) / len(losses), "density": float(density.compute()), "dead": sum(shares) / len(shares)}


def read(path: Path) -> list[dict[str, str]]:
    """Lines of a comparison; none if it has not begun."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any], fields: Sequence[str] = FIELDS) -> None:
    """Add a finished run."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
