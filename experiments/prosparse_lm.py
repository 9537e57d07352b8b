"""ProSparse on SmolLM2-135M: nine tenths of the activations at comparable quality? python -m experiments.prosparse_lm.

The pretrained SiLU model is continued with ReLU and each way to sparse activations, at equal tokens. With one seed the
learning rates of SiLU and ReLU are chosen, and the strengths that reach the sparsity asked for; then every arm is
trained with the seeds that are reported. Continued with ``output_dir=``.
"""

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from experiments.benchmarks.harness import quiet
from experiments.data.token_windows import TokenWindows
from experiments.evidence import Record, Store, grid, run_all, sized
from experiments.models import LanguageModel
from experiments.models.smollm2 import find_weights, load_llama, load_tokenizer
from experiments.prosparse_lm_results import UNTRAINED, encloses, write_results
from experiments.run_info import ROOT
from experiments.train import build
from lightning_reg.activations import ShiftedReLU, activation_record, substitute_activations
from lightning_reg.calibration import calibrate_fatrelu, perplexity_sparsity
from lightning_reg.callbacks import (
    ActivationHoyerRegularizer,
    ActivationL1Regularizer,
    ActivationSubstitution,
    ProgressiveSparsity,
)
from lightning_reg.capture import find_down_projections, named_modules
from lightning_reg.metrics import ActivationDensity, ChunkDensity, DeadNeurons
from lightning_reg.schedules import TargetController, prosparse_stages

WEIGHTED = ("constant_l1", "prosparse", "hoyer")  # arms whose strength is searched for
CHUNK = 8  # tokens
FACTOR = 8.0  # the farthest that a search goes at once

