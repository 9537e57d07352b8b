"""Two processes over gloo: thresholds are averaged as data parallelism averages the parameters of the model."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from tests import tiny
from tests.callbacks.test_entropy_guided import Manual, Twin, guided, learned, weights
from tests.test_engine import DIFFERENT, EXACT

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*use_distributed_sampler.*", "ignore:.*multi-threaded, use of fork.*"),
    pytest.mark.filterwarnings("ignore:.*find_unused_parameters=True was specified.*"),
]


class Ranks(pl.Callback):
    """Fails unless both processes hold the same thresholds after every step, and puts them in the model's log."""

    def __init__(self, callback: Any = None) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.callback is None:
            thresholds = torch.cat([theta.detach().double() for theta in pl_module.theta])
        else:
            assert len(self.callback.thresholds) == 2
            thresholds = learned(self.callback)
        both = [torch.zeros_like(thresholds) for _ in range(2)]
        torch.distributed.all_gather(both, thresholds)
        assert torch.equal(*both), both
        for i, number in enumerate(thresholds):
            pl_module.log(f"threshold/{i}", number)


def ddp_fit(module: Any, callbacks: list[Any], settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ddp = DDPStrategy(process_group_backend="gloo", start_method="fork", find_unused_parameters=True)
    trainer = tiny.trainer(callbacks, devices=2, strategy=ddp, **settings)
    trainer.fit(module)
    logged = [trainer.callback_metrics[f"threshold/{i}"].double() for i in range(2 * tiny.HEADS)]
    return weights(module), torch.stack(logged)


class Partial(Twin):
    """On each of two processes another block runs in the first batch."""

    def loss(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.written or self.calls > 1:
            return super().loss(x)
        return self.net.blocks[self.global_rank](x).square().mean()


@pytest.mark.parametrize(
    ("module", "arguments", "settings"),
    [
        (Twin, {}, {}),
        (Twin, {}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
        (Twin, {"use_reentrant": False}, {}),
        (Manual, {}, {}),
    ],
    ids=["plain", "accumulate_clip", "nonreentrant", "manual"],
)
def test_data_parallel_training_equals_the_handwritten_loss(module: Any, arguments: Any, settings: Any) -> None:
    plain = {**arguments, "use_reentrant": None}
    wanted = ddp_fit(module(handwritten=True, **plain), [Ranks()], settings)
    callback = guided()
    got = ddp_fit(module(**arguments), [callback, Ranks(callback)], settings)
    assert tiny.distance(got[0], wanted[0]) <= EXACT
    assert tiny.distance(got[1], wanted[1]) <= EXACT
    assert tiny.distance(wanted[1], torch.full_like(wanted[1], 0.6)) > DIFFERENT


def test_processes_agree_on_layers_that_ran_on_one_of_them_only() -> None:
    callback = guided(allow_unused=True)
    ddp_fit(Partial(), [callback, Ranks(callback)], {})


class Late(Twin):
    def loss(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        y = self.net.blocks[0](x)
        return (self.net.blocks[1](y) if self.calls > 2 else y).square().mean()


def test_layer_that_runs_after_the_first_step_is_refused() -> None:
    callback = guided(allow_unused=True)
    with pytest.raises(Exception, match="attention ran here for the first time after the first step"):
        ddp_fit(Late(), [callback], {})
