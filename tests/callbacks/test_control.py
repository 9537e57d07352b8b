"""Controllers inside a training: what they measure, when they act, how they resume."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:.*missed its target")


GENTLE = {"start": 1.0, "ramp": 5, "smoothing": 0.5, "maximum": 10.0, "gain": 1.0, "integral_time": 4}


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


def test_resume_between_two_updates_is_bit_exact(tmp_path: Path) -> None:
    def run(checkpoint: str | None) -> Tensor:
        module = Smooth(batches=1)  # one batch an epoch: a checkpoint of an epoch lies between two updates
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [ActivationSubstitution(), l1(every=4, ramp=2)] + ([] if checkpoint else [keep])
        tiny.trainer(callbacks, max_epochs=9, enable_checkpointing=checkpoint is None).fit(module, ckpt_path=checkpoint)
        return tiny.parameters(module)

    assert torch.equal(run(None), run(str(tmp_path / "epoch=5.ckpt")))


def test_density_before_the_activation_is_that_of_the_targets() -> None:
    controller = TargetController(0.3, smoothing=0.0, **{k: v for k, v in GENTLE.items() if k != "smoothing"})
    only = ActivationL1Regularizer(1e-9, role="mlp_pre_activation", targets="1.act_fn", schedule=controller)
    module, watch = Smooth(batches=1), []

    class Second(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            first, second = pl_module.net.blocks
            x = first(batch[0])
            watch.append((second.fc1(x + second.attention(x)) > 0).float().mean().item())

    tiny.fit(module, [ActivationSubstitution(), only, Second()])
    assert controller.average == pytest.approx(watch[0], rel=1e-6)


def test_skipped_batches_are_not_measured_twice() -> None:
    taken: list[int] = []

    class Counting(TargetController):
        def update(self, *args: Any, **kwargs: Any) -> None:
            taken.append(1)
            super().update(*args, **kwargs)

    controller = Counting(0.5, quantity="value", ramp=0, maximum=2.0, start=1.0)
    tiny.fit(tiny.Tiny(returns="none"), [AttentionEntropyRegularizer(1.0, objective="minimize", schedule=controller)])
    assert len(taken) == 6  # two of eight batches return None


def test_missed_target_is_reported_with_numbers() -> None:
    with pytest.warns(UserWarning, match=r"activation_l1 missed its target: density is 0\.\d+ instead of 0.01 after 8"):
        tiny.fit(Smooth(), [ActivationSubstitution(), l1(0.01)])


class Logged(Smooth):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", 2.0)


def test_quantity_of_the_validation_can_be_controlled() -> None:
    controller = TargetController(1.0, quantity="val", ramp=0, smoothing=0.0, maximum=2.0, start=1.0)
    callbacks = [ActivationSubstitution(), ActivationL1Regularizer(1.0, schedule=controller)]
    tiny.fit(Logged(), callbacks, limit_val_batches=1, max_epochs=2, num_sanity_val_steps=0)
    assert controller.average == 2.0


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


def test_inline_smooth_activation_is_noticed_in_the_first_step() -> None:
    module = tiny.Tiny()
    with pytest.raises(RuntimeError, match="the density of activation_l1 is 1.0000 in the first step"):
        tiny.fit(module, [l1()])
    assert_untouched(module)


def test_controller_of_two_regularizers_is_refused() -> None:
    controller = TargetController(0.3, ramp=1)
    both = [ActivationL1Regularizer(1.0, schedule=controller), ActivationHoyerRegularizer(1.0, schedule=controller)]
    with pytest.raises(ValueError, match="has another regularizer too: make two of them"):
        tiny.fit(Smooth(), [ActivationSubstitution(), *both])


def test_logged_quantity_needs_a_trainer() -> None:
    module = Smooth()
    with regularize(module, [ActivationSubstitution(), l1(quantity="loss")], total_steps=8) as reg:
        with pytest.raises(ValueError, match="`quantity='loss'` is logged by a Trainer; without one use 'density'"):
            reg.add(module.loss(next(iter(tiny.loader(1)))[0]))


def test_density_of_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="`quantity='density'` is of MLP activations, but attention_entropy is about"):
        AttentionEntropyRegularizer(1.0, schedule=TargetController(0.5))
