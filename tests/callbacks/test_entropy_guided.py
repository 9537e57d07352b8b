"""Entropy-guided thresholds in a Trainer: the hand-written twin, the five published bugs, optimizers, checkpoints."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer, EntropyGuidedRegularizer, SigmaReparam
from lightning_reg.schedules import Linear
from tests import tiny
from tests.test_engine import DIFFERENT, EXACT, assert_untouched

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*You're resuming from a checkpoint that ended before the epoch ended.*"),
]

WEIGHT, MARGIN, START = 4.0, 0.1, 0.6


def guided(weight: float = WEIGHT, **arguments: Any) -> EntropyGuidedRegularizer:
    return EntropyGuidedRegularizer(weight, **{"margin": MARGIN, "threshold": START, **arguments})


def penalty(net: tiny.Net, x: Tensor, thresholds: Any) -> Tensor:
    """From the definition, independent of the library."""
    total: Any = 0.0
    for block, threshold in zip(net.blocks, thresholds, strict=True):
        batch, tokens, width = x.shape
        q, k, _ = block.attention.qkv(x).view(batch, tokens, 3, tiny.HEADS, -1).permute(2, 0, 3, 1, 4)
        log_p = (q @ k.transpose(-1, -2) / math.sqrt(width // tiny.HEADS)).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) / math.log(tokens)
        distance = entropy.mean((0, 2)) - threshold
        total = total + (distance.square() * (distance.abs() > MARGIN)).mean()
        x = block(x)
    return total / len(net.blocks)


def _keep_in_range(parameters: Any) -> Any:
    def clamp(*_: Any) -> None:
        for parameter in parameters:
            parameter.data.clamp_(0, 1)

    return clamp


class Twin(tiny.Tiny):
    """`handwritten` has the thresholds as ordinary parameters, in a group of their own."""

    def __init__(self, handwritten: bool = False, learnable: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.written, self.learnable = handwritten, learnable
        count = len(self.nets()) * len(self.net.blocks) * handwritten
        self.theta = nn.ParameterList(nn.Parameter(torch.full((tiny.HEADS,), START), learnable) for _ in range(count))

    def nets(self) -> list[Any]:
        return [self.net]

    def loss(self, x: Tensor) -> Tensor:
        loss = super().loss(x)
        return loss + WEIGHT * penalty(self.net, x, self.theta) if self.written else loss

    def configure_optimizers(self) -> Any:
        made = [self.make(net, self.theta[2 * i : 2 * i + 2]) for i, net in enumerate(self.nets())]
        return made[0] if len(made) == 1 else made

    def make(self, net: nn.Module, theta: Any) -> torch.optim.Optimizer:
        kinds = {"adam": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1})}
        sgd = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.5})
        kind, arguments = kinds.get(self.optimizer, sgd)
        optimizer = kind(net.parameters(), **arguments)
        if self.written and self.learnable:
            optimizer.add_param_group({"params": list(theta), "weight_decay": 0.0})
            optimizer.register_step_post_hook(_keep_in_range(list(theta)))
        return optimizer


class Manual(Twin, tiny.Manual):
    pass


class Adversarial(Twin):
    """Two nets, two toggled optimizers; the thresholds of each belong to its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def nets(self) -> list[Any]:
        if not hasattr(self, "other"):
            self.other = tiny.Net()
        return [self.net, self.other]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        for i, (net, optimizer) in enumerate(zip(self.nets(), self.optimizers(), strict=True)):
            self.toggle_optimizer(optimizer)
            loss = (net(x) - x.roll(1, 1)).square().mean()
            if self.written:
                loss = loss + WEIGHT * penalty(net, x, self.theta[2 * i : 2 * i + 2])
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, ckpt: Any = None, **settings: Any) -> pl.Trainer:
    trainer = tiny.trainer([*callbacks, *settings.pop("callbacks", [])], **settings)
    trainer.fit(module, ckpt_path=ckpt)
    return trainer


def weights(module: Any) -> Tensor:
    return torch.cat([tiny.parameters(net) for net in module.nets()])


def learned(callback: EntropyGuidedRegularizer) -> Tensor:
    return torch.cat([callback.thresholds[site].double() for site in sorted(callback.thresholds)])


CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    # name: module, its arguments, trainer arguments
    "plain": (Twin, {}, {}),
    "accumulate_ragged": (Twin, {}, {"accumulate_grad_batches": 3}),
    "clip_norm": (Twin, {}, {"gradient_clip_val": 0.1}),
    "adamw_float64": (Twin, {"optimizer": "adam"}, {"precision": "64-true"}),
    "manual_accumulate": (Manual, {}, {}),
    "manual_two_optimizers": (Adversarial, {}, {}),
    "nonreentrant_accumulate": (Twin, {"use_reentrant": False}, {"accumulate_grad_batches": 3}),
    "reentrant_accumulate": (Twin, {"use_reentrant": True}, {"accumulate_grad_batches": 3}),
    "reentrant_manual": (Manual, {"use_reentrant": True}, {}),
    "sanity_validation": (Twin, {}, {"limit_val_batches": 2, "num_sanity_val_steps": 2, "val_check_interval": 4}),
    "constant_thresholds": (Twin, {"learnable": False}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_handwritten_loss(case: str) -> None:
    module, arguments, settings = CASES[case]
    learnable = arguments.get("learnable", True)
    twin, trained = module(handwritten=True, **{**arguments, "use_reentrant": None}), module(**arguments)
    callback = guided(learnable=learnable)
    fit(twin, **settings)
    fit(trained, callback, **settings)
    assert tiny.distance(weights(trained), weights(twin)) <= EXACT
    assert_untouched(trained)
    plain = module(**arguments)
    fit(plain, **settings)
    assert tiny.distance(weights(plain), weights(twin)) > DIFFERENT
    if learnable:
        wanted = torch.cat([theta.detach().double() for theta in twin.theta])
        assert tiny.distance(learned(callback), wanted) <= EXACT
        assert tiny.distance(wanted, torch.full_like(wanted, START)) > DIFFERENT


def test_compiled_attention_trains_like_eager() -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    twin, trained, callback = Twin(handwritten=True), Twin(), guided()
    trained.num_heads = tiny.HEADS  # of a module that computes no attention: its thresholds are dropped
    for block in trained.net.blocks:
        block.attention.num_heads = tiny.HEADS
        block.attention.compile(backend="aot_eager", fullgraph=True)
    fit(twin)
    fit(trained, callback)
    assert tiny.distance(weights(trained), weights(twin)) <= EXACT
    assert tiny.distance(learned(callback), torch.cat([theta.detach().double() for theta in twin.theta])) <= EXACT
    assert sorted(callback.thresholds) == ["net.blocks.0.attention", "net.blocks.1.attention"]
    assert not counters["graph_break"]


def test_gradients_are_unscaled_with_those_of_the_model() -> None:
    def scaler() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))

    twin, trained, callback = Twin(handwritten=True), Twin(), guided()
    fit(twin, plugins=[scaler()])
    fit(trained, callback, plugins=[scaler()])
    wanted = torch.cat([theta.detach().double() for theta in twin.theta])
    assert tiny.distance(learned(callback), wanted) <= 2e-3
    assert tiny.distance(wanted, torch.full_like(wanted, START)) > 2e-2


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
def test_weight_zero_is_bit_identical_to_no_callback(use_reentrant: bool | None) -> None:
    without = tiny.fit(tiny.Tiny(use_reentrant=use_reentrant, optimizer="adam"), gradient_clip_val=0.1)
    callback = guided(0.0)
    got = tiny.fit(tiny.Tiny(use_reentrant=use_reentrant, optimizer="adam"), [callback], gradient_clip_val=0.1)
    assert torch.equal(got, without)
    assert learned(callback).eq(torch.tensor(START).double()).all()


# --- the bugs of the published code ----------------------------------------------------------------------------------


def seen(callback: EntropyGuidedRegularizer, entropy: Tensor, visible: Any = 8, site: str = "site") -> Tensor:
    return callback.see_attention(entropy, visible, None, site=site)[0]


