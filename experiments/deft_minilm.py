"""DEFT on MiniLM: lower activation density at equal accuracy? python -m experiments.deft_minilm.

Fine-tuning on BBC News and on the sentiment of movie reviews, whole and with LoRA, with GELU and with ReLU instead.
Each of these cells tries a grid of weights and epsilons with one seed; the sparsest that costs no more than allowed on
the validation texts is trained with the seeds that are reported, beside plain fine-tuning, the public code's settings
and a controller. Continued with ``output_dir=``.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from experiments.benchmarks.harness import quiet
from experiments.data.bbc_news import BBCNews
from experiments.data.movie_reviews import MovieReviews
from experiments.data.texts import Batches, Texts
from experiments.deft_minilm_results import choose, write_results
from experiments.evidence import Store, grid, run_all, sized
from experiments.models.minilm import TextClassifier, add_lora, find_weights, load_classifier, weights_type
from experiments.run_info import ROOT
from experiments.train import build
from lightning_reg.callbacks import ActivationDensityRegularizer, ActivationSubstitution
from lightning_reg.capture import find_down_projections
from lightning_reg.metrics import ActivationDensity
from lightning_reg.schedules import TargetController

DATA: dict[str, type[Texts]] = {"bbc": BBCNews, "movies": MovieReviews}


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="deft_minilm")
def main(cfg: DictConfig) -> None:
    """Every cell: its grid, then its seeds; then the page."""
    cfg = sized(cfg)
    torch.set_num_threads(cfg.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    store = Store(Path(cfg.output_dir))
    if not cfg.results_only:
        with quiet():
            for cell in grid(task=cfg.tasks, tuning=cfg.tunings, activation=cfg.activations):
                run_cell(cfg, store, cell)
    print(write_results(store, store.folder, cfg.tuning_seed, cfg.allowed))


def run_cell(cfg: DictConfig, store: Store, cell: Mapping[str, str]) -> None:
    """Choose weight and epsilon with the tuning seed, then train what is reported."""

    def runs(arms: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
        return [{**cell, **arm, "seed": seed} for seed in seeds for arm in arms]

    tried = grid(arm=["density"], epsilon=cfg.epsilons, weight=cfg.weights)
    run_all(store, runs([{"arm": "none"}, *tried], [cfg.tuning_seed]), lambda run: train(cfg, run))
    chosen = choose(store.read(), cell, cfg.tuning_seed, cfg.allowed)
    targets = grid(arm=["target"], target=cfg.targets[cell["activation"]])
    reported = [{"arm": "none"}, {"arm": "paper"}, *([chosen] if chosen else []), *targets]
    run_all(store, runs(reported, cfg.seeds), lambda run: train(cfg, run))


def train(cfg: DictConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Fine-tune once; accuracy and densities on validation and test texts."""
    folder = find_weights(Path(cfg.packages))
    pl.seed_everything(run["seed"], workers=True, verbose=False)
    source = DATA[run["task"]]
    data = source(str(folder), run["seed"], packages=cfg.packages, **cfg.data[run["task"]])
    net = load_classifier(folder, data.classes)
    if run["tuning"] == "lora":
        net = add_lora(net, **cfg.lora)
    model = TextClassifier(net, **cfg.recipe[run["tuning"]])
    steps = cfg.steps[run["task"]]
    trainer = build(cfg.trainer, callbacks=callbacks(cfg, run), max_steps=steps, limit_val_batches=0)
    trainer.fit(model, data)
    libraries = ("transformers", "peft") if run["tuning"] == "lora" else ("transformers",)
    measured = {
        f"{part}_{name}": value
        for part in ("val", "test")
        for name, value in measure(model, data.held_out(part), cfg.limit).items()
    }
    return {
        **measured, "steps": steps, "batch_size": data.batch_size, "length": data.length,
        "precision": str(trainer.precision), "weights": weights_type(folder), "limit": cfg.limit,
        "sizes": {name: len(part["labels"]) for name, part in data.parts.items()},
        "libraries": ", ".join(f"{name} {version(name)}" for name in libraries),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "recipe": OmegaConf.to_container(cfg.recipe[run["tuning"]]), "lora": OmegaConf.to_container(cfg.lora),
    }  # fmt: skip


def callbacks(cfg: DictConfig, run: Mapping[str, Any]) -> list[Callback]:
    """Those of a run."""
    found: list[Callback] = [ActivationSubstitution("relu")] if run["activation"] == "relu" else []
    if run["arm"] == "paper":  # as the public code: padding is in its loss
        found.append(ActivationDensityRegularizer(1.0, epsilon=1e-7))
    elif run["arm"] == "density":
        found.append(ActivationDensityRegularizer(run["weight"], epsilon=run["epsilon"], mask="attention_mask"))
    elif run["arm"] == "target":
        schedule = TargetController(run["target"])
        found.append(
            ActivationDensityRegularizer(1.0, epsilon=cfg.target_epsilon, schedule=schedule, mask="attention_mask")
        )
    return found


@torch.no_grad()
def measure(model: TextClassifier, batches: Batches, limit: float) -> dict[str, Any]:
    """Accuracy, and densities of the MLPs' hidden activations as the mean over layers.

    ``density_padded`` counts what is not exactly 0 at every position, as the paper does, ``density`` where there is no
    padding; ``large`` is the share above ``limit`` of its token's largest, without padding, ``large_accuracy`` what is
    left when the others are set to 0.
    """
    device = batches.part["labels"].device
    model.to(device).eval()  # the Trainer has taken it off its device
    names, modules = find_down_projections(model.net), dict(model.net.named_modules())
    kinds = {"density_padded": {}, "density": {}, "large": {"relative": limit}}
    metrics = {
        kind: {name: ActivationDensity(**arguments).to(device) for name in names} for kind, arguments in kinds.items()
    }
    valid: list[Tensor] = []  # of the batch at hand

    def count(name: str, x: Tensor) -> None:
        for kind, by_layer in metrics.items():
            by_layer[name].update(x, None if kind == "density_padded" else valid[-1])

    def drop(_: str, x: Tensor) -> Tensor:
        return x.where(x.abs() > limit * x.abs().amax(-1, keepdim=True), 0)

    accuracy = {}
    for key, see in (("accuracy", count), ("large_accuracy", drop)):
        correct: Tensor | int = 0
        with seen(modules, names, see):
            for batch in batches:
                valid[:] = [batch["attention_mask"].bool()]
                logits = model.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                correct = correct + (logits.argmax(-1) == batch["labels"]).sum()
        accuracy[key] = int(correct) / len(batches.part["labels"])
    layers = {kind: [float(metric.compute()) for metric in by_layer.values()] for kind, by_layer in metrics.items()}
    means = {kind: sum(values) / len(values) for kind, values in layers.items()}
    return {**accuracy, **means, "layers": layers["density"]}


@contextmanager
def seen(
    modules: Mapping[str, nn.Module], names: list[str], see: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Show what enters the named modules to ``see``, which may return something else in its place."""

    def hook(name: str) -> Any:
        def show(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = see(name, args[0])
            return None if changed is None else (changed, *args[1:])

        return show

    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
