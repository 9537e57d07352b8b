"""Controllers inside a training: what they measure, when they act, how they resume."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_reg import regularize
from lightning_reg.callbacks import (
    ActivationHoyerRegularizer,
    ActivationL1Regularizer,
    ActivationSubstitution,
    AttentionEntropyRegularizer,
)
from lightning_reg.schedules import TargetController
from tests import tiny
from tests.callbacks.test_progressive_sparsity import Smooth
from tests.test_engine import assert_untouched

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


GENTLE = {"start": 1.0, "ramp": 0.5, "smoothing": 0.5, "maximum": 10.0, "gain": 1.0, "integral_time": 4}


def l1(target: float = 0.3, **arguments: Any) -> ActivationL1Regularizer:
    return ActivationL1Regularizer(1.0, schedule=TargetController(target, **{**GENTLE, **arguments}))


def hidden_density(module: Smooth, x: Tensor) -> float:
    shares = []
    with torch.no_grad():
        for block in module.net.blocks:
            x = x + block.attention(x)
            hidden = block.fc1(x).relu()
            shares.append((hidden != 0).double().mean())
            x = x + block.fc2(hidden)
    return torch.stack(shares).mean().item()


class Watch(pl.Callback):
    """Measures the density of each batch by hand, before the step, and keeps the weight used."""

    def __init__(self, regularizer: Any) -> None:
        self.regularizer, self.densities, self.weights = regularizer, [], []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.densities.append(hidden_density(pl_module, batch[0]))
        self.weights.append(self.regularizer.strength)


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (3, 1), (1, 3)])
def test_controller_sees_the_density_of_every_step(accumulate: int, every: int) -> None:
    regularizer = l1(every=every)
    watch = Watch(regularizer)
    callbacks = [ActivationSubstitution(), regularizer, watch]
    tiny.fit(Smooth(batches=12), callbacks, accumulate_grad_batches=accumulate)
    by_hand, steps, weights = TargetController(0.3, **GENTLE, every=every), 12 // accumulate, []
    for step in range(steps):
        weights += [by_hand(step)] * accumulate
        if (step + 1) % every == 0:
            taken = watch.densities[(step + 1 - every) * accumulate : (step + 1) * accumulate]
            by_hand.update(sum(taken) / len(taken), step + 1, steps)
    assert watch.weights == pytest.approx(weights, rel=1e-4)
    assert len(set(weights)) > 2


@pytest.mark.parametrize("make", [l1, lambda: ActivationHoyerRegularizer(1.0, schedule=TargetController(0.3))])
def test_resumed_control_equals_uninterrupted_bit_for_bit(make: Any, tmp_path: Path) -> None:
    def run(checkpoint: str | None) -> tuple[Tensor, dict[str, Any]]:
        module, regularizer = Smooth(optimizer="adam"), make()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [ActivationSubstitution(), regularizer] + ([] if checkpoint else [keep])
        tiny.trainer(callbacks, max_epochs=2, enable_checkpointing=checkpoint is None).fit(module, ckpt_path=checkpoint)
        return tiny.parameters(module), regularizer.schedule.state_dict()

    whole, state = run(None)
    resumed, resumed_state = run(str(tmp_path / "epoch=0.ckpt"))
    assert torch.equal(whole, resumed)
    assert state == resumed_state


def test_second_fit_starts_afresh() -> None:
    regularizer = l1()
    first = tiny.fit(Smooth(), [ActivationSubstitution(), regularizer])
    assert torch.equal(tiny.fit(Smooth(), [ActivationSubstitution(), regularizer]), first)


def test_density_and_weight_are_logged() -> None:
    regularizer = l1()
    trainer = tiny.trainer([ActivationSubstitution(), regularizer], log_every_n_steps=1)
    trainer.fit(Smooth())
    logged = trainer.logged_metrics
    assert logged["reg/activation_l1/density"].item() == pytest.approx(regularizer.schedule.average, rel=1e-6)
    assert logged["reg/activation_l1/weight"].item() == pytest.approx(regularizer.strength, rel=1e-6)


def test_entropy_of_attention_is_steered_by_its_value() -> None:
    controller = TargetController(0.5, quantity="value", ramp=0, smoothing=0.0, start=1.0, maximum=3.0)
    lower = AttentionEntropyRegularizer(1.0, objective="minimize", schedule=controller)
    tiny.fit(tiny.Tiny(), [lower])
    assert controller(0) > 1.0  # the entropy of a fresh model is near 1: more weight brings it down
    controller = TargetController(0.5, quantity="value", ramp=0, smoothing=0.0, start=1.0, maximum=3.0)
    tiny.fit(tiny.Tiny(), [AttentionEntropyRegularizer(1.0, objective="maximize", schedule=controller)])
    assert controller(0) < 1.0  # here less weight does


class Logs(Smooth):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("mine", float(batch_idx + 1))
        return super().training_step(batch, batch_idx)


def test_any_logged_number_can_be_the_quantity() -> None:
    controller = TargetController(5.0, quantity="mine", ramp=0, smoothing=0.0)
    tiny.fit(Logs(), [ActivationSubstitution(), ActivationL1Regularizer(1.0, schedule=controller)])
    assert controller.average == 8.0


def test_handwritten_loop_equals_the_trainer() -> None:
    regularizer = l1()
    wanted = tiny.fit(Smooth(batches=12), [ActivationSubstitution(), regularizer])
    module = Smooth(batches=12)
    with regularize(module, [ActivationSubstitution(), l1()], total_steps=12) as reg:
        optimizer = module.configure_optimizers()
        for (x,) in module.train_dataloader():
            optimizer.zero_grad()
            reg.add(module.loss(x)).backward()
            optimizer.step()
    assert tiny.distance(tiny.parameters(module), wanted) <= 1e-6


def test_compiled_blocks_are_measured() -> None:
    torch.compiler.reset()
    module = Smooth()
    for block in module.net.blocks:
        block.compile(backend="aot_eager")
    compiled = tiny.fit(module, [ActivationSubstitution(), l1()])
    assert tiny.distance(compiled, tiny.fit(Smooth(), [ActivationSubstitution(), l1()])) <= 1e-6


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


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.*use_distributed_sampler.*", "ignore:.*multi-threaded, use of fork.*")
def test_both_processes_hold_the_same_weight() -> None:
    regularizer = l1()
    ddp = DDPStrategy(process_group_backend="gloo", start_method="fork")
    tiny.fit(Smooth(), [ActivationSubstitution(), regularizer, Ranks(regularizer)], devices=2, strategy=ddp)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_exact_density_of_a_smooth_model_is_refused_with_the_remedy() -> None:
    module = Smooth(gated=True)
    with pytest.raises(ValueError, match=r"\(SiLU\) is never exactly 0.*Substitute it.*mlp_pre_activation"):
        tiny.fit(module, [l1()])
    assert_untouched(module)
    tiny.fit(Smooth(gated=True), [l1(threshold=0.1)])


def test_quantity_that_is_never_logged_is_named() -> None:
    module = Smooth()
    with pytest.raises(RuntimeError, match="`quantity='val/acc'` of the controller of activation_l1 was never logged"):
        tiny.fit(module, [ActivationSubstitution(), l1(quantity="val/acc")])
    assert_untouched(module)


def test_density_of_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="`quantity='density'` is of MLP activations, but attention_entropy is about"):
        AttentionEntropyRegularizer(1.0, schedule=TargetController(0.5))
