"""Two processes over gloo: data parallel training equals the hand-written loss under the same strategy."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_reg.callbacks import SigmaReparam
from tests import tiny
from tests.test_engine import DIFFERENT, EXACT, assert_untouched

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*use_distributed_sampler.*"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*"),
    pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified.*"),
    pytest.mark.filterwarnings("ignore:.*Grad strides do not match bucket view strides.*"),
]

CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: module, its arguments, strategy arguments, trainer arguments
    "plain": (tiny.Tiny, {}, {}, {}),
    "accumulate": (tiny.Tiny, {}, {}, {"accumulate_grad_batches": 3}),
    "find_unused": (tiny.Tiny, {}, {"find_unused_parameters": True}, {}),
    "static_graph": (tiny.Tiny, {}, {"static_graph": True}, {}),
    "nonreentrant": (tiny.Tiny, {"use_reentrant": False}, {}, {}),
    "reentrant": (tiny.Tiny, {"use_reentrant": True}, {}, {}),
    "reentrant_static_graph": (tiny.Tiny, {"use_reentrant": True}, {"static_graph": True}, {}),
    "reentrant_accumulate": (tiny.Tiny, {"use_reentrant": True}, {}, {"accumulate_grad_batches": 2}),
    "manual": (tiny.Manual, {}, {}, {}),
}


class Compiled(tiny.Tiny):
    """Compiles its blocks in the worker: compiled code does not survive a fork."""

    def configure_model(self) -> None:
        for block in self.net.blocks:
            block.compile(backend="aot_eager")


def ddp_fit(
    module: Any, callbacks: list[Any] | None, strategy: dict[str, Any], settings: dict[str, Any]
) -> torch.Tensor:
    ddp = DDPStrategy(process_group_backend="gloo", start_method="fork", **strategy)
    return tiny.fit(module, callbacks, devices=2, strategy=ddp, **settings)


@pytest.mark.parametrize("case", CASES)
def test_data_parallel_training_equals_the_handwritten_loss(case: str) -> None:
    module, arguments, strategy, settings = CASES[case]
    plain = {**arguments, "use_reentrant": None}
    wanted = ddp_fit(module(handwritten=True, **plain), None, strategy, settings)
    trained = module(**arguments)
    assert tiny.distance(ddp_fit(trained, tiny.regularizers(), strategy, settings), wanted) <= EXACT
    assert_untouched(trained)
    assert tiny.distance(ddp_fit(module(**plain), None, strategy, settings), wanted) > DIFFERENT


def test_data_parallel_compiled_blocks_equal_the_handwritten_loss() -> None:
    wanted = ddp_fit(tiny.Tiny(handwritten=True), None, {}, {})
    assert tiny.distance(ddp_fit(Compiled(), tiny.regularizers(), {}, {}), wanted) <= EXACT


class Uneven(tiny.Tiny):
    """Starts from other weights in each process, until DDP sends those of the first."""

    def setup(self, stage: str) -> None:
        torch.manual_seed(self.trainer.global_rank)
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)


class SameEverywhere(pl.Callback):
    """Weights, gains, u and v are those of the first process, and DDP sends no buffers."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        mine = torch.cat([tensor.detach().flatten() for tensor in (*pl_module.parameters(), *pl_module.buffers())])
        assert list(pl_module.buffers())
        assert torch.equal(trainer.strategy.broadcast(mine), mine)
        assert not trainer.strategy.model.modules_buffers  # type: ignore[union-attr]


def test_singular_vectors_agree_without_a_broadcast_at_each_forward() -> None:
    ddp_fit(Uneven(), [SigmaReparam(), SameEverywhere()], {}, {})
