"""Four methods together, every subset of them: python -m experiments.compose.

A full 2^4 design of sigma-Reparam, attention entropy (AEM), density loss (DEFT) and z-loss on the quickstart's ViT and
on a small language model, with paired seeds. The three penalties are in every arm: with weight 0, which leaves the
training as it is bit for bit, they measure what the others do to their quantity. Continued with ``output_dir=``.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from experiments.benchmarks.harness import quiet
from experiments.compose_results import write_results
from experiments.evidence import Store, grid, run_all, sized
from experiments.run_info import ROOT
from experiments.train import build, plain_numbers
from lightning_reg.callbacks import (
    ActivationDensityRegularizer,
    AttentionEntropyRegularizer,
    SigmaReparam,
    ZLossRegularizer,
)

METHODS = ("sigma_reparam", "aem", "deft", "z_loss")
ARMS = ["+".join(name for name, on in zip(METHODS, switches) if on) or "none"
        for switches in product((False, True), repeat=len(METHODS))]  # fmt: skip


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="compose")
def main(cfg: DictConfig) -> None:
    """Every task, arm and seed, then the page."""
    cfg = sized(cfg)
    torch.set_num_threads(cfg.threads)
    store = Store(Path(cfg.output_dir))
    if not cfg.results_only:
        with quiet():
            run_all(store, grid(task=cfg.tasks, seed=cfg.seeds, arm=ARMS), lambda run: train(cfg, run))
    print(write_results(store, store.folder))


def train(cfg: DictConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Train one arm: held-out loss and accuracy, and the quantities of the methods over its last batches."""
    cfg = OmegaConf.merge(cfg, {"seed": run["seed"]})  # type: ignore[assignment]
    pl.seed_everything(run["seed"], workers=True, verbose=False)
    steps = cfg.steps[run["task"]]
    if run["task"] == "vit":
        data, model = build(cfg.data.datamodule), build(cfg.model)
    else:
        data, model = build(cfg.lm.data.datamodule, steps=steps), build(cfg.lm.model)
    # logged at every tenth step, so at the last one
    trainer = build(cfg.trainer, callbacks=callbacks(cfg, run["arm"]), max_steps=steps, limit_val_batches=0)
    trainer.fit(model, data)
    last = plain_numbers(trainer.callback_metrics)
    values = {
        "entropy": last["reg/attention_entropy/value"], "density": last["reg/activation_density/value"],
        "z": last["reg/z_loss/value"], "steps": steps, "batch_size": data.batch_size,
        "length": getattr(data, "length", None), "parameters": sum(p.numel() for p in model.parameters()),
        "weights": OmegaConf.to_container(cfg.weights),
    }  # fmt: skip
    if run["task"] == "vit":
        (scores,) = trainer.test(model, data, verbose=False)
        return {"loss": scores["test/loss"], "accuracy": scores["test/accuracy"], **values}
    trainer = build(cfg.trainer)
    (scores,) = trainer.validate(model, data, verbose=False)
    return {"loss": scores["val/loss"], **values}


def callbacks(cfg: DictConfig, arm: str) -> list[Callback]:
    """Those of an arm, ``none`` or names of methods joined by plus signs."""
    on = set(arm.split("+"))
    weight = {name: float(cfg.weights[name]) if name in on else 0.0 for name in cfg.weights}
    penalties: list[Callback] = [
        AttentionEntropyRegularizer(weight["aem"]),
        ActivationDensityRegularizer(weight["deft"], epsilon=0.1, relative=True),
        ZLossRegularizer(weight["z_loss"]),
    ]
    return [SigmaReparam(), *penalties] if "sigma_reparam" in on else penalties


if __name__ == "__main__":
    main()
