"""FSDP2 for the models of the experiments: what ``trainer=fsdp`` does to them."""

import lightning.pytorch as pl
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


class Sharded(pl.LightningModule):
    """Shards ``net``, and each of its blocks by itself, under Lightning's ``ModelParallelStrategy``."""

    net: nn.Module

    def configure_model(self) -> None:
        """Called by Lightning on every process, after the callbacks' setup, for training and for testing."""
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        stacks = [module for module in self.net.modules() if type(module) in (nn.ModuleList, nn.Sequential)]
        for block in (block for stack in stacks for block in stack if next(block.parameters(), None) is not None):
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)
