"""Penalties on output logits: training equals the hand-written loss, and the four known public bugs of the z-loss."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import regularize
from lightning_reg.callbacks import PredictionEntropyRegularizer, ZLossRegularizer
from lightning_reg.schedules import TargetController
from tests import tiny
from tests.test_engine import assert_untouched

EXACT, DIFFERENT, CLASSES = 1e-6, 1e-3, 7
Penalty = Callable[[Tensor, Tensor], Tensor]


def z_squared(logits: Tensor) -> Tensor:
    return logits.exp().sum(-1).log().square()


def entropy(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


def coins(logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean(-1)


def over(labels: Tensor, rows: Tensor) -> Tensor:
    """Mean over the positions that have a label."""
    return rows[labels != -100].mean()


def shifted(labels: Tensor, rows: Tensor) -> Tensor:
    """Mean over the positions whose next has a label."""
    return rows[:, :-1][labels[:, 1:] != -100].mean()


# the callback, and what it is by hand
PENALTIES: dict[str, tuple[Callable[[], pl.Callback], Penalty]] = {
    "z_loss": (lambda: ZLossRegularizer(0.5, labels=1), lambda x, y: 0.5 * over(y, z_squared(x))),
    "z_loss_all": (lambda: ZLossRegularizer(0.5), lambda x, y: 0.5 * z_squared(x).mean()),
    "z_loss_shift": (
        lambda: ZLossRegularizer(0.5, labels=1, shift=True, mask=lambda batch: torch.arange(5).expand(4, -1) > 0),
        lambda x, y: 0.5 * shifted(y[:, 1:], z_squared(x)[:, 1:]),
    ),
    "confidence": (
        lambda: PredictionEntropyRegularizer(2.0, labels=1),
        lambda x, y: -2.0 * over(y, entropy(x)) / math.log(CLASSES),
    ),
    "sure": (
        lambda: PredictionEntropyRegularizer(2.0, objective="minimize", normalize=False, labels=1, shift=True),
        lambda x, y: 2.0 * shifted(y, entropy(x)),
    ),
    "hinge": (
        lambda: PredictionEntropyRegularizer(20.0, objective="floor", bound=0.99, labels=lambda batch: batch[1]),
        lambda x, y: 20.0 * over(y, (0.99 - entropy(x) / math.log(CLASSES)).relu()),
    ),
    "sigmoids": (
        lambda: PredictionEntropyRegularizer(20.0, objective="target", bound=0.5, multi_label=True, labels=1),
        lambda x, y: 20.0 * over(y, (coins(x) / math.log(2) - 0.5) ** 2),
    ),
}  # fmt: skip


class Labelled(tiny.Tiny):
    """Batches of (x, labels); the head, too, may be under a checkpoint; optionally with the penalty by hand."""

    def __init__(self, penalty: Penalty | None = None, flat: bool = False, ignore: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Linear(tiny.WIDTH, CLASSES)
        self.penalty, self.flat, self.ignore = penalty, flat, ignore

    def logits(self, x: Tensor) -> Tensor:
        hidden = self.net(x)
        hidden = hidden.flatten(0, 1) if self.flat else hidden
        use_reentrant = self.net.use_reentrant
        logits = self.head(hidden) if use_reentrant is None else checkpoint(
            self.head, hidden, use_reentrant=use_reentrant
        )  # fmt: skip
        return logits.view(*x.shape[:2], CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        logits = self.logits(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / 20
        return loss if self.penalty is None else loss + self.penalty(logits.float(), labels)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        samples = 4 * self.batches
        x = 2 * torch.randn(samples, tiny.TOKENS, tiny.WIDTH, generator=generator)
        labels = torch.randint(CLASSES, (samples, tiny.TOKENS), generator=generator)
        labels[torch.rand(samples, tiny.TOKENS, generator=generator) < 0.3] = -100
        return DataLoader(TensorDataset(x, torch.full_like(labels, -100) if self.ignore else labels), batch_size=4)


@cache
def by_hand(penalty: str, accumulate: int = 1) -> Tensor:
    """Parameters after training with the penalty by hand, or with none; without checkpoints, which change nothing."""
    return tiny.fit(Labelled(PENALTIES[penalty][1] if penalty else None), accumulate_grad_batches=accumulate)


CASES = {
    # arguments of the module, accumulate_grad_batches
    "plain": ({}, 1),
    "accumulate_ragged": ({}, 3),
    "nonreentrant_checkpoint": ({"use_reentrant": False}, 1),
    "reentrant_checkpoint": ({"use_reentrant": True}, 1),
    "reentrant_accumulate": ({"use_reentrant": True}, 3),
    "flat_head": ({"flat": True}, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PENALTIES)
def test_training_equals_the_handwritten_loss(name: str, case: str) -> None:
    arguments, accumulate = CASES[case]
    wanted = by_hand(name, accumulate)
    got = tiny.fit(Labelled(**arguments), [PENALTIES[name][0]()], accumulate_grad_batches=accumulate)
    assert tiny.distance(got, wanted) <= EXACT
    assert tiny.distance(by_hand("", accumulate), wanted) > DIFFERENT


def test_compiled_training_equals_eager_without_graph_breaks() -> None:
    from torch._dynamo.utils import counters

    names = ("z_loss", "confidence", "sigmoids")
    wanted = tiny.fit(Labelled(lambda x, y: sum(PENALTIES[name][1](x, y) for name in names), batches=4))
    torch.compiler.reset()
    counters.clear()
    module = Labelled(batches=4)
    module.head.compile(backend="aot_eager", fullgraph=True)
    callbacks = [PENALTIES[name][0]() for name in names]
    callbacks[2].name = "sigmoids"
    assert tiny.distance(tiny.fit(module, callbacks), wanted) <= EXACT
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    names = ("z_loss", "confidence")
    wanted = tiny.fit(Labelled(lambda x, y: sum(PENALTIES[name][1](x, y) for name in names), batches=2))
    torch.compiler.reset()
    module = Labelled(batches=2)
    module.head.compile(fullgraph=True)
    assert tiny.distance(tiny.fit(module, [PENALTIES[name][0]() for name in names]), wanted) <= EXACT


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("use_reentrant", [None, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16_gradscaler"])
@pytest.mark.parametrize("name", ["z_loss", "confidence"])
def test_low_precision_differs_by_rounding_only(name: str, precision: str, use_reentrant: bool | None) -> None:
    def settings() -> dict[str, Any]:
        return {"plugins": [scaler()]} if precision == "fp16_gradscaler" else {"precision": precision}

    wanted = tiny.fit(Labelled(PENALTIES[name][1]), **settings())
    got = tiny.fit(Labelled(use_reentrant=use_reentrant), [PENALTIES[name][0]()], **settings())
    assert tiny.distance(got, wanted) <= (2e-4 if precision == "fp16_gradscaler" else 2e-3)
    assert tiny.distance(tiny.fit(Labelled(), **settings()), wanted) > 5 * DIFFERENT


# --- the four known public bugs of the z-loss, and a fifth -----------------------------------------------------------


class Watch(pl.Callback):
    """Losses and gradients of the first batch."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = outputs["loss"].detach()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters()])


