"""Attention-entropy maximisation (AEM) in multiple-instance learning: python -m experiments.aem_mil.

AEM's table on Fashion-MNIST bags and four classical sets, with three models. A run is one task, model, seed and arm:
it trains every trial of the arm, values of its strength that the config lists, as many in each arm. The page reports
the trial that the run's own validation bags choose. Continued with ``output_dir=``.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from experiments.aem_mil_results import ARMS, write_results
from experiments.benchmarks.harness import quiet
from experiments.data.mil_bags import Bags, Draws, load_bags
from experiments.evidence import Settings, Store, grid, run_all, sized
from experiments.models.mil import ADAPTER, BagClassifier, build_net, token_row
from experiments.run_info import ROOT
from experiments.train import build
from lightning_reg.callbacks import AttentionEntropyRegularizer
from lightning_reg.schedules import Cosine, TargetController

INSTANCES_AT_ONCE = 20_000  # of a test batch, padding included
RESTART = 1000  # seeds between the restarts of an unregularized run


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="aem_mil")
def main(cfg: DictConfig) -> None:
    """Every task, model, seed and arm, then the page."""
    cfg = sized(cfg)
    OmegaConf.resolve(cfg)  # other processes know nothing of this one's folder
    store = Store(Path(cfg.output_dir))
    if not cfg.results_only:
        check(cfg)
        runs = grid(seed=cfg.seeds, task=cfg.tasks, model=cfg.models, arm=cfg.arms)
        with quiet():
            run_in_processes(store, runs, cfg)
    print(write_results(store, store.folder))


def check(cfg: DictConfig) -> None:
    """Raise before the first training what would stop a later one.

    Raises:
        ValueError: If an arm, model or task does not exist, or the arms differ in their trials.
        MissingData: If data or torchmil are not installed.
    """
    unknown = [arm for arm in cfg.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"`arms` may hold {', '.join(ARMS)}, got {unknown[0]!r}.")
    if len({len(cfg.trials[arm]) for arm in cfg.arms}) > 1:
        counts = ", ".join(f"{arm} {len(cfg.trials[arm])}" for arm in cfg.arms)
        raise ValueError(f"`trials` must have as many values in each arm, got {counts}.")
    for name in cfg.models:
        build_net(name, 2, 4, 0.0)
    for task in cfg.tasks:
        load_bags(task, 0, Path(cfg.packages))


def run_in_processes(store: Store, runs: Sequence[Settings], cfg: DictConfig) -> None:
    """As ``run_all``, with ``cfg.workers`` processes; what they have done is written in the order of ``runs``."""
    if cfg.workers == 1:
        torch.set_num_threads(cfg.threads)
        return run_all(store, runs, lambda run: train(cfg, run))
    done = store.done()
    # CUDA and the threads of the parent do not survive a fork
    with ProcessPoolExecutor(cfg.workers, get_context("spawn"), torch.set_num_threads, (cfg.threads,)) as pool:
        left = {store.path(run): pool.submit(train, cfg, run) for run in runs if store.path(run).name not in done}
        try:
            run_all(store, runs, lambda run: left[store.path(run)].result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def train(cfg: DictConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Train the trials of a run: on validation and test bags AUC, loss, entropy, and AUC of the attention."""
    with quiet():
        trials = [{"value": value, **trial(cfg, run, value)} for value in cfg.trials[run["arm"]]]
    return {"trials": trials, "learning_rate": cfg.learning_rate, **recipe(cfg, run["task"])}


def trial(cfg: DictConfig, run: Mapping[str, Any], value: float) -> dict[str, dict[str, float]]:
    """Train with one strength, or for the arm ``none`` once more from another start."""
    arm, length = run["arm"], recipe(cfg, run["task"])
    bags = load_bags(run["task"], run["seed"], Path(cfg.packages), cfg.test_bags)
    pl.seed_everything(run["seed"] + (RESTART * int(value) if arm == "none" else 0), workers=True, verbose=False)
    settings: dict[str, Any] = {"learning_rate": cfg.learning_rate}
    if arm in ("learning_rate", "dropout", "weight_decay"):
        settings[arm] = value
    features = bags["train"].table.shape[1]
    model = BagClassifier(run["model"], features, cfg.width, **settings)
    trainer = build(cfg.trainer, callbacks=callbacks(arm, value, run["model"]), max_steps=length["steps"])
    device = trainer.strategy.root_device
    bags = {part: found.to(device) for part, found in bags.items()}
    trainer.fit(model, Draws(bags["train"], length["batch_size"], length["steps"], cfg.most))
    model.to(device).eval()
    return {part: evaluate(model, bags[part]) for part in ("val", "test")}


def recipe(cfg: DictConfig, task: str) -> dict[str, int]:
    """Steps and batch size of a task: those of its kind, where that has its own."""
    return dict(cfg.training.get(task.partition("_")[0], cfg.training.default))


def callbacks(arm: str, value: float, model: str) -> list[Callback]:
    """Regularizers of an arm."""
    # AEM's public code has the entropy in nats; a floor or a target for bags of all sizes is a share of log(instances)
    arguments: dict[str, Any]
    if arm in ("aem_constant", "aem_cosine"):
        schedule = Cosine() if arm == "aem_cosine" else None
        arguments = {"weight": value, "normalize": False, "schedule": schedule}
    elif arm == "floor":
        arguments = {"weight": 1.0, "objective": "floor", "bound": value}
    elif arm == "target":
        # attention starts out uniform: a ramp from there would hold it up for long
        arguments = {"weight": 1.0, "schedule": TargetController(value, quantity="value", ramp=0)}
    else:
        return []
    where: dict[str, Any] = {"targets": "net", "mask": "mask", "adapter": ADAPTER.get(model)}
    if model == "transformer":
        where["mask"] = token_row
    return [AttentionEntropyRegularizer(**arguments, **where)]


@torch.no_grad()
def evaluate(model: BagClassifier, bags: Bags) -> dict[str, float]:
    """Of all bags: AUC, cross-entropy, entropy of the attention, and how well it ranks the instances of a bag."""
    logits, entropy, ranks = [torch.empty(len(bags), device=bags.labels.device) for _ in range(3)]
    for chosen in by_size(bags):
        batch = bags.batch(chosen)
        logits[chosen], entropy[chosen], given = model.look(batch)
        if bags.positive is not None:
            positive = bags.positive[chosen, : given.shape[1]]
            ranks[chosen] = instance_auc(given, positive & batch["mask"], ~positive & batch["mask"])
    found = {
        "auc": binary_auroc(logits, bags.labels.long()),
        "loss": F.binary_cross_entropy_with_logits(logits, bags.labels),
        "entropy": entropy[bags.sizes > 1].mean(),
    }
    if bags.positive is not None:
        found["instance_auc"] = ranks.nanmean()
    return {name: float(number) for name, number in found.items()}


def by_size(bags: Bags) -> Iterator[Tensor]:
    """Places of the bags, alike in size, so that a batch has little padding and fits."""
    left = bags.sizes.argsort(descending=True)
    while len(left):
        count = max(1, INSTANCES_AT_ONCE // int(bags.sizes[left[0]]))
        yield left[:count]
        left = left[count:]


def instance_auc(given: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """By bag (bags,), the share of pairs of a positive and a negative instance of which the positive is given more.

    A tie is half a pair; nan where a bag has no pair.
    """
    pairs = positive[:, :, None] & negative[:, None, :]
    order = torch.sign(given[:, :, None] - given[:, None, :])
    return (pairs * (1 + order) / 2).sum((1, 2)) / pairs.sum((1, 2))


if __name__ == "__main__":
    main()
