"""ProSparse as a callback, and what happens to the activations it substitutes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_reg import regularize
from lightning_reg.activations import FATReLU, activation_record, fold_activations, load_activations
from lightning_reg.calibration import calibrate_fatrelu
from lightning_reg.callbacks import ActivationL1Regularizer, ActivationSubstitution, ProgressiveSparsity
from lightning_reg.engine import Engine
from lightning_reg.schedules import TargetController
from tests import tiny
from tests.test_engine import DIFFERENT, EXACT, assert_untouched

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:.*missed its target")]

STAGES = [(2, 0.0), (4, 1.0), (8, 5.0)]


class Block(tiny.Block):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.act_fn: Any = nn.SiLU() if gated else F.gelu
        self.up = nn.Linear(tiny.WIDTH, 2 * tiny.WIDTH) if gated else None

    def hidden(self, x: Tensor, activation: Any) -> Tensor:
        gate = activation(self.fc1(x))
        return gate if self.up is None else gate * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.fc2(self.hidden(x, self.act_fn))


class Smooth(tiny.Tiny):
    """Blocks with a smooth activation; by hand: ReLU, and the penalty of each step."""

    def __init__(self, gated: bool = False, stages: Any = STAGES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        torch.manual_seed(0)
        self.net.blocks = nn.ModuleList(Block(gated) for _ in range(2))
        self.stages = stages

    def loss(self, x: Tensor) -> Tensor:
        if not self.handwritten:
            return super().loss(x)
        target, penalties = x.roll(1, 1), []
        for block in self.net.blocks:
            x = x + block.attention(x)
            hidden = block.hidden(x, F.relu)
            penalties.append(hidden.abs().mean())
            x = x + block.fc2(hidden)
        return (x - target).square().mean() + self.weight() * torch.stack(penalties).mean()

    def weight(self) -> float:
        step = self.trainer.global_step
        if step <= 2:
            return 0.0
        if step <= 4:
            return 1.0
        return 1.0 + 4.0 * (1 - torch.cos(torch.tensor((step - 4) / 4 * torch.pi)).item()) / 2 if step < 8 else 5.0


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_training_equals_relu_and_penalty_by_hand(gated: bool) -> None:
    wanted = tiny.fit(Smooth(gated, handwritten=True, batches=12))
    got = tiny.fit(Smooth(gated, batches=12), [ProgressiveSparsity(STAGES)])
    assert tiny.distance(got, wanted) <= EXACT
    for other in ([], [ActivationSubstitution()], [ProgressiveSparsity(STAGES, penalty="hoyer")]):
        assert tiny.distance(tiny.fit(Smooth(gated, batches=12), other), wanted) > DIFFERENT / 10


def test_fractions_and_steps_train_the_same() -> None:
    steps = tiny.fit(Smooth(), [ProgressiveSparsity(STAGES)])
    fractions = tiny.fit(Smooth(), [ProgressiveSparsity([(end / 8, peak) for end, peak in STAGES])])
    assert torch.equal(steps, fractions)


@pytest.mark.parametrize("penalty", ["l1", "hoyer", "density"])
def test_penalty_is_the_callback_of_that_name(penalty: str) -> None:
    trainer = tiny.trainer([ProgressiveSparsity([(8, 2.0)], penalty=penalty)], log_every_n_steps=1)
    trainer.fit(Smooth())
    logged = trainer.logged_metrics
    assert logged["reg/progressive_sparsity/value"] > 0
    ratio = logged["reg/progressive_sparsity/weighted"] / logged["reg/progressive_sparsity/value"]
    assert ratio.item() == pytest.approx(2.0, rel=1e-5)


def test_density_is_logged_beside_the_penalty() -> None:
    callback = ProgressiveSparsity([(2, 1e-9)])
    trainer = tiny.trainer([callback], log_every_n_steps=2)
    module, seen = Smooth(batches=2), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            x, shares = batch[0], []
            for block in pl_module.net.blocks:
                x = x + block.attention(x)
                shares.append((block.hidden(x, F.relu) != 0).float().mean().item())
                x = x + block.fc2(block.hidden(x, F.relu))
            seen.append(sum(shares) / len(shares))

    trainer.callbacks.append(Watch())
    trainer.fit(module)
    assert trainer.logged_metrics["reg/progressive_sparsity/density"].item() == pytest.approx(seen[1], rel=1e-6)


CALLBACKS = {
    "progressive": lambda: ProgressiveSparsity(STAGES),
    "substitution": lambda: ActivationSubstitution("relu"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_substitutes_stay_plain_and_nothing_else_does(name: str) -> None:
    module = Smooth()
    keys = list(module.state_dict())
    tiny.fit(module, [CALLBACKS[name]()])
    assert_untouched(module)
    assert Engine.find(module) is None
    assert list(module.state_dict()) == keys
    assert all(type(block.act_fn) is nn.ReLU for block in module.net.blocks)


def saved(path: Path, callback: Any, **kwargs: Any) -> tuple[pl.LightningModule, str]:
    module = Smooth(optimizer="adam")
    keep = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    tiny.trainer([callback, keep], max_epochs=2, enable_checkpointing=True, **kwargs).fit(module)
    return module, str(path / "epoch=0.ckpt")


@pytest.mark.parametrize("name", CALLBACKS)
def test_resumed_training_equals_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, checkpoint = saved(tmp_path, CALLBACKS[name]())
    resumed = Smooth(optimizer="adam")
    tiny.trainer([CALLBACKS[name]()], max_epochs=2).fit(resumed, ckpt_path=checkpoint)
    assert torch.equal(tiny.parameters(resumed), tiny.parameters(whole))


class Output(pl.Callback):
    """Keeps what the model gives in evaluation."""

    output: Tensor

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        self.output = pl_module(batch[0])


@pytest.mark.parametrize("name", CALLBACKS)
def test_checkpoint_is_plain_and_tells_what_was_substituted(name: str, tmp_path: Path) -> None:
    module, _ = saved(tmp_path, CALLBACKS[name]())
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Smooth().state_dict())
    (x,) = next(iter(tiny.loader(1)))
    wanted = module.eval()(x)
    loaded = Smooth.load_from_checkpoint(tmp_path / "epoch=1.ckpt", weights_only=True).eval()
    assert not torch.equal(loaded(x), wanted)  # its own activation
    load_activations(loaded, checkpoint)
    assert torch.equal(loaded(x), wanted)
    assert torch.equal(fold_activations(loaded)(x), wanted)

    fresh, seen = Smooth(), Output()
    trainer = tiny.trainer([CALLBACKS[name](), seen], limit_val_batches=1)
    trainer.validate(fresh, ckpt_path=str(tmp_path / "epoch=1.ckpt"), verbose=False)
    batch = next(iter(fresh.val_dataloader()))[0]
    assert torch.equal(seen.output, module(batch))


def test_calibrated_thresholds_survive_checkpoint_and_evaluation(tmp_path: Path) -> None:
    module, callback = Smooth(), ProgressiveSparsity(STAGES)
    trainer = tiny.trainer([callback])
    trainer.fit(module)
    for index, block in enumerate(module.net.blocks):
        substitute = FATReLU(0.01 * (index + 1))
        substitute.__dict__.update(_lightning_reg_original=block.act_fn.__dict__["_lightning_reg_original"])
        block.act_fn = substitute
    trainer.save_checkpoint(tmp_path / "shifted.ckpt")
    fresh = Smooth()
    tiny.trainer([ProgressiveSparsity(STAGES)], limit_val_batches=1).validate(
        fresh, ckpt_path=str(tmp_path / "shifted.ckpt"), verbose=False
    )
    assert [block.act_fn.threshold for block in fresh.net.blocks] == [0.01, 0.02]
    assert activation_record(fresh) == activation_record(module)


class Built(Smooth):
    """Builds its layers late."""

    def __init__(self) -> None:
        super().__init__()
        self.later, self.net = self.net, None
        self.__dict__["later"] = self._modules.pop("later")

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.__dict__.pop("later")


@pytest.mark.parametrize("name", CALLBACKS)
def test_model_built_in_configure_model(name: str) -> None:
    assert torch.equal(tiny.fit(Built(), [CALLBACKS[name]()]), tiny.fit(Smooth(), [CALLBACKS[name]()]))


def test_penalty_before_the_activation_finds_the_substitute() -> None:
    before = ActivationL1Regularizer(1.0, role="mlp_pre_activation", floor=0.0)
    trainer = tiny.trainer([before, ActivationSubstitution("relu")], log_every_n_steps=1)
    module = Smooth(batches=1)
    trainer.fit(module)
    # the L1 above 0 of what enters a ReLU is the L1 of what leaves it
    plain = tiny.trainer([ActivationL1Regularizer(1.0), ActivationSubstitution("relu")], log_every_n_steps=1)
    plain.fit(Smooth(batches=1))
    key = "reg/activation_l1/value"
    assert trainer.logged_metrics[key].item() == pytest.approx(plain.logged_metrics[key].item(), rel=1e-6)


def test_handwritten_loop() -> None:
    module = Smooth(batches=12)
    wanted = tiny.fit(Smooth(batches=12), [ProgressiveSparsity(STAGES)])
    with regularize(module, [ProgressiveSparsity(STAGES)]) as reg:
        optimizer = module.configure_optimizers()
        for (x,) in module.train_dataloader():
            optimizer.zero_grad()
            reg.add(module.loss(x)).backward()
            optimizer.step()
    assert tiny.distance(tiny.parameters(module), wanted) <= EXACT
    assert type(module.net.blocks[0].act_fn) is nn.ReLU


def test_evaluation_of_a_model_that_was_trained_otherwise_leaves_it_alone() -> None:
    module = Smooth()
    tiny.fit(module)
    trainer = tiny.trainer([ActivationSubstitution()], limit_val_batches=1)
    trainer.validate(module, verbose=False)
    assert module.net.blocks[0].act_fn is F.gelu


def test_thresholds_survive_a_test_after_folding_and_a_crash_of_another_fit() -> None:
    module, callback = Smooth(), ProgressiveSparsity(STAGES)
    trainer = tiny.trainer([callback], limit_val_batches=1)
    trainer.fit(module)
    calibrate_fatrelu(module, [next(iter(tiny.loader(1)))[0]], target=0.5)
    thresholds = activation_record(module)
    with pytest.raises(KeyError, match="crash"):
        tiny.fit(module, [ProgressiveSparsity(STAGES), Crash(0)])
    assert activation_record(module) == thresholds
    fold_activations(module)
    trainer.validate(module, verbose=False)
    assert all(type(block.act_fn) is nn.Threshold for block in module.net.blocks)


def test_nothing_of_a_checkpoint_enters_a_later_fit(tmp_path: Path) -> None:
    module, callback = Smooth(), ProgressiveSparsity(STAGES)
    trainer = tiny.trainer([callback], limit_val_batches=1)
    trainer.fit(module)
    calibrate_fatrelu(module, [next(iter(tiny.loader(1)))[0]], target=0.5)
    trainer.save_checkpoint(tmp_path / "shifted.ckpt")
    trainer.validate(module, ckpt_path=str(tmp_path / "shifted.ckpt"), verbose=False)
    wanted = tiny.fit(Smooth(), [ProgressiveSparsity(STAGES)])
    assert torch.equal(tiny.fit(Smooth(), [callback]), wanted)


class Mine(nn.ReLU):
    pass


def test_module_of_ones_own_is_resumed_and_tested_from_its_checkpoint(tmp_path: Path) -> None:
    whole, checkpoint = saved(tmp_path, ActivationSubstitution(Mine()))
    resumed = Smooth(optimizer="adam")
    trainer = tiny.trainer([ActivationSubstitution(Mine())], max_epochs=2, limit_val_batches=1)
    trainer.fit(resumed, ckpt_path=checkpoint)
    assert torch.equal(tiny.parameters(resumed), tiny.parameters(whole))
    trainer.validate(resumed, ckpt_path=checkpoint, verbose=False)


@pytest.mark.parametrize("built", [False, True], ids=["init", "configure_model"])
def test_penalties_find_the_substitutes_also_when_resumed(built: bool, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        before = ActivationL1Regularizer(0.1, role="mlp_pre_activation", name="before")
        density = ActivationL1Regularizer(1.0, schedule=TargetController(0.4), name="density")
        return [before, density, ActivationSubstitution()]

    module = Built() if built else Smooth()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    tiny.trainer([*callbacks(), keep], max_epochs=1, enable_checkpointing=True).fit(module)
    fresh = Built() if built else Smooth()
    tiny.trainer(callbacks(), max_epochs=2).fit(fresh, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert type(fresh.net.blocks[0].act_fn) is nn.ReLU


def test_keys_do_not_depend_on_the_process() -> None:
    def second(name: str, module: nn.Module) -> bool:
        return name.endswith("1.fc2")

    assert "0x" not in ActivationSubstitution(targets=second).state_key


def test_substitution_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        tiny.fit(Smooth(), [ActivationSubstitution("topk")])
    assert (
        "ActivationSubstitution: TopK in place of the MLP's activation at 2 sites (net.blocks.0.act_fn, " in caplog.text
    )


# --- bad input -------------------------------------------------------------------------------------------------------


class Crash(pl.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise KeyError("crash")


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("batch", [0, 3])
def test_crash_restores_an_untrained_model_only(name: str, batch: int) -> None:
    module = Smooth()
    with pytest.raises(KeyError, match="crash"):
        tiny.fit(module, [CALLBACKS[name](), Crash(batch)])
    assert_untouched(module)
    assert (module.net.blocks[0].act_fn is F.gelu) == (batch == 0)


@pytest.mark.parametrize(("gated", "name"), [(False, "gelu"), (True, "SiLU")])
def test_smooth_activation_is_refused_with_the_remedy(gated: bool, name: str) -> None:
    module = Smooth(gated)
    message = rf"'net.blocks.0.act_fn' \({name}\) is never exactly 0.*Substitute it.*mlp_pre_activation"
    with pytest.raises(ValueError, match=message):
        tiny.fit(module, [ProgressiveSparsity(STAGES, substitute=None)])
    assert_untouched(module)
    smooth = pytest.raises(ValueError, match="is never exactly 0")
    with smooth:
        tiny.fit(module, [ProgressiveSparsity(STAGES, substitute=nn.Tanh())])


def test_two_substitutions_of_one_activation_are_refused() -> None:
    module = Smooth()
    with pytest.raises(ValueError, match="both substitute 'net.blocks.0.act_fn'.*do not overlap"):
        tiny.fit(module, [ActivationSubstitution("relu2"), ProgressiveSparsity(STAGES)])
    assert module.net.blocks[0].act_fn is F.gelu
    halves = [ActivationSubstitution("relu2", targets="0.fc2"), ProgressiveSparsity(STAGES, targets="1.fc2")]
    tiny.fit(module, halves)


def test_model_without_mlp_is_refused() -> None:
    class Bare(tiny.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)

    for callback in (ProgressiveSparsity(STAGES), ActivationSubstitution("relu")):
        module = Bare()
        with pytest.raises(ValueError, match="no MLP down-projection was found"):
            tiny.fit(module, [callback])
        assert_untouched(module)


def test_inline_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'net.blocks.0.fc2' calls its activation inline"):
        tiny.fit(tiny.Tiny(), [ProgressiveSparsity(STAGES)])


def test_schedule_longer_than_the_training_warns_with_numbers() -> None:
    with pytest.warns(
        UserWarning, match="end at step 80, but the training has 8: the weight will reach 1 instead of 5"
    ):
        tiny.fit(Smooth(), [ProgressiveSparsity([(2, 0.0), (8, 1.0), (80, 5.0)])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": [(5, 0.0), (5, 1.0)]}, "`stages` must have ends > 0 that increase"),
        ({"stages": [(5, 1.0), (6, 0.5)]}, "peaks that do not decrease"),
        ({"stages": []}, "at least one pair"),
        ({"penalty": "l2"}, "`penalty` must be one of 'l1', 'hoyer', 'density', got 'l2'"),
        ({"substitute": "gelu"}, "`activation` must be one of 'relu', .* got 'gelu'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveSparsity(**{"stages": STAGES, **arguments})


def test_checkpoint_with_another_penalty_or_activation_is_refused(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path, ProgressiveSparsity(STAGES))
    for arguments, name in (({"penalty": "hoyer"}, "penalty"), ({"substitute": "relu2"}, "substitute")):
        module = Smooth()
        with pytest.raises(ValueError, match=f"`{name}` of ProgressiveSparsity"):
            tiny.trainer([ProgressiveSparsity(STAGES, **arguments)], max_epochs=2).fit(module, ckpt_path=checkpoint)
        # the checkpoint's weights are in the model, and so is their activation
        assert type(module.net.blocks[0].act_fn) is nn.ReLU
    module = Smooth()
    _, other = saved(tmp_path / "other", ActivationSubstitution("relu"))
    with pytest.raises(ValueError, match="`activation` of ActivationSubstitution is 'relu2', but the checkpoint was"):
        tiny.trainer([ActivationSubstitution("relu2")], max_epochs=2).fit(module, ckpt_path=other)