def first_step(module: pl.LightningModule, callbacks: list[pl.Callback]) -> tuple[Watch, dict[str, Tensor]]:
    watch = Watch()
    trainer = tiny.trainer([*callbacks, watch], log_every_n_steps=1)
    trainer.fit(module)
    return watch, trainer.logged_metrics


@pytest.mark.parametrize("weight", [1e-4, 1e-5, 0.3])
def test_configured_weight_is_really_used(weight: float) -> None:
    watch, logged = first_step(Labelled(batches=1), [ZLossRegularizer(weight, labels=1)])
    plain, _ = first_step(Labelled(batches=1), [])
    by_hand, _ = first_step(Labelled(lambda x, y: weight * over(y, z_squared(x)), batches=1), [])
    assert logged["reg/z_loss/weight"].item() == pytest.approx(weight)
    assert logged["reg/z_loss/weighted"].item() == pytest.approx(weight * logged["reg/z_loss/value"].item(), rel=1e-6)
    pull, wanted = watch.gradient - plain.gradient, by_hand.gradient - plain.gradient
    assert (pull.norm() / wanted.norm()).item() == pytest.approx(1, rel=0.02)
    assert ZLossRegularizer().weight == 1e-4


@pytest.mark.parametrize("use_reentrant", [None, True], ids=["plain", "reentrant"])
def test_weight_zero_switches_it_off_exactly(use_reentrant: bool | None) -> None:
    off = tiny.fit(Labelled(use_reentrant=use_reentrant), [ZLossRegularizer(0.0, labels=1)])
    assert torch.equal(off, tiny.fit(Labelled(use_reentrant=use_reentrant)))
    watch, logged = first_step(Labelled(batches=1), [ZLossRegularizer(0.0, labels=1)])
    plain, _ = first_step(Labelled(batches=1), [])
    assert torch.equal(watch.loss, plain.loss)
    assert torch.equal(watch.gradient, plain.gradient)
    assert logged["reg/z_loss/weighted"] == 0
    assert logged["reg/z_loss/value"] > 0


