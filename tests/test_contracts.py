"""What every callback promises: off switch, resume, idempotence, plain checkpoints, logs, loud errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_reg.callbacks import (
    ActivationDensityRegularizer,
    ActivationHoyerRegularizer,
    ActivationL1Regularizer,
    ActivationLocalityRegularizer,
    AttentionEntropyRegularizer,
    AttentionLogitRegularizer,
    ChunkDensityRegularizer,
    EntropyGuidedRegularizer,
    Guard,
    PredictionEntropyRegularizer,
    ProgressiveSparsity,
    QKClip,
    SigmaReparam,
    StabilityMonitor,
    StochasticAttention,
    TemporalDeltaRegularizer,
    WeightSparsity,
    ZLossRegularizer,
)
from lightning_reg.engine import Engine
from lightning_reg.schedules import Cosine, Linear, TargetController
from tests import tiny
from tests.test_engine import DIFFERENT, assert_untouched

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty.*", "ignore:.*missed its target", "ignore:.*acts from here on"
)

CALLBACKS: dict[str, Callable[..., Any]] = {
    "attention_entropy": lambda weight=1.0, **kwargs: AttentionEntropyRegularizer(weight, **kwargs),
    "entropy_floor": lambda weight=1.0, **kwargs: AttentionEntropyRegularizer(
        weight, objective="floor", bound=0.999, **kwargs
    ),
    "activation_density": lambda weight=1.0, **kwargs: ActivationDensityRegularizer(weight, epsilon=0.01, **kwargs),
    "activation_l1": lambda weight=1.0, **kwargs: ActivationL1Regularizer(weight, relative=True, **kwargs),
    "activation_hoyer": lambda weight=1.0, **kwargs: ActivationHoyerRegularizer(weight, **kwargs),
    "before_activation": lambda weight=1.0, **kwargs: ActivationHoyerRegularizer(
        weight, **{"name": "before_activation", **kwargs}, role="mlp_pre_activation"
    ),
    "chunk_density": lambda weight=1.0, **kwargs: ChunkDensityRegularizer(
        weight, chunk=2, epsilon=0.5, relative=True, **kwargs
    ),
    "activation_locality": lambda weight=1.0, **kwargs: ActivationLocalityRegularizer(weight, alpha=4.0, **kwargs),
    "temporal_delta": lambda weight=1.0, **kwargs: TemporalDeltaRegularizer(weight, relative=True, **kwargs),
    "z_loss": lambda weight=1.0, **kwargs: ZLossRegularizer(weight, targets="fc2", **kwargs),
    "confidence": lambda weight=1.0, **kwargs: PredictionEntropyRegularizer(weight, targets="fc2", **kwargs),
    "entropy_guided": lambda weight=1.0, **kwargs: EntropyGuidedRegularizer(weight, threshold=0.1, **kwargs),
    "attention_logits": lambda weight=1.0, **kwargs: AttentionLogitRegularizer(weight, bound=0.05, **kwargs),
}
ALL: dict[str, Callable[[], list[Any]]] = {
    **{name: lambda make=make: [make()] for name, make in CALLBACKS.items()},
    "scheduled": lambda: [CALLBACKS["attention_entropy"](schedule=Cosine()), CALLBACKS["activation_density"]()],
    "sigma_reparam": lambda: [SigmaReparam()],
    "qk_clip": lambda: [QKClip(threshold=0.1, heads=2)],
    "qk_clip_every": lambda: [QKClip(threshold=0.1, heads=2, every=3)],
    "progressive": lambda: [ProgressiveSparsity([(2, 0.0), (4, 0.5), (8, 2.0)], substitute=None)],
    "controlled": lambda: [CALLBACKS["attention_entropy"](schedule=TargetController(0.9, quantity="value"))],
    "layer_weights": lambda: [CALLBACKS["activation_l1"](layer_weights=[0.5, 2.0])],
    "stochastic_attention": lambda: [StochasticAttention(0.5)],
    "guard": lambda: [Guard([CALLBACKS["attention_entropy"](), QKClip(threshold=0.3, heads=2)], "max_logit > 0")],
    "stability": lambda: [StabilityMonitor(warn={})],
    "weight_sparsity": lambda: [WeightSparsity(0.7)],
    "rigl": lambda: [WeightSparsity(0.7, method="rigl", schedule="constant", every=2)],
    "together": lambda: [
        SigmaReparam(),
        WeightSparsity(0.5),
        *(make(name=name) for name, make in CALLBACKS.items()),
    ],
}


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_weight_zero_is_bit_identical_to_no_callback(name: str, use_reentrant: bool | None) -> None:
    without = tiny.fit(tiny.Tiny(use_reentrant=use_reentrant))
    assert torch.equal(tiny.fit(tiny.Tiny(use_reentrant=use_reentrant), [CALLBACKS[name](0.0)]), without)
    assert not torch.equal(tiny.fit(tiny.Tiny(use_reentrant=use_reentrant), [CALLBACKS[name](1.0)]), without)


@pytest.mark.filterwarnings("ignore:the schedule of .* is 0 at every step")
def test_schedule_at_zero_is_bit_identical_to_no_callback() -> None:
    off = Linear(0.0, 1.0, begin=100, duration=10)
    assert torch.equal(tiny.fit(tiny.Tiny(), [CALLBACKS["attention_entropy"](schedule=off)]), tiny.fit(tiny.Tiny()))


@pytest.mark.parametrize("name", ALL)
def test_resumed_training_equals_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: str | None = None) -> pl.LightningModule:
        torch.manual_seed(0)
        keep = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        module = tiny.Tiny(optimizer="adam")
        trainer = tiny.trainer([*ALL[name](), keep], max_epochs=2, enable_checkpointing=True)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, ckpt_path=checkpoint)
        return module

    whole = tiny.parameters(run(2))
    resumed = tiny.parameters(run(2, str(tmp_path / name / "epoch=0.ckpt")))
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("name", ALL)
def test_checkpoint_loads_without_the_library(name: str, tmp_path: Path) -> None:
    module = tiny.Tiny()
    keep = ModelCheckpoint(tmp_path, filename="last")
    tiny.fit(module, [*ALL[name](), keep], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = tiny.Tiny()
    assert list(checkpoint["state_dict"]) == list(plain.state_dict())
    plain = tiny.Tiny.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    (x,) = next(iter(tiny.loader(1)))
    assert torch.equal(plain.eval()(x), module.eval()(x))


@pytest.mark.parametrize("name", ALL)
def test_model_is_as_it_was_after_the_fit(name: str) -> None:
    module = tiny.Tiny()
    names = list(module.state_dict())
    types = [type(part) for part in module.modules()]
    tiny.fit(module, ALL[name]())
    assert_untouched(module)
    assert list(module.state_dict()) == names
    assert [type(part) for part in module.modules()] == types


@pytest.mark.parametrize("name", CALLBACKS)
def test_registering_twice_is_registering_once(name: str) -> None:
    class Twice(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            callback.on_fit_start(trainer, pl_module)

    callback = CALLBACKS[name]()
    once = tiny.fit(tiny.Tiny(), [CALLBACKS[name]()])
    assert torch.equal(tiny.fit(tiny.Tiny(), [callback, Twice()]), once)


@pytest.mark.parametrize("name", CALLBACKS)
def test_value_weight_weighted_and_layers_are_logged(name: str, tmp_path: Path) -> None:
    callback = CALLBACKS[name](0.5, schedule=Linear(1.0, 0.0, duration=8))
    logger = CSVLogger(tmp_path)
    trainer = tiny.trainer([callback], logger=logger, log_every_n_steps=2)
    trainer.fit(tiny.Tiny())
    logger.save()
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    before = name in ("before_activation", "activation_locality")
    site = f"net.blocks.0.{'attention' if 'entropy' in name or 'attention' in name else 'fc1' if before else 'fc2'}"
    wanted = {f"reg/{callback.name}/{key}" for key in ("value", "weight", "weighted", f"layers/{site}")}
    assert wanted <= set(header.split(","))
    column = header.split(",").index(f"reg/{callback.name}/weight")
    # the weight used at steps 1, 3, 5 and 7
    weights = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
    assert weights == pytest.approx([0.5 * (1 - s / 8) for s in (1, 3, 5, 7)])
    assert f"reg/{callback.name}/weight: 0.5" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_logged_value_is_the_entropy_not_the_penalty() -> None:
    for objective, bound in (("maximize", None), ("minimize", None), ("floor", 0.9), ("target", 0.5)):
        trainer = tiny.trainer(
            [AttentionEntropyRegularizer(1e-9, objective=objective, bound=bound)], log_every_n_steps=1
        )
        trainer.fit(tiny.Tiny(batches=1))
        assert 0.9 < trainer.logged_metrics["reg/attention_entropy/value"] <= 1


def test_two_instances_of_a_callback_need_two_names() -> None:
    one = [AttentionEntropyRegularizer(1.0, name=f"part{i}", targets=rf"blocks\.{i}\.attention") for i in (0, 1)]
    both = tiny.fit(tiny.Tiny(), one)
    # the mean over two sites, twice: each instance has one site
    assert tiny.distance(both, tiny.fit(tiny.Tiny(), [AttentionEntropyRegularizer(2.0)])) <= 1e-6
    with pytest.raises(RuntimeError, match="state_key"):
        tiny.trainer([AttentionEntropyRegularizer(1.0), AttentionEntropyRegularizer(1.0)])


def test_token_mask_limits_the_mean() -> None:
    valid = torch.ones(4, tiny.TOKENS, dtype=torch.bool)
    valid[:, 3:] = False
    seen = []

    class Spy(ActivationDensityRegularizer):
        def see_activations(self, x: torch.Tensor, mask: torch.Tensor | None) -> Any:
            seen.append((x.detach(), mask))
            return super().see_activations(x, mask)

    callback = Spy(1.0, epsilon=0.01, mask=lambda batch: valid[: len(batch[0])])
    trainer = tiny.trainer([callback], log_every_n_steps=1)
    trainer.fit(tiny.Tiny(batches=1))
    wanted = torch.stack([(x[:, :3].double() ** 2 / (x[:, :3].double() ** 2 + 0.01)).mean() for x, _ in seen]).mean()
    assert trainer.logged_metrics["reg/activation_density/value"].item() == pytest.approx(wanted.item(), abs=1e-6)
    tiny.fit(tiny.Tiny(batches=1), [AttentionEntropyRegularizer(1.0, mask=lambda batch: valid)])


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_bad_weight_is_refused(name: str, weight: Any) -> None:
    with pytest.raises(ValueError, match="`weight` must be a finite number >= 0, got"):
        CALLBACKS[name](weight)


@pytest.mark.parametrize("schedule", [Linear(0.0, 1.0, begin=100, duration=10), Linear(0.0, 0.0, duration=3)])
def test_schedule_that_never_starts_is_noticed(schedule: Any) -> None:
    with pytest.warns(UserWarning, match="the schedule of attention_entropy is 0 at every step of this training of 8"):
        tiny.fit(tiny.Tiny(), [AttentionEntropyRegularizer(1.0, schedule=schedule)])


def test_schedule_must_be_callable() -> None:
    with pytest.raises(TypeError, match="got the class Cosine; make an instance"):
        AttentionEntropyRegularizer(1.0, schedule=Cosine)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`schedule` must be a lightning_reg.schedules.Schedule, got float"):
        AttentionEntropyRegularizer(1.0, schedule=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("attention_mask", "`mask='attention_mask'` is not in the batch, a list"),
        (7, "`mask=7` is not in the batch"),
        (lambda batch: [1], "must select a tensor, got list"),
        (lambda batch: torch.ones(4, 9), r"`mask`"),
    ],
    ids=["key", "index", "no_tensor", "shape"],
)
@pytest.mark.parametrize("name", CALLBACKS)
def test_bad_mask_is_refused(name: str, mask: Any, message: str) -> None:
    module = tiny.Tiny()
    with pytest.raises(ValueError, match=message):
        tiny.fit(module, [CALLBACKS[name](mask=mask)])
    assert_untouched(module)


def test_unknown_length_of_training_is_refused_for_fractions() -> None:
    module = tiny.Tiny()
    callback = AttentionEntropyRegularizer(1.0, schedule=Cosine())
    with pytest.raises(ValueError, match="number of training steps is unknown"):
        tiny.fit(module, [callback], max_epochs=-1)
    assert_untouched(module)


class Poisoned(tiny.Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch[0] * float("nan"))


@pytest.mark.parametrize("name", CALLBACKS)
def test_activations_that_are_not_finite_name_the_site(name: str) -> None:
    module = Poisoned()
    with pytest.raises(RuntimeError, match=r"`reg/\w+/layers/net.blocks.0.\w+` is nan at step"):
        tiny.fit(module, [CALLBACKS[name]()], log_every_n_steps=1)
    assert_untouched(module)


@pytest.mark.parametrize(
    ("saved", "now", "argument"),
    [
        (AttentionEntropyRegularizer(1.0), AttentionEntropyRegularizer(1.0, objective="minimize"), "objective"),
        (AttentionEntropyRegularizer(1.0), AttentionEntropyRegularizer(1.0, normalize=False), "normalize"),
        (ActivationDensityRegularizer(1.0), ActivationDensityRegularizer(1.0, epsilon=0.1), "epsilon"),
    ],
    ids=["objective", "normalize", "epsilon"],
)
def test_checkpoint_of_another_configuration_is_refused(saved: Any, now: Any, argument: str, tmp_path: Path) -> None:
    trainer = tiny.trainer([saved, ModelCheckpoint(tmp_path, filename="last")], enable_checkpointing=True)
    trainer.fit(tiny.Tiny())
    before = (tmp_path / "last.ckpt").read_bytes()
    module = tiny.Tiny()
    again = tiny.trainer([now, ModelCheckpoint(tmp_path, filename="next")], max_epochs=2, enable_checkpointing=True)
    with pytest.raises(
        ValueError, match=f"`{argument}` of .* but the checkpoint was trained with .*: set `{argument}="
    ):
        again.fit(module, ckpt_path=str(tmp_path / "last.ckpt"))
    assert_untouched(module)
    assert (tmp_path / "last.ckpt").read_bytes() == before


class NoBackward(tiny.Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch[0]).backward()


def test_manual_backward_that_is_never_called_is_named() -> None:
    module = NoBackward()
    with pytest.raises(RuntimeError, match=r"never called `self.manual_backward\(loss\)`"):
        tiny.fit(module, [AttentionEntropyRegularizer(1.0)])
    assert_untouched(module)


class Idle(tiny.Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.idle = tiny.Block()


def test_target_that_does_not_run_is_named_or_allowed() -> None:
    with pytest.raises(RuntimeError, match="`activation_density`: idle.fc2 did not run"):
        tiny.fit(Idle(), [ActivationDensityRegularizer(1.0)])
    tiny.fit(Idle(), [ActivationDensityRegularizer(1.0, allow_unused=True)])


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # Lightning's, without a remedy
@pytest.mark.parametrize("regularizer", [ActivationDensityRegularizer, AttentionEntropyRegularizer])
def test_model_that_was_loaded_in_evaluation_mode_is_named_with_the_remedy(regularizer: type) -> None:
    module = tiny.Tiny()
    module.net.eval()
    with pytest.raises(RuntimeError, match=r"`from_pretrained` leaves models in evaluation mode: call `.train\(\)`"):
        tiny.fit(module, [regularizer(1.0)])
    assert_untouched(module)
    module.net.train()
    tiny.fit(module, [regularizer(1.0)])


def test_up_projection_is_no_target() -> None:
    with pytest.raises(
        ValueError, match="'net.blocks.0.fc1' is the up-projection of 'net.blocks.0.fc2', which you may"
    ):
        tiny.fit(tiny.Tiny(), [ActivationDensityRegularizer(1.0, targets="fc1")])


def test_model_without_attention_is_refused() -> None:
    class Mlp(tiny.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    module = Mlp()
    with pytest.raises(RuntimeError, match=r"`attention_entropy` caught no attention.*attn_implementation='sdpa'"):
        tiny.fit(module, [AttentionEntropyRegularizer(1.0)])
    assert_untouched(module)
    assert tiny.distance(tiny.fit(Mlp(), [ActivationDensityRegularizer(9.0, epsilon=1.0)]), tiny.fit(Mlp())) > DIFFERENT


def test_engine_is_gone_after_the_fit() -> None:
    module = tiny.Tiny()
    tiny.fit(module, tiny.regularizers())
    assert Engine.find(module) is None
