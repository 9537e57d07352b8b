"""Two processes over gloo: both clip by the largest logit of either, and equal one process with the whole batch."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_reg.callbacks import QKClip
from tests import tiny
from tests.distributed.test_weight_sparsity import Batches, ddp

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]


class Keep(pl.Callback):
    """Writes what each process ends with, what it saw, and how many reductions it took."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reductions, self.steps = folder, 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (callback,) = [one for one in trainer.callbacks if isinstance(one, QKClip)]
        self.callback, clip = callback, callback._clip
        if not torch.distributed.is_initialized():
            return
        plain = torch.distributed.all_reduce

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reductions += 1
            return plain(*args, **kwargs)

        def watched(layers: Any) -> None:
            self.steps += 1
            torch.distributed.all_reduce = counted
            try:
                clip(layers)
            finally:
                torch.distributed.all_reduce = plain

        callback._clip = watched  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.last = [layer.last[0] for layer in self.callback._layers if layer.last is not None]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = {"weights": tiny.parameters(pl_module), "last": self.last, "counts": (self.reductions, self.steps)}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_processes_clip_by_the_largest_logit_of_either(accumulate: int, tmp_path: Path) -> None:
    def clip() -> list[pl.Callback]:
        return [QKClip(threshold=0.1, heads=2), Keep(tmp_path)]

    tiny.fit(Batches(4), clip(), accumulate_grad_batches=accumulate, **ddp())
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(one["weights"], other["weights"])
    assert all(torch.equal(*pair) for pair in zip(one["last"], other["last"], strict=True))
    assert one["counts"][0] == one["counts"][1] == 8 // accumulate  # one reduction a step, for all heads of all layers
    single = Batches(8)
    tiny.fit(single, clip(), accumulate_grad_batches=accumulate)
    alone = torch.load(tmp_path / "rank0.pt")
    assert tiny.distance(alone["weights"], one["weights"]) <= 1e-6
    assert tiny.distance(alone["weights"], tiny.fit(Batches(8), accumulate_grad_batches=accumulate)) > 1e-2


def test_resumed_processes_equal_uninterrupted_ones(tmp_path: Path) -> None:
    def run(folder: str, checkpoint: Path | None = None) -> list[Any]:
        (tmp_path / folder).mkdir()
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [QKClip(threshold=0.1, heads=2, every=3), saver, Keep(tmp_path / folder)]
        trainer = tiny.trainer(callbacks, max_epochs=2, enable_checkpointing=True, **ddp())
        trainer.fit(Batches(4), ckpt_path=checkpoint)
        return [torch.load(tmp_path / folder / f"rank{rank}.pt")["weights"] for rank in range(2)]

    whole = run("whole")
    resumed = run("resumed", tmp_path / "epoch=0.ckpt")
    assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))