Settings = dict[str, Any]


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="prosparse_lm")
def main(cfg: DictConfig) -> None:
    """The model as it comes, then every arm: learning rate, strength, seeds; then the page."""
    cfg = sized(cfg)
    torch.set_num_threads(cfg.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    store = Store(Path(cfg.output_dir))
    if not cfg.results_only:
        with quiet():
            for arm in cfg.arms:
                run_all(store, runs_of(cfg, store, arm), lambda run: train(cfg, run))
    print(write_results(store, store.folder, cfg.tuning_seed, cfg.sparsity))


def runs_of(cfg: DictConfig, store: Store, arm: str) -> list[Settings]:
    """Runs of an arm that are reported, after those that find its learning rate and its strength.

    Raises:
        ValueError: If there is no such arm; lists those there are.
    """
    known = [UNTRAINED, *cfg.strengths]
    if arm not in known:
        raise ValueError(f"`arms` may hold {', '.join(known)}, got {arm!r}.")
    if arm == UNTRAINED:
        return grid(arm=[arm], strength=[0.0], learning_rate=[0.0], seed=[0])
    tuned = "silu" if arm == "silu" else "relu"
    rates = [settings(tuned, cfg.strengths[tuned], rate, cfg.tuning_seed) for rate in cfg.learning_rates[tuned]]
    run_all(store, rates, lambda run: train(cfg, run))
    rate = best_rate([record for record in store.read() if record["settings"] in rates])
    strength = cfg.strengths[arm]
    if arm in WEIGHTED:
        tried: dict[float, float] = {}
        for _ in range(cfg.tries):
            run = settings(arm, next_strength(tried, cfg.sparsity, strength), rate, cfg.tuning_seed)
            run_all(store, [run], lambda run: train(cfg, run))
            (record,) = [record for record in store.read() if record["settings"] == run]
            tried[run["strength"]] = record["result"]["sparsity"]
        strength = reported_strength(tried, cfg.sparsity)
    return [settings(arm, strength, rate, seed) for seed in cfg.seeds]


def settings(arm: str, strength: float, learning_rate: float, seed: int) -> Settings:
    """Of a run."""
    return {"arm": arm, "strength": float(strength), "learning_rate": float(learning_rate), "seed": seed}


def best_rate(records: Sequence[Record]) -> float:
    """The learning rate of the smallest validation loss."""
    best = min(records, key=lambda record: record["result"]["loss"])
    return best["settings"]["learning_rate"]


def next_strength(tried: Mapping[float, float], sparsity: float, start: float) -> float:
    """A strength for a sparsity: where a line through two tries, log density over log strength, reaches it.

    The two are the nearest on both sides, or the nearest two. A line that falls the wrong way, or reaches it farther
    than ``FACTOR`` beyond what was tried, ends there.

    Args:
        tried: Sparsity by strength.
        sparsity: To reach, < 1.
        start: First try.
    """
    if not tried:
        return start
    distance = {strength: log(max(1 - found, 1e-6) / (1 - sparsity)) for strength, found in tried.items()}
    low = max((s for s, d in distance.items() if d > 0), default=None)  # too dense
    high = min((s for s, d in distance.items() if d <= 0), default=None)
    beyond = max(tried) * FACTOR if high is None else min(tried) / FACTOR
    if low is None or high is None or low >= high:
        nearest = sorted(distance, key=lambda strength: abs(distance[strength]))[:2]
        if len(nearest) < 2:
            return beyond
        low, high = sorted(nearest)
    slope = (distance[high] - distance[low]) / log(high / low)
    if slope >= 0:
        return beyond
    found = low * exp(-distance[low] / slope)
    return float(f"{min(max(found, min(tried) / FACTOR), max(tried) * FACTOR):.3g}")


def reported_strength(tried: Mapping[float, float], sparsity: float) -> float:
    """Between the two tries that enclose a sparsity; where none do, the nearest try: what was not tried is not trusted.

    Args:
        tried: Sparsity by strength, not empty.
        sparsity: To reach, < 1.
    """
    if encloses(tried.values(), sparsity):
        return next_strength(tried, sparsity, min(tried))
    return min(tried, key=lambda strength: abs(tried[strength] - sparsity))


def train(cfg: DictConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Continue the model in one arm; loss and sparsities on the held-out text."""
    pl.seed_everything(run["seed"], workers=True, verbose=False)
    net = deepcopy(pretrained(cfg))
    model = LanguageModel(net, learning_rate=run["learning_rate"], minimum=cfg.minimum * run["learning_rate"])
    data = windows(cfg, run["seed"], cfg.steps)
    untrained, tuning = run["arm"] == UNTRAINED, run["seed"] == cfg.tuning_seed
    found = [] if untrained else callbacks(cfg, run["arm"], run["strength"])
    trainer = build(cfg.trainer, callbacks=found, max_steps=cfg.steps, limit_val_batches=0)
    if untrained:
        data.setup("fit")
    else:
        trainer.fit(model, data)
    device = trainer.strategy.root_device
    model.to(device).eval()
    batches = [batch.to(device) for batch in data.val_dataloader()]
    half = str(trainer.precision).startswith("bf16")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return model(batch.to(device))

    result = {**measure(model, batches, loss), **facts(cfg, model, trainer, found)}
    if untrained and cfg.model.name == "smollm2":
        check_weights(result["loss"], net.config.vocab_size)
    if untrained or not tuning:
        some = batches[: cfg.perplexity.batches]
        truncated = perplexity_sparsity(model, some, loss=loss, increase=0.01, grid=cfg.perplexity.grid)
        result["truncated"] = {
            "sparsity": truncated.sparsity, "layer_sparsity": list(truncated.layer_sparsity.values()),
            "cett": truncated.cett, "dense": truncated.perplexity_dense, "sparse": truncated.perplexity_sparse,
        }  # fmt: skip
    if untrained:
        substitute_activations(model, "relu")
        result["swapped"] = measure(model, batches, loss)
    if run["arm"] in cfg.shift.arms and not tuning:
        limit = {"target": cfg.shift.error, "method": "cett", "tokens": cfg.shift.tokens}
        thresholds = list(calibrate_fatrelu(model, data.train_dataloader(), run=loss, **limit).values())
        result["shifted"] = {**measure(model, batches, loss), "thresholds": thresholds, "error": cfg.shift.error}
    return result


def callbacks(cfg: DictConfig, arm: str, strength: float) -> list[Callback]:
    """Those of an arm."""
    relu: Callback = ActivationSubstitution("relu")
    if arm == "prosparse":  # the stages of the 7B model as shares of this training, their last weight the strength
        stages = prosparse_stages("7b", tokens=1, width=1, layers=1, unit=1.0, fractions=True)
        last = stages[-1][1]
        return [ProgressiveSparsity([(end, strength * weight / last) for end, weight in stages])]
    return {
        "silu": lambda: [],
        "relu": lambda: [relu],
        "shifted_relu": lambda: [ActivationSubstitution(ShiftedReLU(strength))],
        "constant_l1": lambda: [relu, ActivationL1Regularizer(strength)],
        "hoyer": lambda: [relu, ActivationHoyerRegularizer(strength)],
        "controller": lambda: [relu, ActivationL1Regularizer(1.0, schedule=TargetController(1 - cfg.sparsity))],
    }[arm]()


def facts(cfg: DictConfig, model: LanguageModel, trainer: pl.Trainer, found: Sequence[Callback]) -> dict[str, Any]:
    """What the page says of a run besides its measurements."""
    config = model.net.config
    return {
        "steps": trainer.global_step, "tokens": trainer.global_step * cfg.data.batch_size * cfg.data.length,
        "length": cfg.data.length, "batch_size": cfg.data.batch_size, "precision": str(trainer.precision),
        "model": cfg.model.name, "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers, "width": config.intermediate_size,
        "val_tokens": cfg.data.val_windows * cfg.data.length, "activations": activation_record(model),
        "factors": [c.schedule.factor for c in found if isinstance(getattr(c, "schedule", None), TargetController)],
        "gradient_clip": trainer.gradient_clip_val, "minimum": cfg.minimum,
    }  # fmt: skip


def check_weights(loss: float, vocabulary: int) -> None:
    """Refuse a model that has learnt nothing: its weights were not read as they were written.

    Raises:
        RuntimeError: If the loss is more than half of that of uniform guesses.
    """
    if not loss < 0.5 * log(vocabulary):
        raise RuntimeError(f"the loss of the model before training is {loss:.2f} nats: its weights are not in place.")


@torch.no_grad()
def measure(model: nn.Module, batches: Sequence[Tensor], loss: Any) -> dict[str, Any]:
    """Loss in nats a token, share of exact zeros by layer and by chunk of tokens, share of dead neurons."""
    names, modules = find_down_projections(model), named_modules(model)
    device = batches[0].device
    metrics = {
        name: {"density": ActivationDensity().to(device), "chunk": ChunkDensity(CHUNK).to(device),
               "dead": DeadNeurons().to(device)} for name in names
    }  # fmt: skip

    def see(name: str) -> Any:
        def pre_hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for metric in metrics[name].values():
                metric.update(args[0])

        return pre_hook

    handles = [modules[name].register_forward_pre_hook(see(name)) for name in names]
    losses = torch.stack([loss(model, batch) for batch in batches])
    for handle in handles:
        handle.remove()
    layers = {key: [float(metrics[name][key].compute()) for name in names] for key in ("density", "chunk", "dead")}
    layer_sparsity = [1 - density for density in layers["density"]]
    return {
        "loss": float(losses.double().mean()), "sparsity": mean(layer_sparsity), "layer_sparsity": layer_sparsity,
        "chunk_sparsity": 1 - mean(layers["chunk"]), "dead": mean(layers["dead"]),
    }  # fmt: skip


def mean(values: Sequence[float]) -> float:
    """Arithmetic."""
    return sum(values) / len(values)


def windows(cfg: DictConfig, seed: int, steps: int) -> TokenWindows:
    """Text of a run."""
    return TokenWindows(seed, None if cfg.model.name == "scratch" else encoder(cfg), steps=steps, **cfg.data)


def encoder(cfg: DictConfig) -> Any:
    """From texts to tokens of SmolLM2; its tokenizer is read when it is needed."""
    return lambda texts: load_tokenizer(find_weights(cfg.model.weights, Path(cfg.packages)))(texts)["input_ids"]


def pretrained(cfg: DictConfig) -> nn.Module:
    """The model that every arm continues."""
    return _pretrained(OmegaConf.to_yaml(cfg, resolve=True))


@cache
def _pretrained(text: str) -> nn.Module:
    cfg = OmegaConf.create(text)
    if cfg.model.name == "smollm2":
        return load_llama(find_weights(cfg.model.weights, Path(cfg.packages)))
    from transformers import LlamaConfig, LlamaForCausalLM

    pl.seed_everything(cfg.scratch.seed, workers=True, verbose=False)
    config = LlamaConfig(
        **cfg.scratch.config, max_position_embeddings=cfg.data.length, bos_token_id=None, eos_token_id=None
    )
    model = LanguageModel(LlamaForCausalLM(config), learning_rate=cfg.scratch.learning_rate)
    trainer = build(cfg.trainer, max_steps=cfg.scratch.steps, limit_val_batches=0)
    trainer.fit(model, windows(cfg, cfg.scratch.seed, cfg.scratch.steps))
    return model.net.cpu()


if __name__ == "__main__":
    main()