def test_bug_1_the_value_does_not_depend_on_the_size_of_the_batch_or_the_length() -> None:
    rows = torch.rand(3, 2, 5) * math.log(8)
    once = seen(guided(margin=0.0), rows)
    for many in (rows.repeat(7, 1, 1), rows.repeat(1, 1, 4)):
        torch.testing.assert_close(seen(guided(margin=0.0), many), once, rtol=1e-6, atol=0)
    assert once <= 1  # a mean of squares of shares, not a sum over rows


def test_bug_2_every_layer_has_thresholds_of_its_own() -> None:
    callback, module = guided(), Twin()
    fit(module, callback)
    first, second = (callback.thresholds[f"net.blocks.{i}.attention"] for i in (0, 1))
    assert first.shape == second.shape == (tiny.HEADS,)
    assert first.data_ptr() != second.data_ptr()
    assert not torch.equal(first, second)
    assert first[0] != first[1]


class Causal(tiny.Tiny):
    """Uniform attention: queries are zero."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net.blocks:
            with torch.no_grad():
                block.attention.qkv.weight[: tiny.WIDTH] = 0
                block.attention.qkv.bias[: tiny.WIDTH] = 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.net.blocks:
            q, k, v = block.attention.qkv(x).view(*x.shape[:2], 3, tiny.HEADS, -1).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        return x


def test_bug_3_uniform_causal_attention_has_entropy_one() -> None:
    trainer = fit(Causal(), guided(1e-12, targets=""), log_every_n_steps=1, limit_train_batches=1)
    assert trainer.logged_metrics["reg/entropy_guided/value"].item() == pytest.approx(1.0, abs=1e-6)
    # what the published code compares: rows of log(i + 1) with log(128)
    rows = torch.arange(1, 129).double()
    assert (rows.log() / math.log(128)).mean().item() == pytest.approx(0.80, abs=0.005)
    nats = rows.float().log().expand(1, 2, 128)
    visible = rows.long().expand(1, 2, 128)
    assert seen(guided(margin=0.0, threshold=1.0), nats, visible).item() == pytest.approx(0.0, abs=1e-9)


def test_bug_4_thresholds_have_the_gradient_of_the_penalty_alone_and_stay_in_range() -> None:
    callback = guided(margin=0.0)
    entropy = (torch.rand(3, 2, 5) * math.log(8)).requires_grad_()
    (7.0 * seen(callback, entropy)).backward()
    (threshold,) = callback.parameters()
    mean = (entropy.detach() / math.log(8)).mean((0, 2))
    torch.testing.assert_close(threshold.grad, 7.0 * -2 * (mean - START) / 2, rtol=1e-5, atol=0)

    module = Twin(optimizer="adam")
    pushed = guided(1e-9, threshold=0.999, threshold_lr=0.5)
    trainer = fit(module, pushed)
    assert learned(pushed).min() >= 0
    assert learned(pushed).max() <= 1
    group = trainer.optimizers[0].param_groups[-1]
    assert {id(p) for p in group["params"]} == {id(p) for p in pushed.parameters()}
    assert group["weight_decay"] == 0
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.1


def test_thresholds_are_clamped_after_each_step() -> None:
    class Kicked(Twin):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            assert all(p.min() >= 0 and p.max() <= 1 for p in callback.parameters())

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for i, p in enumerate(callback.parameters()):
                p.grad = torch.full_like(p, 100.0 * (-1) ** i)

    callback = guided()
    fit(Kicked(), callback)
    assert callback.thresholds["net.blocks.0.attention"].eq(0).all()
    assert callback.thresholds["net.blocks.1.attention"].eq(1).all()


def test_bug_5_attention_stays_fused_and_nan_stays_visible() -> None:
    kernels: set[bool] = set()

    class Asks(Twin):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.autograd.profiler.profile() as profile:
                loss = super().training_step(batch, batch_idx)
            kernels.add(any("scaled_dot_product" in event.key for event in profile.key_averages()))
            return loss

    module = Asks()
    fit(module, guided(), limit_train_batches=1)  # the model is never asked for its attention matrix
    nats = torch.rand(2, 2, 4)
    nats[0, 1, 2] = math.nan
    for objective in ("band", "floor", "ceiling"):
        assert torch.isnan(seen(guided(objective=objective), nats))

    class Poisoned(Twin):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch[0] * math.nan)

    with pytest.raises(RuntimeError, match=r"`reg/entropy_guided/layers/net.blocks.0.attention` is nan at step"):
        fit(Poisoned(), guided(), log_every_n_steps=1)


# --- optimizers ------------------------------------------------------------------------------------------------------


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=[1e-5]),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [3],
    ),
}


class Scheduled(Twin):
    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scheduler_name, self.rates = name, []

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        config = {"scheduler": SCHEDULERS[self.scheduler_name](optimizer), "interval": "step"}
        if self.scheduler_name == "plateau":
            config |= {"monitor": "constant", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_train_batch_end(self, *args: Any) -> None:
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("constant", 1.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*", "ignore:.*epoch parameter in.*")
@pytest.mark.parametrize("rate", [None, 0.5], ids=["rate_of_the_model", "own_rate"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_own_group_follows_the_schedule_of_the_first(name: str, rate: float | None) -> None:
    module = Scheduled(name, optimizer="adam")
    fit(module, guided(threshold_lr=rate))
    base = module.optimizers().param_groups[0]["initial_lr"] if name != "plateau" else 1e-2
    factor = 1.0 if rate is None else rate / base
    assert all(len(rates) == 2 for rates in module.rates)
    assert [theirs for _, theirs in module.rates] == pytest.approx([own * factor for own, _ in module.rates], rel=1e-9)
    assert len({own for own, _ in module.rates}) > 2


def test_named_parameter_groups_stay_named() -> None:
    class Named(Twin):
        def make(self, net: nn.Module, theta: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(net.named_parameters(), lr=1e-2)

    trainer = fit(Named(), guided())
    names = trainer.optimizers[0].param_groups[-1]["param_names"]
    assert names == [f"entropy_guided.net.blocks.{i}.attention" for i in (0, 1)]


def test_own_rate_leaves_a_rate_in_a_tensor_alone() -> None:
    class Tensors(Twin):
        def make(self, net: nn.Module, theta: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(net.parameters(), lr=torch.tensor(1e-2), foreach=False)

    trainer = fit(Tensors(), guided(threshold_lr=0.5))
    first, own = (float(group["lr"]) for group in trainer.optimizers[0].param_groups)
    assert (first, own) == pytest.approx((1e-2, 0.5))


class Late(Twin):
    """The second block's attention runs from the third batch on."""

    def loss(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        y = self.net.blocks[0](x)
        return (self.net.blocks[1](y) if self.calls > 2 else y).square().mean()


def test_a_layer_that_runs_later_joins_the_group() -> None:
    callback = guided(allow_unused=True)
    trainer = fit(Late(), callback)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups][1:] == [2]
    assert callback.thresholds["net.blocks.1.attention"].ne(START).all()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def keep(directory: Path, every: int = 1) -> dict[str, Any]:
    saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    return {"callbacks": [saver], "enable_checkpointing": True}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.parametrize("others", ["alone", "sigma_first", "sigma_last", "two"])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(others: str, tmp_path: Path) -> None:
    def run(ckpt: Any = None) -> tuple[Tensor, Tensor]:
        module, callback = Scheduled("cosine", optimizer="adam"), guided(threshold_lr=0.3)
        more = {"alone": [], "two": [guided(5.0, name="second", objective="floor", threshold=0.9, margin=0.01)]}
        sigma = [SigmaReparam()]
        callbacks = {"sigma_first": [*sigma, callback], "sigma_last": [callback, *sigma]}.get(
            others, [callback, *more.get(others, [])]
        )
        saver = ModelCheckpoint(tmp_path / others, filename="{epoch}", save_top_k=-1)
        settings = {"accumulate_grad_batches": 3, "max_epochs": 2, "enable_checkpointing": True}
        fit(module, *callbacks, saver, ckpt=ckpt, **settings)
        return weights(module), torch.cat([learned(c) for c in callbacks if isinstance(c, EntropyGuidedRegularizer)])

    whole = run()
    resumed = run(tmp_path / others / "epoch=0.ckpt")
    assert torch.equal(resumed[0], whole[0])
    assert torch.equal(resumed[1], whole[1])