def test_value_is_not_counted_twice() -> None:
    """Loss == ce + weight * z, and the gradient is that of exactly this sum."""
    watch, logged = first_step(Labelled(batches=1), [ZLossRegularizer(0.3, labels=1)])
    module = Labelled(batches=1)
    x, labels = next(iter(module.train_dataloader()))
    logits = module.logits(x)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 20
    z = over(labels, z_squared(logits))
    total = ce + 0.3 * z
    total.backward()
    assert logged["reg/z_loss/value"].item() == pytest.approx(z.item(), rel=1e-6)
    assert watch.loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert watch.loss.item() - ce.item() == pytest.approx(0.3 * z.item(), rel=1e-5)
    torch.testing.assert_close(watch.gradient, torch.cat([p.grad.flatten() for p in module.parameters()]))


def test_mean_is_over_tokens_that_are_not_ignored() -> None:
    module = Labelled(batches=1)
    x, labels = next(iter(module.train_dataloader()))
    rows = z_squared(module.logits(x)).detach()
    counted = labels != -100
    assert 0 < counted.sum() < counted.numel()
    _, logged = first_step(Labelled(batches=1), [ZLossRegularizer(0.3, labels=1)])
    assert logged["reg/z_loss/value"].item() == pytest.approx(rows[counted].mean().item(), rel=1e-6)
    wrong = (rows[counted].sum() / rows.numel(), rows.mean())
    assert all(abs(logged["reg/z_loss/value"].item() - value.item()) > 0.01 for value in wrong)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", [ZLossRegularizer, PredictionEntropyRegularizer])
def test_value_is_logged_in_float32_under_bf16(kind: type, precision: str) -> None:
    class Kept(Labelled):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.head.register_forward_hook(lambda module, args, output: setattr(self, "seen", output.detach()))
            return super().training_step(batch, batch_idx)

    module = Kept(batches=1)
    trainer = tiny.trainer([kind(0.3)], log_every_n_steps=1, precision=precision)
    trainer.fit(module)
    (value,) = [value for key, value in trainer.logged_metrics.items() if key.endswith("/value")]
    assert module.seen.dtype == torch.bfloat16
    exact = module.seen.double()
    wanted = z_squared(exact) if kind is ZLossRegularizer else entropy(exact) / math.log(CLASSES)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(wanted.mean().item(), rel=1e-6)
    assert wanted.mean().item() != pytest.approx(wanted.mean().bfloat16().item(), rel=1e-5)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("name", ["z_loss", "confidence", "sure", "hinge", "sigmoids"])
def test_batches_that_ignore_every_token_change_nothing(name: str, use_reentrant: bool | None) -> None:
    without = tiny.fit(Labelled(ignore=True, use_reentrant=use_reentrant))
    trainer = tiny.trainer([callback := PENALTIES[name][0]()], log_every_n_steps=1)
    module = Labelled(ignore=True, use_reentrant=use_reentrant)
    trainer.fit(module)
    assert torch.equal(tiny.parameters(module), without)
    assert trainer.logged_metrics[f"reg/{callback.name}/value"] == 0
    assert trainer.logged_metrics[f"reg/{callback.name}/weighted"] == 0


