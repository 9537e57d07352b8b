"""Two processes over gloo: a controller holds one weight on both."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_reg.callbacks import ActivationSubstitution
from tests import tiny
from tests.callbacks.test_control import l1
from tests.callbacks.test_progressive_sparsity import Smooth

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*use_distributed_sampler.*", "ignore:.*multi-threaded, use of fork.*"),
    pytest.mark.filterwarnings("ignore:.*missed its target"),
]


class Ranks(pl.Callback):
    """Fails unless both processes hold the same weight after every step."""

    def __init__(self, regularizer: Any) -> None:
        self.regularizer = regularizer

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        weight = torch.tensor(self.regularizer.schedule(0), dtype=torch.float64)
        both = [torch.zeros_like(weight) for _ in range(2)]
        torch.distributed.all_gather(both, weight)
        own = torch.tensor(self.regularizer.control.controller.average, dtype=torch.float64)
        assert torch.equal(*both), both
        assert own > 0


def test_both_processes_hold_the_same_weight() -> None:
    regularizer = l1()
    ddp = DDPStrategy(process_group_backend="gloo", start_method="fork")
    tiny.fit(Smooth(), [ActivationSubstitution(), regularizer, Ranks(regularizer)], devices=2, strategy=ddp)


class Skipping(Smooth):
    """On one of two processes the second batch passes no MLP."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and self.global_rank == 1:
            return sum(p.sum() for p in self.parameters()) * 0.0
        return super().training_step(batch, batch_idx)


def test_process_that_measured_nothing_waits_for_no_one() -> None:
    ddp = DDPStrategy(process_group_backend="gloo", start_method="fork")
    tiny.fit(Skipping(), [ActivationSubstitution(), l1()], devices=2, strategy=ddp)