def test_checkpoints_are_plain_and_hold_the_thresholds_beside_the_model(tmp_path: Path) -> None:
    module, callback = Twin(), guided()
    fit(module, callback, **keep(tmp_path, 8))
    checkpoint = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Twin().state_dict()) == list(module.state_dict())
    saved = checkpoint["callbacks"][callback.state_key]["thresholds"]
    assert all(torch.equal(saved[site], callback.thresholds[site]) for site in saved)
    assert len(saved) == 2


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [({"margin": 0.3}, "margin"), ({"threshold": 0.4}, "threshold"), ({"learnable": False}, "learnable"),
     ({"objective": "floor"}, "objective")],
    ids=["margin", "threshold", "learnable", "objective"],
)  # fmt: skip
def test_a_checkpoint_of_another_configuration_is_refused(arguments: Any, argument: str, tmp_path: Path) -> None:
    fit(Twin(), guided(), **keep(tmp_path, 8))
    with pytest.raises(ValueError, match=f"`{argument}` of EntropyGuidedRegularizer .* the checkpoint was trained"):
        fit(Twin(), guided(**arguments), ckpt=tmp_path / "step=8.ckpt", max_epochs=2)


def test_a_checkpoint_with_thresholds_of_other_sites_is_refused(tmp_path: Path) -> None:
    fit(Twin(), guided(), **keep(tmp_path, 8))
    message = "`entropy_guided` has thresholds of net.blocks.1.attention, which this model does not have"
    module = Twin()
    with pytest.raises(ValueError, match=message):
        fit(module, guided(targets=r"blocks\.0\.attention"), ckpt=tmp_path / "step=8.ckpt", max_epochs=2)
    assert_untouched(module)


