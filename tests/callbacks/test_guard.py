"""A remedy that waits for its condition: bit-identical until then, exact afterwards, saved with the training."""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_reg.callbacks import (
    ActivationSubstitution,
    AttentionEntropyRegularizer,
    Guard,
    QKClip,
    SigmaReparam,
    SoftCap,
    StabilityMonitor,
    StochasticAttention,
)
from lightning_reg.conditions import Condition
from lightning_reg.schedules import TargetController
from tests import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:.*acts from here on",
)


NAMES = ["max_logit", "entropy_min"]


class Growing(tiny.Tiny):
    """Its attention's queries double in the middle of the training, by no doing of the optimizer."""

    grow_at = 4

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.grow_at:
            with torch.no_grad():
                self.net.blocks[0].attention.qkv.weight[: tiny.WIDTH] *= 40


def fit(module: pl.LightningModule, callbacks: list[Any], **settings: Any) -> Tensor:
    return tiny.fit(module, callbacks, **{"log_every_n_steps": 1, **settings})


def controlled() -> AttentionEntropyRegularizer:
    return AttentionEntropyRegularizer(1.0, schedule=TargetController(0.5, quantity="value"))


def stepping(weights: list[float]) -> Any:
    """The remedy of a test, with its weight written down for every step."""

    class Follows(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            weights.append(remedy.strength)

    remedy = AttentionEntropyRegularizer(1.0)
    return remedy, Follows()


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttentionEntropyRegularizer(5.0),
        lambda: QKClip(threshold=0.01, heads=2),
        lambda: SoftCap(0.01),
        lambda: StochasticAttention(0.2),
    ],
    ids=["penalty", "qk_clip", "softcap", "stochastic"],
)
@pytest.mark.parametrize("use_reentrant", [None, True], ids=["plain", "reentrant"])
def test_until_it_is_needed_training_is_bit_identical(make: Any, use_reentrant: bool | None) -> None:
    plain = tiny.fit(Growing(use_reentrant=use_reentrant))
    held = Guard(make(), "max_logit > 1e9")
    assert torch.equal(fit(Growing(use_reentrant=use_reentrant), [held]), plain)
    assert not held.active
    acting = Guard(make(), "max_logit > 0")
    assert not torch.equal(fit(Growing(use_reentrant=use_reentrant), [acting]), plain)
    assert (acting.active, acting.since, acting.times) == (True, 1, 1)


def test_it_acts_from_the_step_after_the_condition_was_measured() -> None:
    weights: list[float] = []
    remedy, follows = stepping(weights)
    with pytest.warns(
        UserWarning, match=r"guard: 'max_logit > 5' holds at step 5 \(max_logit = .*Attention.* acts from"
    ):
        fit(Growing(), [Guard(remedy, "max_logit > 5"), follows])
    assert weights == [0.0] * 5 + [1.0] * 3  # the queries grew before batch 4, which was measured, and then acted upon


def test_released_it_is_held_back_again_but_not_before_hold() -> None:
    weights: list[float] = []
    remedy, follows = stepping(weights)
    guard = Guard(remedy, "max_logit > 5", release="max_logit > 0", hold=2)
    fit(Growing(), [guard, follows])
    assert weights == [0.0] * 5 + [1.0] * 2 + [0.0]
    assert guard.times == 1


def test_it_uses_the_monitor_that_is_there() -> None:
    monitor = StabilityMonitor(every_n_steps=2, warn={})
    guard = Guard(QKClip(threshold=1.0, heads=2), "max_logit > 5")
    trainer = tiny.trainer([monitor, guard], log_every_n_steps=50)
    trainer.fit(Growing())
    assert [callback for callback in trainer.callbacks if isinstance(callback, StabilityMonitor)] == [monitor]
    assert guard.since == 6  # measured in steps 2, 4, 6, 8; grown before batch 4
    assert monitor.latest["max_logit"] < 5


def test_a_clip_under_guard_rescues() -> None:
    alone = StabilityMonitor(warn={})
    fit(Growing(), [alone])
    assert alone.latest["max_logit"] > 5
    guarded = StabilityMonitor(warn={})
    fit(Growing(), [guarded, Guard(QKClip(threshold=2.0, heads=2), "max_logit > 5")])
    assert guarded.latest["max_logit"] < 3


