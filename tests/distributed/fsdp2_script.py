"""Run by `test_fsdp2.py` in two processes: fits under ModelParallelStrategy and saves the gathered parameters."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests import tiny


class Sharded(tiny.Tiny):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if not any(isinstance(p, DTensor) for p in self.parameters()):
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Gather(pl.Callback):
    """Keeps the whole parameters before the strategy goes away."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.vector = torch.cat([p.detach().full_tensor().double().flatten() for p in pl_module.parameters()])


def run(use_reentrant: bool | None, regularized: bool) -> torch.Tensor:
    torch.set_num_threads(1)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    gather = Gather()
    callbacks = [*(tiny.regularizers() if regularized else []), gather]
    module = Sharded(use_reentrant=use_reentrant)
    tiny.trainer(callbacks, devices=2, strategy=strategy).fit(module)
    return gather.vector


if __name__ == "__main__":
    output = Path(sys.argv[1])
    results = {
        "unregularized": run(None, regularized=False),
        "plain": run(None, regularized=True),
        "nonreentrant": run(False, regularized=True),
        "reentrant": run(True, regularized=True),
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, output)