def test_a_second_fit_starts_again() -> None:
    callback = guided()
    fit(Twin(), callback)
    once = learned(callback)
    fit(Twin(), callback)
    assert torch.equal(learned(callback), once)


def test_the_rate_finder_leaves_no_group_behind(tmp_path: Path) -> None:
    class Rated(Twin):
        def __init__(self) -> None:
            super().__init__(optimizer="adam")
            self.lr = 1e-2

    def run(*more: Any) -> tuple[Tensor, Tensor, int]:
        module, callback = Rated(), guided()
        trainer = fit(module, callback, *more, default_root_dir=tmp_path)
        return weights(module), learned(callback), len(trainer.optimizers[0].param_groups)

    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    found, plain = run(finder), run()
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])
    assert found[2] == plain[2] == 2


# --- without a Trainer -----------------------------------------------------------------------------------------------


def test_hand_written_loop_equals_the_handwritten_loss() -> None:
    torch.manual_seed(0)
    net, twin = tiny.Net(), tiny.Net()
    twin.load_state_dict(net.state_dict())
    theta = [nn.Parameter(torch.full((tiny.HEADS,), START)) for _ in twin.blocks]
    optimizer = torch.optim.SGD([*twin.parameters(), *theta], lr=0.05)
    for (x,) in tiny.loader(4):
        optimizer.zero_grad()
        ((twin(x) - x.roll(1, 1)).square().mean() + WEIGHT * penalty(twin, x, theta)).backward()
        optimizer.step()
        _keep_in_range(theta)()
    callback, optimizer = guided(), torch.optim.SGD(net.parameters(), lr=0.05)
    with regularize(net, [callback]) as reg:
        for i, (x,) in enumerate(tiny.loader(4)):
            optimizer.zero_grad()
            loss = reg.add((net(x) - x.roll(1, 1)).square().mean())
            if i == 0:
                optimizer.add_param_group({"params": callback.parameters(), "weight_decay": 0.0})
            loss.backward()
            optimizer.step()
    assert tiny.distance(tiny.parameters(net), tiny.parameters(twin)) <= EXACT
    assert tiny.distance(learned(callback), torch.cat([t.detach().double() for t in theta])) <= EXACT
    with torch.no_grad():
        callback.parameters()[0].fill_(3.0)
    callback.after_step(net)
    assert callback.parameters()[0].eq(1).all()