@pytest.mark.parametrize("every", [8, 3], ids=["not_yet_looked_at", "acting"])
def test_resumed_training_equals_uninterrupted_bit_for_bit(every: int, tmp_path: Path) -> None:
    def run(checkpoint: str | None = None) -> tuple[Tensor, Guard]:
        module = Growing(optimizer="adam")
        module.grow_at = 2
        guard = Guard([QKClip(threshold=0.3, heads=2), AttentionEntropyRegularizer(1.0)], "max_logit > 5", hold=3)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer = tiny.trainer([guard, keep], enable_checkpointing=True, log_every_n_steps=every)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, ckpt_path=checkpoint)
        return tiny.parameters(module), guard

    whole, guard = run()
    assert (guard.active, guard.since) == (True, every)  # measured in that step of the first epoch of 8
    resumed, again = run(str(tmp_path / "epoch=0.ckpt"))
    assert torch.equal(resumed, whole)
    assert (again.active, again.since, again.times) == (guard.active, guard.since, guard.times)


def test_a_second_fit_starts_afresh() -> None:
    guard = Guard(AttentionEntropyRegularizer(5.0), "max_logit > 5")
    fit(Growing(), [guard])
    assert guard.active
    plain = tiny.fit(tiny.Tiny())
    assert torch.equal(fit(tiny.Tiny(), [guard]), plain)
    assert not guard.active


def test_it_logs_when_it_is_active(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Growing(), [Guard(QKClip(heads=2), "max_logit > 5")], logger=logger)
    logger.save()
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("reg/guard/active")
    active = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
    assert active == [0.0] * 4 + [1.0] * 3
    assert "reg/guard/when: max_logit > 5" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_a_function_is_called_once_each_time() -> None:
    calls: list[int] = []

    def halve(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        calls.append(trainer.global_step)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] /= 2

    fit(Growing(), [Guard(halve, "max_logit > 5")])
    assert calls == [5]