class Causal(pl.LightningModule):
    """A Hugging Face language model, whose loss shifts the labels inside."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.net = LlamaForCausalLM(LlamaConfig(vocab_size=11, max_position_embeddings=16, **sizes))
        self.weight = weight

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.net(**batch)
        # by hand: the logits of a token against the label of the next
        return output.loss + self.weight * shifted(batch["labels"], z_squared(output.logits)) if self.weight else (
            output.loss
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        ids = torch.randint(11, (4, 3, 6), generator=torch.Generator().manual_seed(1))
        batches: Any = [{"input_ids": i, "labels": torch.where(torch.arange(6) < 2, -100, i)} for i in ids]
        return DataLoader(batches, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_shift_is_that_of_hugging_face() -> None:
    wanted, without = tiny.fit(Causal(0.5)), tiny.fit(Causal())
    callback = ZLossRegularizer(0.5, labels="labels", shift=True)
    assert tiny.distance(tiny.fit(Causal(), [callback]), wanted) <= EXACT
    assert tiny.distance(without, wanted) > DIFFERENT
    unshifted = tiny.fit(Causal(), [ZLossRegularizer(0.5, labels="labels")])
    assert tiny.distance(unshifted, wanted) > 1e-4


@pytest.mark.parametrize(("objective", "direction"), [("maximize", 1), ("minimize", -1)])
def test_one_step_of_training_moves_the_entropy_the_right_way(objective: str, direction: int) -> None:
    module = Labelled(batches=1)
    (x, _) = next(iter(module.train_dataloader()))
    before = entropy(module.logits(x)).mean().item()
    tiny.fit(module, [PredictionEntropyRegularizer(5.0, objective=objective)])
    plain = Labelled(batches=1)
    tiny.fit(plain)
    change = entropy(module.logits(x)).mean().item() - before
    assert change * direction > 1e-3
    assert (entropy(module.logits(x)) - entropy(plain.logits(x))).mean().item() * direction > 1e-3


def test_hand_written_loop() -> None:
    module = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5))
    x, y = torch.randn(6, 3), torch.randint(5, (6,))
    with regularize(module, [ZLossRegularizer(0.3, targets="1"), PredictionEntropyRegularizer(targets="1")]) as reg:
        logits = module(x)
        loss = reg.add(F.cross_entropy(logits, y))
    wanted = F.cross_entropy(logits, y) + 0.3 * z_squared(logits).mean() - 0.1 * entropy(logits).mean() / math.log(5)
    torch.testing.assert_close(loss, wanted)
    with pytest.raises(ValueError, match=r"`labels=1` are part of the Trainer's batch.*`losses.ZLoss` of logits"):
        with regularize(module, [ZLossRegularizer(0.3, labels=1)]):
            pass
    assert_untouched(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "labels"}, r"`labels='labels'` is not in the batch, a list; give its key"),
        ({"labels": 7}, r"`labels=7` is not in the batch, a list"),
        ({"labels": lambda batch: {"a": 1}["b"]}, r"`labels=.*` is not in the batch"),
        ({"labels": lambda batch: [1]}, r"`labels=.*` must select a tensor, got list"),
        ({"labels": 0}, r"`labels` must be classes as integers, got torch.float32; use `mask=`"),
        ({"labels": lambda batch: batch[1][:, 0]}, r"`labels=.*` and `mask` must be of the positions of the logits"),
        ({"labels": 1, "mask": lambda batch: batch[1][:, 0] > 0}, r"`mask=.*` must have the shape of `labels=1`"),
        ({"mask": lambda batch: batch[1][:, 0] > 0}, r"`mask` must have the shape of `x` without its last axis"),
    ],
    ids=["key", "index", "function", "no_tensor", "floats", "positions", "two_shapes", "mask"],
)
def test_bad_labels_are_refused(arguments: dict[str, Any], message: str) -> None:
    module = Labelled()
    with pytest.raises(ValueError, match=message):
        tiny.fit(module, [ZLossRegularizer(0.5, **arguments)])
    assert_untouched(module)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`shift=True` needs `labels`, whose tokens it shifts; give their key"):
        ZLossRegularizer(shift=True)
    with pytest.raises(ValueError, match=r"`quantity='density'` is of MLP activations, but z_loss is about logits"):
        ZLossRegularizer(schedule=TargetController(0.1))
    with pytest.raises(ValueError, match=r"`bound` of objective 'floor' must be a number"):
        PredictionEntropyRegularizer(objective="floor")
    assert PredictionEntropyRegularizer().weight == 0.1


def test_a_head_that_does_not_run_is_named() -> None:
    class Idle(Labelled):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(tiny.WIDTH, CLASSES)

    with pytest.raises(RuntimeError, match=r"`z_loss`: other did not run"):
        tiny.fit(Idle(), [ZLossRegularizer(targets="other")])


@pytest.mark.parametrize(
    ("saved", "resumed", "argument"),
    [
        (ZLossRegularizer(), ZLossRegularizer(ignore_index=0), "ignore_index"),
        (ZLossRegularizer(labels=1), ZLossRegularizer(labels=1, shift=True), "shift"),
        (PredictionEntropyRegularizer(), PredictionEntropyRegularizer(objective="minimize"), "objective"),
        (PredictionEntropyRegularizer(), PredictionEntropyRegularizer(normalize=False), "normalize"),
        (PredictionEntropyRegularizer(), PredictionEntropyRegularizer(multi_label=True), "multi_label"),
        (
            PredictionEntropyRegularizer(objective="floor", bound=0.5),
            PredictionEntropyRegularizer(objective="floor", bound=0.6), "bound",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_checkpoint_of_another_quantity_is_refused(saved: Any, resumed: Any, argument: str, tmp_path: Path) -> None:
    trainer = tiny.trainer([saved])
    trainer.fit(Labelled(batches=1))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(ValueError, match=rf"`{argument}` of .* but the checkpoint was trained with"):
        tiny.trainer([resumed], max_epochs=2).fit(Labelled(batches=1), ckpt_path=str(tmp_path / "saved.ckpt"))


@pytest.mark.parametrize(
    ("objective", "bound", "raises"),
    [("maximize", None, True), ("floor", 0.5, True), ("minimize", None, False), ("ceiling", 0.5, False)],
)
def test_a_controller_knows_which_way_the_weight_moves_the_entropy(objective: Any, bound: Any, raises: bool) -> None:
    assert PredictionEntropyRegularizer(objective=objective, bound=bound).raises_value is raises
    assert not ZLossRegularizer().raises_value
