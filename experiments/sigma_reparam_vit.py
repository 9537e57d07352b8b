"""A ViT without norms, warm-up, weight decay and Adam, by sigma-Reparam: python -m experiments.sigma_reparam_vit.

The table of sigma-Reparam (Zhai et al. 2023) on Fashion-MNIST. Each arm is trained at every learning rate with one
seed; the best by validation accuracy is trained with the seeds that are reported. Continued with ``output_dir=``.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.utils import parametrizations

from experiments.benchmarks.harness import quiet
from experiments.evidence import Store, grid, run_all, sized
from experiments.run_info import ROOT
from experiments.sharpness import Sharpness
from experiments.sigma_reparam_vit_results import best_rate, write_results
from experiments.train import build
from lightning_reg.callbacks import SigmaReparam, StabilityMonitor, apply_sigma_reparam

PLAIN = {
    "method": "none",
    "layer_norm": False,
    "warmup": 0.0,
    "weight_decay": 0.0,
    "optimizer": "lars",
    "gain_rate": 1.0,
}
CLASSIFIERS = {"adam": "classifier.ImageClassifier", "lars": "lars_classifier.LarsClassifier"}


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="sigma_reparam_vit")
def main(cfg: DictConfig) -> None:
    """Every arm: its learning rates, then its seeds; then the page."""
    cfg = sized(cfg)
    torch.set_num_threads(cfg.threads)
    store = Store(Path(cfg.output_dir))
    if not cfg.results_only:
        with quiet():
            for arm in cfg.arms:
                rates = cfg.learning_rates[recipe_of(cfg, arm)["optimizer"]]
                tuning = grid(arm=[arm], learning_rate=rates, seed=[cfg.tuning_seed])
                run_all(store, tuning, lambda run: train(cfg, run))
                chosen = best_rate([record for record in store.read() if record["settings"] in tuning])
                run_all(store, grid(arm=[arm], learning_rate=[chosen], seed=cfg.seeds), lambda run: train(cfg, run))
    print(write_results(store, store.folder, cfg.tuning_seed))


def train(cfg: DictConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Train once: accuracy on validation and test images, and curves of loss, attention entropy and sharpness."""
    recipe = recipe_of(cfg, run["arm"])
    pl.seed_everything(run["seed"], workers=True, verbose=False)
    data, model = build(cfg.data.datamodule), build_model(cfg, recipe, run["learning_rate"])
    watch = Watch(cfg.every)
    # sampled rows would make the lowest head's entropy lower
    monitor = StabilityMonitor(quantities=["attention"], every_n_steps=cfg.every, rows=1024, warn={})
    sharpness = Sharpness(**cfg.sharpness)
    callbacks: list[Callback] = [monitor, watch, sharpness]
    if recipe["method"] in ("sigma_reparam", "spectral_norm"):
        callbacks.insert(0, SigmaReparam(init="one"))
    with tempfile.TemporaryDirectory() as folder:  # the monitor's file
        trainer = build(
            cfg.trainer, callbacks=callbacks, max_steps=cfg.steps, limit_val_batches=0, default_root_dir=folder
        )
        trainer.fit(model, data)
        tester = build(cfg.trainer, default_root_dir=folder)
        (val,), (test,) = tester.validate(model, data, verbose=False), tester.test(model, data, verbose=False)
    heads = [(line["step"] + 1, line["headlines"]) for line in monitor.history]
    return {
        "val_accuracy": val["val/accuracy"], "test_accuracy": test["test/accuracy"],
        "stopped": watch.stopped, "steps": cfg.steps, "batch_size": data.batch_size, "recipe": recipe,
        "precision": str(trainer.precision), "width": cfg.model.net.embed_dim, "depth": cfg.model.net.depth,
        "loss": watch.curve, "sharpness": sharpness.curve,
        **{name: [(step, values.get(name)) for step, values in heads] for name in ("entropy_mean", "entropy_min")},
    }  # fmt: skip


def build_model(cfg: DictConfig, recipe: Mapping[str, Any], learning_rate: float) -> pl.LightningModule:
    """The classifier of a recipe; its ViT has no norm layers, or is reparametrized."""
    changes: dict[str, Any] = {
        "_target_": f"experiments.models.{CLASSIFIERS[recipe['optimizer']]}", "learning_rate": learning_rate,
        "warmup": recipe["warmup"], "weight_decay": recipe["weight_decay"],
    }  # fmt: skip
    if recipe["optimizer"] == "lars":
        changes["gain_rate"] = recipe["gain_rate"]
    if not recipe["layer_norm"]:
        changes["net"] = {"norm_layer": {"_target_": "torch.nn.Identity", "_partial_": True}}
    model = build(cfg.model, **changes)
    if recipe["method"] == "spectral_norm":
        apply_sigma_reparam(model, init="one")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith(".gain"))
    elif recipe["method"] == "weight_norm":
        for module in list(model.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                parametrizations.weight_norm(module)
    return model


def recipe_of(cfg: DictConfig, arm: str) -> dict[str, Any]:
    """Settings of an arm.

    Raises:
        ValueError: If there is no such arm; lists those there are.
    """
    if arm not in cfg.recipe:
        raise ValueError(f"`arms` may hold {', '.join(cfg.recipe)}, got {arm!r}.")
    return {**PLAIN, **OmegaConf.to_container(cfg.recipe[arm])}  # type: ignore[dict-item]


class Watch(pl.Callback):
    """The training loss every so many steps; ends a training whose loss is not finite."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.curve: list[tuple[int, float]] = []
        self.stopped: int | None = None  # step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every:
            return
        loss = float(outputs["loss"])
        if loss - loss == 0:
            self.curve.append((trainer.global_step, loss))
        else:
            self.stopped = trainer.global_step
            trainer.should_stop = True


if __name__ == "__main__":
    main()