def test_a_function_that_raises_is_reported_and_training_goes_on() -> None:
    def broken(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        raise KeyError("slip")

    plain = tiny.fit(Growing())
    with pytest.warns(UserWarning, match=r"(?s)the `remedy` of guard raised, and training goes on.*KeyError: 'slip'"):
        got = fit(Growing(), [Guard(broken, "max_logit > 5")])
    assert torch.equal(got, plain)


def test_a_remedy_without_targets_is_loud_before_it_is_needed() -> None:
    with pytest.raises(ValueError, match="matches no module"):
        fit(tiny.Tiny(), [Guard(AttentionEntropyRegularizer(1.0, targets="nowhere"), "max_logit > 1e9")])


def test_a_quantity_that_is_not_measured_is_loud_at_the_second_measurement() -> None:
    monitor = StabilityMonitor(quantities=["logits"], warn={}, every_n_steps=1)
    with pytest.raises(RuntimeError, match=r"guard asks for max_logit, which its StabilityMonitor does not measure"):
        fit(tiny.Tiny(), [monitor, Guard(QKClip(heads=2), "max_logit > 20")])


def test_a_remedy_that_the_trainer_has_too_is_refused() -> None:
    clip = QKClip(heads=2)
    with pytest.raises(ValueError, match="QKClip is in the Trainer's callbacks and in guard"):
        fit(tiny.Tiny(), [clip, Guard(clip, "max_logit > 1")])


def test_a_second_fit_of_the_same_model_goes_on_as_the_first_has_ended() -> None:
    module, cap = Growing(), SoftCap(0.5)
    guard = Guard(cap, "max_logit > 5")
    fit(module, [guard])
    assert guard.active
    (x,) = next(iter(tiny.loader(1)))
    fit(module, [guard], limit_train_batches=0)
    assert (guard.active, cap.enabled) == (True, True)
    other = tiny.Tiny()
    wanted = module.eval()(x)
    fit(other, [guard])
    assert not guard.active
    assert torch.equal(module(x), wanted)


def test_a_cap_that_never_acted_leaves_nothing_behind() -> None:
    module = tiny.Tiny()
    fit(module, [Guard(SoftCap(0.5), "max_logit > 1e9")])
    assert type(module.net.blocks[0].attention) is tiny.Attention


@pytest.mark.parametrize(
    ("text", "values", "holds"),
    [
        ("max_logit > 100", {"max_logit": 100.5}, True),
        ("max_logit > 100", {"max_logit": 100.0}, False),
        ("max_logit >= 1e2", {"max_logit": 100.0}, True),
        ("0 < entropy_min < 0.2", {"entropy_min": 0.1}, True),
        ("0 < entropy_min < 0.2", {"entropy_min": 0.2}, False),
        ("max_logit > 5 and entropy_min < 0.2", {"max_logit": 6.0, "entropy_min": 0.3}, False),
        ("max_logit > 5 or entropy_min < 0.2", {"max_logit": 6.0, "entropy_min": 0.3}, True),
        ("not (max_logit > 5)", {"max_logit": 6.0}, False),
        ("max_logit > -1", {"max_logit": 0.0}, True),
        ("max_logit > 5", {}, False),
        ("max_logit > 5", {"max_logit": float("nan")}, False),
        ("max_logit > 5", {"max_logit": float("inf")}, True),
        ("not max_logit > 100", {}, False),
        ("not max_logit < 100", {"max_logit": float("nan")}, False),
        ("max_logit > 5 or entropy_min < 0.2", {"max_logit": 6.0}, True),
        ("max_logit > 5 and entropy_min < 0.2", {"max_logit": 4.0}, False),
        ("not (max_logit > 5 and entropy_min < 0.2)", {"max_logit": 4.0}, True),
    ],
    ids=str,
)
def test_conditions(text: str, values: dict[str, float], holds: bool) -> None:
    assert Condition(text, NAMES)(values) is holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_logits > 5", "'max_logits' is not measured. Did you mean 'max_logit'?"),
        ("max_logit", "must compare measured quantities with numbers"),
        ("max_logit > 'five'", "must compare"),
        ("max_logit > True", "must compare"),
        ("max_logit == 5", "must compare"),
        ("max_logit + 1 > 5", "must compare"),
        ("__import__('os')", "must compare"),
        ("1 > 5", "names no quantity"),
        ("max_logit >", "must compare"),
        ("", "must compare"),
    ],
    ids=str,
)
def test_bad_conditions_say_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="`when`") as raised:
        Condition(text, NAMES)
    assert message in str(raised.value)
    assert "entropy_min, max_logit" in str(raised.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Guard(SigmaReparam(), "max_logit > 1"), ValueError, "`remedy` must be a penalty"),
        (lambda: Guard(ActivationSubstitution("relu"), "max_logit > 1"), ValueError, "belongs into the Trainer's"),
        (lambda: Guard([], "max_logit > 1"), ValueError, "`remedy` must hold at least one"),
        (lambda: Guard(QKClip, "max_logit > 1"), TypeError, "got the class QKClip: call it"),
        (lambda: Guard(lambda: 1, "max_logit > 1"), TypeError, "must be callable with (trainer, pl_module)"),
        (
            lambda: Guard(controlled(), "k90_min < 1"),
            ValueError,
            "has a TargetController, which would wind up",
        ),
        (lambda: Guard("qk_clip", "max_logit > 1"), ValueError, "got 'qk_clip'"),
        (lambda: Guard(QKClip(), "max_logit > 1", hold=-1), ValueError, "`hold` must be a number of optimizer steps"),
        (lambda: Guard(QKClip(), "max_logit > 1", name=""), ValueError, "`name` must be a word"),
        (lambda: Guard(QKClip(), "loss > 1"), ValueError, "'loss' is not measured"),
        (lambda: Guard(QKClip(), "max_logit > 1", release="x < 1"), ValueError, "`release` must compare"),
        (lambda: Guard(QKClip(), "max_logit > 1").attach(tiny.Tiny()), TypeError, "Guard needs a Trainer"),
    ],
    ids=[
        "reparam",
        "substitution",
        "none",
        "class",
        "arity",
        "controller",
        "text",
        "hold",
        "name",
        "when",
        "release",
        "loop",
    ],
)
def test_bad_arguments(make: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_two_guards_need_two_names() -> None:
    guards = [Guard(QKClip(heads=2), "max_logit > 1e9"), Guard(SoftCap(), "max_logit > 1e9")]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `Guard`"):
        fit(tiny.Tiny(), guards)
    guards[1] = Guard(SoftCap(), "max_logit > 1e9", name="second")
    fit(tiny.Tiny(), guards)
    assert [guard.active for guard in guards] == [False, False]
