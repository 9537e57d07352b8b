"""Two processes over gloo: the same masks on both, and those of one process with the whole batch."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset

from lightning_reg.callbacks import WeightSparsity
from tests import tiny

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"every": 1},
    "random": {"method": "random"},
    "rigl": {"method": "rigl", "schedule": "constant", "every": 1},
    "two_four": {"pattern": "2:4"},
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # trainer arguments, strategy arguments
    "plain": ({}, {}),
    "accumulate_clip": ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {}),
    "bucket_view": ({}, {"gradient_as_bucket_view": True}),
}


class Batches(tiny.Tiny):
    """Batches of 4 in each of two processes, or of 8 in one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self) -> DataLoader:
        world = self.trainer.world_size
        part = Subset(tiny.loader(16).dataset, range(self.trainer.global_rank, 64, world))
        return DataLoader(part, batch_size=self.size)


class Keep(pl.Callback):
    """Writes what each process ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (callback,) = [one for one in trainer.callbacks if isinstance(one, WeightSparsity)]
        state = {"masks": callback.state_dict()["masks"]["pruned"], "weights": tiny.parameters(pl_module)}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


def ddp(**kwargs: Any) -> dict[str, Any]:
    return {
        "devices": 2,
        "use_distributed_sampler": False,
        "strategy": DDPStrategy(process_group_backend="gloo", start_method="fork", **kwargs),
    }


def make(method: str) -> WeightSparsity:
    return WeightSparsity(0.5 if method == "two_four" else 0.7, **METHODS[method])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_all_processes_have_the_masks_of_one(method: str, settings: str, tmp_path: Path) -> None:
    arguments, strategy = SETTINGS[settings]
    tiny.fit(Batches(4), [make(method), Keep(tmp_path)], **arguments, **ddp(**strategy))
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert one["masks"].keys() == other["masks"].keys()
    assert all(torch.equal(mask, other["masks"][key]) for key, mask in one["masks"].items())
    assert torch.equal(one["weights"], other["weights"])
    single = Batches(8)
    tiny.fit(single, [make(method), Keep(tmp_path)], **arguments)
    alone = torch.load(tmp_path / "rank0.pt")
    assert all(torch.equal(mask, one["masks"][key]) for key, mask in alone["masks"].items())
    assert tiny.distance(alone["weights"], one["weights"]) <= 1e-6


def test_resumed_processes_equal_uninterrupted_ones(tmp_path: Path) -> None:
    def run(folder: str, checkpoint: Path | None = None) -> list[Any]:
        (tmp_path / folder).mkdir()
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [make("rigl"), saver, Keep(tmp_path / folder)]
        trainer = tiny.trainer(callbacks, max_epochs=2, enable_checkpointing=True, **ddp())
        trainer.fit(Batches(4), ckpt_path=checkpoint)
        return [torch.load(tmp_path / folder / f"rank{rank}.pt") for rank in range(2)]

    whole = run("whole")
    resumed = run("resumed", tmp_path / "epoch=0.ckpt")
    for before, after in zip(whole, resumed, strict=True):
        assert torch.equal(before["weights"], after["weights"])
        assert all(torch.equal(mask, after["masks"][key]) for key, mask in before["masks"].items())
