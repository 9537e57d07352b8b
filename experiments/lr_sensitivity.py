"""One run of the learning-rate sweep, and what is done at its end: python -m experiments.lr_sensitivity <folder> ....

``python -m experiments.train --multirun sweep=lr_sensitivity`` calls ``run`` for every seed, remedy and learning rate.
Each writes ``run.json`` to its folder, and is not repeated when the sweep's folder is given again.
"""

import json
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback as HydraCallback
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor

from experiments.lr_sensitivity_results import FILE, write_results
from experiments.run_info import run_info
from experiments.train import build
from lightning_reg.callbacks import StabilityMonitor

DECIDING = ("model", "data", "trainer", "callbacks", "seed", "threads")  # parts of the config that decide the result
EVERY = 10  # steps between looks at the training loss and at the attention
# what the library, torch and Lightning call it in the errors that they raise
NOT_FINITE = re.compile(r"(not|non-?) ?finite|\bnan\b|\binf(inity|inite)?\b", re.IGNORECASE)

TRACED = ("max_logit", "entropy_mean", "entropy_min")  # headlines of the monitor

cached_info = cache(run_info)


def run(cfg: DictConfig) -> float:
    """Train once, or take what an earlier sweep wrote; returns the final loss, at most the initial one.

    Raises:
        ValueError: If the folder holds a run with other settings.
    """
    path, settings = Path(cfg.output_dir) / FILE, deciding(cfg)
    try:
        row = finished(path, settings)
        note = "done before"
        if row is None:
            row = {"remedy": cfg.remedy, "learning_rate": cfg.model.learning_rate, "seed": cfg.seed, **train(cfg)}
            note = f"{row['seconds']:.1f} s"
            write(path, {**row, "info": cached_info(), "settings": settings})
    except Exception as error:
        say(cfg, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise
    initial, final = row["initial_loss"], row["final_loss"]
    if final is None:
        say(cfg, f"diverged after {row['steps']} steps, {note}")
    else:
        say(cfg, f"loss {initial:.3f} -> {final:.4f}{'' if final < initial else ', learnt nothing'}, {note}")
    return initial if final is None else min(initial, final)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Losses on the validation data before the first step and after the last, None where not finite, and the trace."""
    # a hundred runs would print as many times which devices there are
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data, model, watch = build(cfg.data.datamodule), build(cfg.model), Watch()
    monitor = StabilityMonitor(quantities=["attention"], every_n_steps=EVERY, warn={}, name="trace")
    start, error = time.perf_counter(), ""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:  # for the monitor's file
        warnings.simplefilter("ignore", PossibleUserWarning)  # advice on workers and intervals
        warnings.filterwarnings("ignore", ".*LeafSpec")  # torch's, of Lightning's code
        trainer = build(
            cfg.trainer, callbacks=[*remedies(cfg), monitor, watch], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, num_sanity_val_steps=-1, default_root_dir=folder,
        )  # fmt: skip
        try:
            trainer.fit(model, data)
        except (RuntimeError, ValueError) as raised:
            if watch.initial is None or not NOT_FINITE.search(str(raised)):
                raise
            error, watch.stopped = f"{type(raised).__name__}: {raised}", True
    final = watch.result(trainer.global_step)
    return {
        "initial_loss": watch.initial, "final_loss": final if math.isfinite(final) else None,
        "steps": trainer.global_step, "seconds": time.perf_counter() - start, "error": error,
        "trace": trace(watch, monitor),
    }  # fmt: skip


def trace(watch: "Watch", monitor: StabilityMonitor) -> dict[str, list[float | None]]:
    """Every ``EVERY`` steps the mean loss since the last point, and what the monitor saw; None where not finite."""
    seen = {line["step"] + 1: line["headlines"] for line in monitor.history}
    columns: dict[str, list[float | None]] = {"step": list(watch.losses), "loss": list(watch.losses.values())}
    for name in TRACED:
        columns[name] = [seen.get(step, {}).get(name) for step in watch.losses]
    return {
        name: [x if x is not None and math.isfinite(x) else None for x in column] for name, column in columns.items()
    }


class Watch(pl.Callback):
    """Validation loss before the first step and after the last; ends a training whose loss is not finite."""

    def __init__(self) -> None:
        self.initial: float | None = None  # of the sanity check, which sees all validation data
        self.last = (-1, math.nan)  # step, loss
        self.stopped = False
        self.losses: dict[int, float] = {}  # of the training by step, means since the last one, without penalties
        self._since: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._since.append(trainer.callback_metrics["train/loss"])
        if trainer.global_step % EVERY == 0:
            self.losses[trainer.global_step] = float(torch.stack(self._since).mean())
            self._since.clear()
            if not math.isfinite(outputs["loss"]):
                self.stopped = trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        if trainer.sanity_checking:
            self.initial = loss
        else:
            self.last = trainer.global_step, loss

    def result(self, steps: int) -> float:
        """The final loss, NaN for a training that was ended.

        Raises:
            ValueError: If there was no validation after the last step.
        """
        if self.stopped:
            return math.nan
        if self.last[0] != steps:
            raise ValueError(
                f"There was no validation after the last step, {steps}: `trainer.val_check_interval` must divide "
                "`trainer.max_steps`."
            )
        return self.last[1]


class Collector(HydraCallback):
    """Hydra's hook for the end of a sweep."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        write_results([Path(config.hydra.sweep.dir)])


def remedies(cfg: DictConfig) -> list[pl.Callback]:
    """The callbacks of a run; settings of a preset that it does not have are no callback."""
    nodes = [node for node in cfg.callbacks.values() if node is not None and "_target_" in node]
    return [build(node) for node in nodes]


def deciding(cfg: DictConfig) -> dict[str, Any]:
    """What decides the result, as JSON gives it back."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain["trainer"].pop("default_root_dir", None)
    plain["callbacks"] = {key: node for key, node in plain["callbacks"].items() if node and "_target_" in node}
    return json.loads(json.dumps({part: plain[part] for part in DECIDING}))


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier run of the same settings.

    Raises:
        ValueError: If it had others; names them.
    """
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    before, now = flat(row["settings"]), flat(settings)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise ValueError(
            f"{path} was run with another {', '.join(changed[:5])}: give another `hydra.sweep.dir`, or remove it."
        )
    return row


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Leaves by their dotted path."""
    if isinstance(node, dict) and node:
        return {key: leaf for name, part in node.items() for key, leaf in flat(part, f"{path}.{name}").items()}
    return {path.lstrip("."): node}


def write(path: Path, row: dict[str, Any]) -> None:
    """All of the file or nothing: half a run must not count as one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(row, indent=2))
    draft.replace(path)


def say(cfg: DictConfig, text: str) -> None:
    """One line a run."""
    number = HydraConfig.get().job.num + 1 if HydraConfig.initialized() else 1
    total = len(cfg.presets) * len(cfg.learning_rates) * len(cfg.seeds)
    line = f"{number:>4}/{total}  seed {cfg.seed}  {cfg.remedy:<17} lr {cfg.model.learning_rate:<7g} {text}"
    Console(width=200).print(line, highlight=False, markup=False)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Which sweep? python -m experiments.lr_sensitivity outputs/lr_sensitivity/<sweep> ...")
    write_results([Path(argument) for argument in sys.argv[1:]])