# --- arguments and bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": -0.1}, r"`margin` must be in \[0, 1\], a share of log\(visible keys\), got -0.1"),
        ({"margin": math.nan}, r"`margin` must be in \[0, 1\].* got nan"),
        ({"threshold": 1.5}, r"`threshold` must be in \[0, 1\], a share of log\(visible keys\), got 1.5"),
        ({"threshold": True}, r"`threshold` must be in \[0, 1\].* got True"),
        ({"objective": "target"}, "`objective` must be one of band, floor, ceiling, got 'target'"),
        ({"threshold_lr": 0.0}, "`threshold_lr` must be a finite number > 0, or None .* got 0.0; `learnable=False`"),
        ({"threshold_lr": math.inf}, "`threshold_lr` must be a finite number > 0, or None .* got inf"),
        ({"weight": -1.0}, "`weight` must be a finite number >= 0, got -1.0"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntropyGuidedRegularizer(**arguments)


class Folded(tiny.Tiny):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights, self.attention = need_weights, nn.MultiheadAttention(tiny.WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("learnable", [True, False])
def test_heads_that_are_folded_into_the_batch_are_refused(learnable: bool) -> None:
    module = Folded(need_weights=True)
    with pytest.raises(ValueError, match="`entropy_guided` at attention: its 2 heads are folded into the batch"):
        fit(module, guided(learnable=learnable))
    assert_untouched(module)
    callback = guided(learnable=learnable)
    fit(Folded(need_weights=False), callback)
    assert [len(threshold) for threshold in callback.thresholds.values()] == [2] * learnable


class Varying(Twin):
    def loss(self, x: Tensor) -> Tensor:
        q = self.net.blocks[0].attention.qkv(x)[..., : tiny.WIDTH]
        heads = [q.view(*x.shape[:2], n, -1).transpose(1, 2) for n in (2, 4)]
        return sum(F.scaled_dot_product_attention(h, h, h).square().mean() for h in heads)


def test_a_site_whose_heads_change_is_refused() -> None:
    module = Varying()
    with pytest.raises(ValueError, match="`entropy_guided` at Varying: 4 heads, but its thresholds are of 2"):
        fit(module, guided(targets=""))
    assert_untouched(module)


def test_attention_that_nothing_trains_is_refused() -> None:
    class Detached(Twin):
        def loss(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                for block in self.net.blocks:
                    block.attention.qkv.requires_grad_(False)
            return super().loss(x)

    module = Detached()
    module.net.blocks[0].attention.qkv.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"net.blocks.0.attention: the penalty has no gradient"):
        fit(module, guided())


def test_lbfgs_is_refused_for_learned_thresholds() -> None:
    module = tiny.Tiny(optimizer="lbfgs")
    with pytest.raises(RuntimeError, match="LBFGS takes no other parameter group.*`learnable=False`"):
        fit(module, guided())
    assert_untouched(module)
    fit(tiny.Tiny(optimizer="lbfgs", batches=2, iterations=1), guided(1e-3, learnable=False))


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_that_take_only_parameters_of_the_model_are_refused(name: str, monkeypatch: Any) -> None:
    import lightning_reg.callbacks.entropy_guided as module

    trainer = tiny.trainer()
    monkeypatch.setattr(module, name, type(trainer.strategy))
    with pytest.raises(RuntimeError, match="learned thresholds do not work with SingleDeviceStrategy"):
        guided().setup(trainer, Twin(), "fit")
    guided(learnable=False).setup(trainer, Twin(), "fit")


def test_thresholds_are_logged_and_follow_a_schedule_and_a_mask() -> None:
    callback = guided(schedule=Linear(0.0, 1.0, duration=8), mask=lambda batch: torch.ones(4, tiny.TOKENS).bool())
    trainer = fit(Twin(), callback, log_every_n_steps=1)
    logged = trainer.logged_metrics
    assert logged["reg/entropy_guided/threshold"].item() == pytest.approx(learned(callback).mean().item(), rel=1e-6)
    assert logged["reg/entropy_guided/weight"].item() == pytest.approx(WEIGHT * 7 / 8)
    assert callback.hyperparameters()["threshold"] == START
    assert callback.hyperparameters()["threshold_lr"] is None


def test_it_is_an_attention_regularizer_with_the_papers_default() -> None:
    callback = EntropyGuidedRegularizer()
    assert isinstance(callback, AttentionEntropyRegularizer)
    assert (callback.weight, callback.loss.margin, callback.threshold) == (1e-5, 0.2, 0.5)
