"""A training, with and without its regularizers for comparison: python -m experiments.train experiment=quickstart.

Each arm writes ``metrics.csv`` and ``reg_monitor.jsonl`` to its folder; ``summary.json`` and ``report.html`` stand
beside them. The returned objective is what Hydra sweepers optimise.
"""

import json
import logging
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments import resolvers  # noqa: F401 (the configs use them)
from experiments.benchmarks.harness import Variant, interleave, paired_ratio
from experiments.measure import held_out_density
from experiments.report import write_report
from experiments.run_info import ROOT, run_info
from experiments.runs import load_run
from experiments.summary import print_summary
from lightning_reg.callbacks.recording import Monitor

REGULARIZED, PLAIN = "regularized", "plain"
# what a config may build; Hydra 1.4 asks for it
TRUSTED = ["experiments.*", "lightning_reg.*", "lightning.*", "timm.*", "transformers.*", "torch.*", "wandb.Settings"]
TIMED_STEPS = 20

# Lightning recommends products of its makers in every fit
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: not r.getMessage().startswith("💡"))


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
def main(cfg: DictConfig) -> float:
    """Train every arm, compare, report; returns the objective of the first arm, or of the task that a sweep names."""
    output = Path(cfg.output_dir)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if cfg.task is not None:
        return hydra.utils.get_method(cfg.task)(cfg)
    arms = {arm: train_arm(cfg, arm) for arm in cfg.arms}
    summary = {
        "name": cfg.name, "seed": cfg.seed, "command": command(), "max_steps": cfg.trainer.max_steps, **run_info(),
        "arms": arms, "overhead": overhead(cfg),
    }  # fmt: skip
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        (output / "summary.json").write_text(json.dumps(summary, indent=2))
        print_summary(*load_run(output), write_report(output))
    return objective(cfg, arms)


def train_arm(cfg: DictConfig, arm: str) -> dict[str, float]:
    """Fit and test one arm; its last metrics, and what was measured on the test images."""
    cfg = OmegaConf.merge(cfg, {"arm": arm})  # type: ignore[assignment]
    Console().rule(f"{cfg.name}: {arm}")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data, model = build(cfg.data.datamodule), build(cfg.model)
    trainer = build(cfg.trainer, callbacks=callbacks(cfg, arm), logger=list(build(cfg.logger).values()))
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    start = time.perf_counter()
    trainer.fit(model, data)
    scores = {"seconds": time.perf_counter() - start, **plain_numbers(trainer.callback_metrics)}
    trainer.test(model, data, verbose=False)
    scores |= plain_numbers(trainer.callback_metrics) | held_out_density(model.net, data.test_dataloader())
    scores["test_images"] = len(data.test_dataloader().dataset)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # else the next arm would continue this run
    return scores


def callbacks(cfg: DictConfig, arm: str) -> list[Callback]:
    """Callbacks of an arm: the plain one goes without the regularizers."""
    if arm not in (REGULARIZED, PLAIN):
        raise ValueError(f"`arms` may hold {REGULARIZED} and {PLAIN}, got {arm!r}.")
    built = list(build(cfg.callbacks).values())
    return built if arm == REGULARIZED else [item for item in built if not changes_training(item)]


def changes_training(callback: Callback) -> bool:
    """Whether it is one of ours that does more than look."""
    return type(callback).__module__.startswith("lightning_reg.") and not isinstance(callback, Monitor)


def overhead(cfg: DictConfig) -> dict[str, float] | None:
    """Step time with the regularizers, and nothing else, in units of the time without; None for a single arm."""
    if not cfg.timing_rounds or set(cfg.arms) != {REGULARIZED, PLAIN}:
        return None
    Console().rule(f"{cfg.name}: overhead")
    data = build(cfg.data.datamodule)
    data.setup("fit")
    batches = list(data.train_dataloader())[:TIMED_STEPS]

    def regularizers() -> list[Callback]:
        return [item for item in callbacks(cfg, REGULARIZED) if changes_training(item)]

    variants = [Variant(PLAIN, lambda: build(cfg.model)), Variant(REGULARIZED, lambda: build(cfg.model), regularizers)]
    times = interleave(variants, batches, cfg.timing_rounds, TIMED_STEPS)
    ratio = paired_ratio(times[REGULARIZED], times[PLAIN])
    seconds = sorted(times[PLAIN])[len(times[PLAIN]) // 2]
    return {**vars(ratio), "plain_ms": 1e3 * seconds, "rounds": cfg.timing_rounds, "steps": TIMED_STEPS}


def objective(cfg: DictConfig, arms: dict[str, dict[str, float]]) -> float:
    """The number that a sweeper optimises.

    Raises:
        ValueError: If no metric has that name; lists those there are.
    """
    scores = arms[cfg.arms[0]]
    if cfg.objective not in scores:
        raise ValueError(f"`objective={cfg.objective}` was not logged; there are {', '.join(sorted(scores))}.")
    return scores[cfg.objective]


def build(config: DictConfig, **kwargs: Any) -> Any:
    """``hydra.utils.instantiate``, told on Hydra 1.4 and later what it may execute."""
    whitelist = getattr(hydra.utils, "execution_whitelist", None)
    with nullcontext() if whitelist is None else whitelist(TRUSTED):
        return hydra.utils.instantiate(config, **kwargs)


def plain_numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics as numbers, so that they can be written."""
    return {key: float(value) for key, value in metrics.items()}


def command() -> str:
    """The command that started this run."""
    return " ".join(["python -m experiments.train", *sys.argv[1:]])


if __name__ == "__main__":
    main()
