"""Sparsity that is absolute, exact after every step, saved, and gone without a trace except for the zeros."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim import optimizer as torch_optimizer

from lightning_reg import regularize
from lightning_reg.callbacks import SigmaReparam, WeightSparsity
from lightning_reg.pruning import Pruner, find_weights, pack, unpack
from lightning_reg.schedules import Constant, Cosine, Cubic, Linear, MultiStep, Schedule
from tests import tiny
from tests.test_engine import assert_untouched

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*`.fit.ckpt_path=.*` is called with.*"),
    pytest.mark.filterwarnings("ignore:.*Swapping scheduler.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*"),
]

METHODS: dict[str, dict[str, Any]] = {
    "cubic": {},
    "layer": {"scope": "layer"},
    "erk": {"scope": "erk", "schedule": "linear"},
    "random": {"method": "random", "schedule": "constant"},
    "random_growing": {"method": "random"},
    "rigl": {"method": "rigl", "schedule": "constant", "every": 2},
    "rigl_growing": {"method": "rigl", "every": 1},
    "two_four": {"pattern": "2:4"},
    "steps": {"schedule": MultiStep([2, 4, 6], [0.0, 2 / 7, 5 / 7, 1.0])},
}
ALL = pytest.mark.parametrize("method", METHODS)


def make(method: str, target: float = 0.7, **kwargs: Any) -> WeightSparsity:
    arguments = {**METHODS[method], **kwargs}
    return WeightSparsity(0.5 if "pattern" in arguments else target, **arguments)


def matrices(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.dim() > 1}


def zeros(module: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in matrices(module).values())


def size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in matrices(module).values())


class Watch(pl.Callback):
    """What it is told to see, after each batch."""

    def __init__(self, see: Any) -> None:
        self.see, self.seen = see, []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.seen.append(self.see(trainer, pl_module))


def trajectory(callback: WeightSparsity, module: pl.LightningModule | None = None, **kwargs: Any) -> list[int]:
    """Zeros after each batch."""
    watch = Watch(lambda trainer, pl_module: zeros(pl_module))
    tiny.fit(module or tiny.Tiny(), [callback, watch], **kwargs)
    return watch.seen


# --- how much, and when ----------------------------------------------------------------------------------------------


def test_targets_are_absolute_and_do_not_compound() -> None:
    # Lightning's ModelPruning makes 0.88 of 0.2, 0.5, 0.7
    n = size(tiny.Tiny())
    wanted = [0, 0.2, 0.2, 0.5, 0.5, 0.7, 0.7, 0.7]
    assert trajectory(make("steps")) == [round(share * n) for share in wanted]


def test_cubic_is_zhu_and_gupta_and_stays_at_its_end() -> None:
    # SparseML's goes past its end: 0.812 of 0.8; and its polynomial starts at twice the target
    n = size(tiny.Tiny(batches=12))
    seen = trajectory(WeightSparsity(0.8, begin=2, end=8), tiny.Tiny(batches=12))
    wanted = [0.8 + (0 - 0.8) * (1 - min(max((step - 2) / 6, 0), 1)) ** 3 for step in range(1, 13)]
    assert seen == [round(share * n) for share in wanted]


def test_linear_and_constant_and_fractions() -> None:
    n = size(tiny.Tiny())
    assert trajectory(WeightSparsity(0.8, schedule="linear", begin=0.25, end=0.75)) == [
        round(share * n) for share in (0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8)
    ]
    assert trajectory(WeightSparsity(0.8, schedule="constant", begin=3)) == [0] * 2 + [round(0.8 * n)] * 6
    assert trajectory(WeightSparsity(0.8, schedule="constant")) == [round(0.8 * n)] * 8


def test_masks_are_updated_every_so_often_and_once_more_at_the_end() -> None:
    n = size(tiny.Tiny(batches=10))
    seen = trajectory(WeightSparsity(0.8, schedule="linear", end=8, every=3), tiny.Tiny(batches=10))
    assert seen == [round(share * n) for share in (0, 0, 0.3, 0.3, 0.3, 0.6, 0.6, 0.8, 0.8, 0.8)]


def test_updates_are_counted_from_the_begin() -> None:
    n = size(tiny.Tiny(batches=10))
    seen = trajectory(WeightSparsity(0.8, schedule="linear", begin=1, end=9, every=4), tiny.Tiny(batches=10))
    assert seen == [round(share * n) for share in (0, 0, 0, 0, 0.4, 0.4, 0.4, 0.4, 0.8, 0.8)]


def test_schedule_that_ends_with_the_training_ends_at_the_target() -> None:
    module = tiny.Tiny()
    tiny.fit(module, [WeightSparsity(0.9, end=1.0, every=5)])
    assert zeros(module) == round(0.9 * size(module))


def test_steps_are_optimizer_steps_under_accumulation() -> None:
    n = size(tiny.Tiny())
    seen = trajectory(WeightSparsity(0.8, schedule="linear", end=4, every=1), accumulate_grad_batches=2)
    assert seen == [round(share * n) for share in (0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8)]


def test_named_schedule_does_not_fall_when_the_training_becomes_longer(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    tiny.fit(tiny.Tiny(), [WeightSparsity(0.8), keep], enable_checkpointing=True)
    n = size(tiny.Tiny())
    watch = Watch(lambda trainer, pl_module: zeros(pl_module))
    trainer = tiny.trainer([WeightSparsity(0.8), watch], max_epochs=3)
    trainer.fit(tiny.Tiny(), ckpt_path=tmp_path / "last.ckpt")
    assert watch.seen == [round(0.8 * n)] * 16


def test_schedule_that_falls_lets_weights_come_back() -> None:
    callback = WeightSparsity(0.8, schedule=Linear(1.0, 0.0, duration=8))
    held = Watch(lambda trainer, pl_module: sum(int(mask.sum()) for mask in callback._pruner.pruned.values()))
    module = tiny.Tiny()
    tiny.fit(module, [callback, held], max_epochs=2)
    assert held.seen == [round(0.8 * max(1 - step / 8, 0) * size(module)) for step in range(1, 17)]
    assert zeros(module) < 0.02 * size(module)


def test_constant_may_begin_behind_the_end_of_ramps() -> None:
    n = size(tiny.Tiny())
    assert trajectory(WeightSparsity(0.8, schedule="constant", begin=7)) == [0] * 6 + [round(0.8 * n)] * 2
    assert trajectory(WeightSparsity(0.8, schedule="constant", begin=0.875)) == [0] * 6 + [round(0.8 * n)] * 2


@ALL
def test_training_of_one_step_ends_at_the_target(method: str) -> None:
    module = tiny.Tiny()
    arguments = {"schedule": "constant"} if method == "steps" else {} if method == "rigl" else {"end": 0.25}
    callback = make(method, **arguments)
    tiny.fit(module, [callback], fast_dev_run=True)
    wanted = callback.target * size(module)
    assert abs(zeros(module) - wanted) <= (8 if callback.scope == "layer" else 0.5)


@ALL
def test_sparsity_is_the_target_at_the_end(method: str) -> None:
    module = tiny.Tiny()
    callback = make(method)
    tiny.fit(module, [callback])
    if callback.scope == "layer":
        for weight in matrices(module).values():
            assert (weight == 0).sum() == round(0.7 * weight.numel())
    else:
        assert zeros(module) == round(callback.target * size(module))


def test_erk_is_spread_by_erk_in_every_layer() -> None:
    module = tiny.Tiny()
    tiny.fit(module, [make("random")])
    weights = list(matrices(module).values())
    raw = np.array([sum(weight.shape) / weight.numel() for weight in weights])
    sizes = np.array([weight.numel() for weight in weights])
    densities = raw * 0.3 * sizes.sum() / (raw * sizes).sum()
    assert (densities < 1).all()
    for weight, density in zip(weights, densities, strict=True):
        assert abs(int((weight != 0).sum()) - density * weight.numel()) < 1


def test_random_masks_follow_seed_and_name_not_weights() -> None:
    def masks(seed: int, scale: float = 1.0, **kwargs: Any) -> dict[str, Tensor]:
        module = tiny.Tiny()
        with torch.no_grad():
            for weight in matrices(module).values():
                weight.mul_(scale).add_(torch.randn(weight.shape) * (scale - 1))
        tiny.fit(module, [make("random", scope="layer", seed=seed, **kwargs)])
        return {name: weight == 0 for name, weight in matrices(module).items()}

    one, name = masks(0), "net.blocks.{}.fc1.weight"
    for other in (masks(0, scale=3.0), masks(0, exclude="qkv")):
        assert torch.equal(other[name.format(0)], one[name.format(0)])
        assert torch.equal(other[name.format(1)], one[name.format(1)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert not torch.equal(masks(1)[name.format(0)], one[name.format(0)])


def test_live_zeros_do_not_take_the_place_of_pruned_ones() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    pruner = Pruner(find_weights(net))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(16.0, 0.0, -1.0).view(4, 4))
    pruner.prune(0.25)
    pruner.hold()
    before = pruner.pruned["0.weight"].clone()
    assert before[3].all()
    with torch.no_grad():
        net[0].weight[0] = 0.0  # earlier than the pruned ones, and as small
    pruner.prune(0.25)
    assert torch.equal(pruner.pruned["0.weight"], before)


def test_global_ranks_layers_against_each_other() -> None:
    module = tiny.Tiny()
    with torch.no_grad():
        module.net.blocks[0].fc1.weight *= 1e-6
    tiny.fit(module, [WeightSparsity(0.1, schedule="constant")])
    assert (module.net.blocks[0].fc1.weight == 0).sum() == round(0.1 * size(module))


# --- what a mask does to the training --------------------------------------------------------------------------------


class Checking(tiny.Tiny):
    """Compares its zeros after each optimizer step with the masks."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        (callback,) = [one for one in self.trainer.callbacks if isinstance(one, WeightSparsity)]
        for weight in callback._pruner.weights:
            pruned = callback._pruner.pruned.get(weight.key)
            if pruned is not None:
                held = weight.parameter[pruned]
                assert (held == 0).all()
                assert not held.signbit().any()
                self.checked = getattr(self, "checked", 0) + 1


@ALL
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lbfgs"])
def test_pruned_weights_are_zero_after_every_step(method: str, optimizer: str) -> None:
    module = Checking(optimizer=optimizer)
    tiny.fit(module, [make(method)])
    assert module.checked >= 8


class Optimizers(tiny.Tiny):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["cubic", "rigl", "rigl_growing"])
def test_optimizer_state_is_zero_where_weights_are_pruned(method: str, optimizer: str) -> None:
    callback = make(method, every=1)
    live = []

    def see(trainer: pl.Trainer, module: pl.LightningModule) -> int:
        seen = 0
        for weight in callback._pruner.weights:
            mask = callback._pruner.pruned.get(weight.key)
            for value in trainer.optimizers[0].state[weight.parameter].values():
                if mask is not None and value.shape == mask.shape:
                    assert (value[mask] == 0).all()
                    live.append((value[~mask] != 0).float().mean())
                    seen += 1
        return seen

    watch = Watch(see)
    tiny.fit(Optimizers(OPTIMIZERS[optimizer]), [callback, watch])
    assert watch.seen[-1] >= 8
    assert torch.stack(live).mean() > 0.9


def test_lbfgs_forgets_its_curvature_when_the_mask_changes() -> None:
    watch = Watch(lambda trainer, pl_module: len(trainer.optimizers[0].state))
    tiny.fit(tiny.Tiny(optimizer="lbfgs"), [WeightSparsity(0.7, end=4), watch])
    assert watch.seen == [0, 0, 0, 0, 1, 1, 1, 1]


class Restless(torch.optim.SGD):
    """Moves every weight, whatever its gradient, as Muon and optimizers with noise do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter += 0.01
        return loss


@pytest.mark.parametrize("module", [tiny.Tiny, tiny.Manual])
def test_zeros_are_held_against_any_optimizer(module: type) -> None:
    class Moved(module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Restless(self.parameters(), lr=0.05)

    trained = Moved()
    watch = Watch(lambda trainer, pl_module: zeros(pl_module))
    tiny.fit(trained, [WeightSparsity(0.7, schedule="constant"), watch])
    assert watch.seen == [round(0.7 * size(trained))] * 8


class Masked(tiny.Tiny):
    """The reference of static masks: torch's own pruning multiplies by them in forward."""

    def __init__(self, masks: dict[str, Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, mask in masks.items():
            prune.custom_from_mask(self.get_submodule(name.removesuffix(".weight")), "weight", mask)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 3}],
    ids=["plain", "clip", "clip_accumulate"],
)
def test_static_masks_train_as_masks_in_forward(settings: dict[str, Any], optimizer: str) -> None:
    settings = {**settings, "max_epochs": 3, "precision": "64-true"}
    module = tiny.Tiny(optimizer=optimizer)
    tiny.fit(module, [make("random")], **settings)
    masks = {name: weight != 0 for name, weight in matrices(module).items()}
    reference = Masked(masks, optimizer=optimizer)
    tiny.fit(reference, **settings)
    for name, mask in masks.items():
        used = reference.get_parameter(f"{name}_orig") * mask
        torch.testing.assert_close(module.get_parameter(name), used, rtol=0, atol=1e-12)
        assert not mask.all()
    for name, bias in module.named_parameters():
        if bias.dim() == 1:
            torch.testing.assert_close(bias, reference.get_parameter(name), rtol=0, atol=1e-12)


def handwritten_rigl(module: tiny.Tiny, masks: dict[str, np.ndarray], every: int, end: int) -> None:
    """RigL from Algorithm 1, in numpy, with SGD, accumulation over two batches and clipping."""
    optimizer = module.configure_optimizers()
    batches = list(module.train_dataloader())
    named = dict(module.named_parameters())
    for step in range(len(batches) // 2):
        optimizer.zero_grad()
        for batch in batches[2 * step : 2 * step + 2]:
            (module.loss(batch[0]) / 2).backward()
        for name, mask in masks.items():
            weight, gradient = named[name].detach().numpy(), named[name].grad.numpy()
            if step % every == 0 and 0 < step < end:
                active, inactive = np.flatnonzero(mask), np.flatnonzero(~mask)
                count = int(0.15 * (1 + math.cos(math.pi * step / end)) * len(active))
                drop = active[np.argsort(np.abs(weight.ravel()[active]), kind="stable")[:count]]
                grow = inactive[np.argsort(-np.abs(gradient.ravel()[inactive]), kind="stable")[:count]]
                mask.ravel()[drop], mask.ravel()[grow] = False, True
                weight[~mask] = 0
                optimizer.state[named[name]]["momentum_buffer"].numpy()[~mask] = 0
            gradient[~mask] = 0
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()


def test_rigl_equals_the_handwritten_loop() -> None:
    start = Pruner(find_weights(tiny.Tiny()), method="rigl")
    start.prune(0.7, at_random=True)
    masks = {key: ~mask.numpy() for key, mask in start.pruned.items()}
    first = {key: mask.copy() for key, mask in masks.items()}
    reference = tiny.Tiny(batches=24)
    with torch.no_grad():
        for name, mask in masks.items():
            reference.get_parameter(name)[torch.from_numpy(~mask)] = 0
    handwritten_rigl(reference, masks, every=2, end=9)
    module = tiny.Tiny(batches=24)
    callback = make("rigl", end=9)
    tiny.fit(module, [callback], accumulate_grad_batches=2, gradient_clip_val=0.1)
    for name, mask in masks.items():
        pruned = unpack(callback.state_dict()["masks"]["pruned"][name], mask.shape).numpy()
        assert np.array_equal(~pruned, mask)
    assert any((masks[key] != first[key]).any() for key in masks)
    assert tiny.distance(tiny.parameters(module), tiny.parameters(reference)) <= 1e-6


def test_survivors_and_biases_are_trained_and_stay_dense() -> None:
    module = tiny.Tiny(optimizer="adam")
    before = copy.deepcopy(module)
    tiny.fit(module, [WeightSparsity(0.6, schedule="constant")])
    for (_, trained), start in zip(module.named_parameters(), before.parameters(), strict=True):
        kept = trained != 0
        assert (trained != start)[kept].all()
        assert kept.all() == (trained.dim() == 1)


def test_mask_of_gradients_holds_for_the_clipped_norm() -> None:
    norms = []

    class Norm(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    tiny.fit(tiny.Tiny(), [WeightSparsity(0.9, schedule="constant"), Norm()], gradient_clip_val=1e-3)
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)
    assert norms


class NotFinite(tiny.Tiny):
    """Its fourth gradient is not finite, as under a loss scale that is too large; the weights survive."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.global_step == 4:
            optimizer.zero_grad()

    def on_after_backward(self) -> None:
        if self.global_step == 4:
            self.net.blocks[0].fc1.weight.grad[0, 0] = math.inf


def test_rigl_waits_for_gradients_that_are_finite() -> None:
    callback = make("rigl", every=4, end=8)
    watch = Watch(lambda trainer, module: {key: mask.clone() for key, mask in callback._pruner.pruned.items()})
    module = NotFinite()
    tiny.fit(module, [callback, watch])
    changed = [
        any(not torch.equal(before[key], after[key]) for key in before)
        for before, after in zip(watch.seen, watch.seen[1:], strict=False)
    ]
    assert changed == [False, False, False, False, True, False, False]
    assert tiny.parameters(module).isfinite().all()


class TwoSteps(tiny.Adversarial):
    """Two optimizers in a batch; each finds the weights of both sparse after its step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            assert not optimizer.optimizer._optimizer_step_pre_hooks
        if self.global_step > 2:
            assert zeros(self) > 0


@pytest.mark.parametrize("module", [tiny.Manual, tiny.Adversarial, TwoSteps])
@pytest.mark.parametrize("method", ["cubic", "random", "rigl"])
def test_manual_optimization(method: str, module: type) -> None:
    trained = module()
    before = None
    callback = make(method, end=4)
    watch = Watch(lambda trainer, module: {key: mask.clone() for key, mask in callback._pruner.pruned.items()})
    tiny.fit(trained, [callback, watch])
    assert zeros(trained) == round(0.7 * size(trained))
    if method == "rigl" and module is not tiny.Manual:
        before, after = watch.seen[0], watch.seen[-1]
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        assert any(key.startswith("net.") for key in moved)
        assert any(key.startswith("other.") for key in moved)


class OneBackward(tiny.Tiny):
    """One backward for as many optimizers as it has: the second steps with gradients that the first has seen."""

    def __init__(self, optimizers: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count = optimizers

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        blocks = [list(block.parameters()) for block in self.net.blocks]
        groups = blocks if self.count == 2 else [[*blocks[0], *blocks[1]]]
        return [torch.optim.SGD(group, lr=0.05, momentum=0.5) for group in groups]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = [self.optimizers()] if self.count == 1 else self.optimizers()
        self.manual_backward(self.loss(batch[0]))
        for optimizer in optimizers:
            optimizer.step()
        self.zero_grad()


def test_rigl_with_two_optimizers_equals_rigl_with_one() -> None:
    one, two = OneBackward(1), OneBackward(2)
    tiny.fit(one, [make("rigl", every=2, end=6)])
    tiny.fit(two, [make("rigl", every=4, end=12)])  # two steps a batch
    assert torch.equal(tiny.parameters(one), tiny.parameters(two))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("method", ["cubic", "rigl", "two_four"])
def test_precisions(method: str, precision: str) -> None:
    module = tiny.Tiny()
    tiny.fit(module, [make(method)], precision=precision)
    assert zeros(module) == round((0.5 if method == "two_four" else 0.7) * size(module))


@pytest.mark.parametrize("method", ["cubic", "rigl"])
def test_compiled_blocks_train_as_eager_ones(method: str) -> None:
    eager, compiled = tiny.Tiny(), tiny.Tiny()
    for block in compiled.net.blocks:
        block.compile(backend="aot_eager")
    wanted = tiny.fit(eager, [make(method)])
    assert tiny.distance(tiny.fit(compiled, [make(method)]), wanted) <= 1e-6
    assert zeros(compiled) == zeros(eager)


# --- off switch, life, checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name != "two_four"])
def test_target_zero_is_bit_identical_to_no_callback(method: str) -> None:
    without = tiny.fit(tiny.Tiny(optimizer="adam"))
    assert torch.equal(tiny.fit(tiny.Tiny(optimizer="adam"), [make(method, 0.0)]), without)
    assert not torch.equal(tiny.fit(tiny.Tiny(optimizer="adam"), [make(method)]), without)


def test_before_the_schedule_begins_nothing_is_changed() -> None:
    late = WeightSparsity(0.9, begin=100, end=200)
    with pytest.warns(UserWarning, match="ends after the training"):
        trained = tiny.fit(tiny.Tiny(), [late])
    assert torch.equal(trained, tiny.fit(tiny.Tiny()))


def assert_gone(module: pl.LightningModule, optimizer: torch.optim.Optimizer, callback: WeightSparsity) -> None:
    assert_untouched(module)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert callback._pruner is None
    assert callback.sparsities() == {}
    assert not any(parametrize.is_parametrized(part) for part in module.modules())


@ALL
def test_nothing_but_zeros_is_left_on_the_model(method: str) -> None:
    module, plain = tiny.Tiny(), tiny.Tiny()
    callback = make(method)
    identities = [id(parameter) for parameter in module.parameters()]
    trainer = tiny.trainer([callback])
    trainer.fit(module)
    tiny.fit(plain)
    assert_gone(module, trainer.optimizers[0], callback)
    assert set(module.__dict__) == set(plain.__dict__)
    assert [id(parameter) for parameter in module.parameters()] == identities
    assert [name for name, _ in module.named_buffers()] == []


class Crash(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 5:
            raise OSError("crash")


@pytest.mark.parametrize("method", ["cubic", "rigl"])
def test_crash_leaves_plain_weights_and_the_next_fit_is_like_any(method: str) -> None:
    module, twin = tiny.Tiny(), tiny.Tiny()
    callback = make(method)
    trainer = tiny.trainer([callback, Crash()])
    with pytest.raises(OSError, match="crash"):
        trainer.fit(module)
    assert_gone(module, trainer.optimizers[0], callback)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(tiny.fit(module, [callback]), tiny.fit(twin, [make(method)]))


@ALL
def test_two_fits_are_two_trainings(method: str) -> None:
    module, twin = tiny.Tiny(), tiny.Tiny()
    callback = make(method)
    tiny.fit(module, [callback])
    tiny.fit(twin, [make(method)])
    assert torch.equal(tiny.fit(module, [callback]), tiny.fit(twin, [make(method)]))


@pytest.mark.parametrize("method", ["cubic", "random", "rigl", "two_four"])
def test_the_same_trainer_goes_on_with_the_same_zeros(method: str) -> None:
    module = tiny.Tiny()
    trainer = tiny.trainer([make(method, end=6) if method != "random" else make(method)])
    trainer.fit(module)
    before = [weight == 0 for weight in matrices(module).values()]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)
    assert trainer.global_step == 16
    assert all(torch.equal(mask, weight == 0) for mask, weight in zip(before, matrices(module).values(), strict=True))


class ByStep(tiny.Tiny):
    """Its batches follow from the step: a loader without state starts again in the middle of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(torch.randn(batch[0].shape, generator=torch.Generator().manual_seed(self.global_step)))


@ALL
@pytest.mark.parametrize("step", [3, 4, 6, 12])
def test_resumed_training_equals_uninterrupted_bit_for_bit(method: str, step: int, tmp_path: Path) -> None:
    def run(checkpoint: Path | None = None) -> tuple[pl.LightningModule, WeightSparsity, list[int]]:
        torch.manual_seed(0)
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = ByStep(optimizer="adam")
        callback = make(method)
        watch = Watch(lambda trainer, pl_module: zeros(pl_module))
        settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        tiny.trainer([callback, watch, keep], **settings).fit(module, ckpt_path=checkpoint)
        return module, callback, watch.seen

    whole, masks, seen = run()
    path = tmp_path / f"step={step}.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert sum(int((saved[name] == 0).sum()) for name in matrices(whole)) == seen[step - 1]
    resumed, resumed_masks, resumed_seen = run(path)
    assert resumed_seen == seen[step:]
    assert torch.equal(tiny.parameters(resumed), tiny.parameters(whole))
    state, wanted = resumed_masks.state_dict(), masks.state_dict()
    assert state["masks"]["pruned"].keys() == wanted["masks"]["pruned"].keys()
    assert all(torch.equal(state["masks"]["pruned"][key], mask) for key, mask in wanted["masks"]["pruned"].items())


def test_resumed_training_keeps_the_mask_not_only_the_zeros(tmp_path: Path) -> None:
    # ModelPruning forgets it: 0.88 becomes 0.000 after one epoch
    keep = ModelCheckpoint(tmp_path, filename="last")
    tiny.fit(tiny.Tiny(), [WeightSparsity(0.7, schedule="constant"), keep], enable_checkpointing=True)
    module = tiny.Tiny()
    frozen = Watch(lambda trainer, pl_module: [weight == 0 for weight in matrices(pl_module).values()])
    trainer = tiny.trainer([WeightSparsity(0.7, schedule="constant"), frozen], max_epochs=4)
    trainer.fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert len(frozen.seen) == 24
    assert all(torch.equal(a, b) for seen in frozen.seen for a, b in zip(seen, frozen.seen[0], strict=True))


@ALL
def test_checkpoint_is_that_of_the_plain_model_and_loads_without_the_library(method: str, tmp_path: Path) -> None:
    module = tiny.Tiny()
    keep = ModelCheckpoint(tmp_path, filename="last")
    tiny.fit(module, [make(method), keep], enable_checkpointing=True)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = tiny.Tiny()
    assert list(checkpoint["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(checkpoint["state_dict"])
    assert zeros(plain) == zeros(module) > 0
    (masks,) = [state["masks"] for key, state in checkpoint["callbacks"].items() if "WeightSparsity" in key]
    assert all(packed.dtype == torch.uint8 for packed in masks["pruned"].values())
    assert sum(packed.numel() for packed in masks["pruned"].values()) <= size(module) / 8


def test_checkpoint_saved_after_the_fit_holds_the_masks(tmp_path: Path) -> None:
    module = tiny.Tiny()
    trainer = tiny.trainer([make("rigl", end=6)])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = tiny.Tiny()
    resumed = tiny.trainer([make("rigl", end=6)], max_epochs=2)
    resumed.fit(again, ckpt_path=tmp_path / "after.ckpt")
    for before, after in zip(matrices(module).values(), matrices(again).values(), strict=True):
        assert torch.equal(before == 0, after == 0)
        assert not torch.equal(before, after)


def test_checkpoint_of_a_dense_training_starts_where_the_schedule_is(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    tiny.fit(tiny.Tiny(), [keep], enable_checkpointing=True)
    seen = Watch(lambda trainer, pl_module: zeros(pl_module))
    module = tiny.Tiny()
    trainer = tiny.trainer([WeightSparsity(0.8, end=8), seen], max_epochs=2)
    trainer.fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert seen.seen == [round(0.8 * size(module))] * 8


def test_packed_masks_come_back() -> None:
    for shape in [(1,), (7,), (8,), (3, 5, 7), (0, 4)]:
        mask = torch.rand(shape) > 0.5
        packed = pack(mask)
        assert packed.numel() == math.ceil(mask.numel() / 8)
        assert torch.equal(unpack(packed, shape), mask)


def test_learning_rate_finder_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    class Tunable(tiny.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 1e-3

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)

    module = Tunable()
    callback = make("rigl")
    trainer = tiny.trainer([callback], default_root_dir=tmp_path, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.tuner.Tuner(trainer).lr_find(module, num_training=6)
    assert zeros(module) == 0
    trainer.fit(module)
    assert zeros(module) == round(0.7 * size(module))


# --- what is pruned --------------------------------------------------------------------------------------------------


class Zoo(tiny.Tiny):
    """Every kind of layer, a tied pair, and a head tied to the embedding."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.net = nn.Identity()
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.conv = nn.Conv2d(8, 4, 3, padding=1)
        self.back = nn.ConvTranspose2d(4, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.c_attn = Conv1D(8, 8)
        self.wide = Conv1D(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)) + self.head(x).softmax(-1) @ self.embedding.weight
        x = x + self.back(self.conv(x.mT.unsqueeze(-1))).squeeze(-1).mT
        x = x + self.c_attn(self.norm(x)) + self.wide(x).mean(-1, keepdim=True)
        return x + self.attention(x, x, x, need_weights=False)[0]


PRUNED = {
    "first.weight", "conv.weight", "back.weight", "c_attn.weight", "wide.weight", "attention.in_proj_weight",
    "attention.out_proj.weight",
}  # fmt: skip


def pruned(module: nn.Module) -> set[str]:
    return {
        name for name, parameter in module.named_parameters() if bool((parameter == 0).any()) and "bias" not in name
    }


def test_every_layer_is_pruned_but_embeddings_norms_and_biases() -> None:
    module = Zoo()
    biases = {name: p.detach().clone() for name, p in module.named_parameters() if p.dim() == 1}
    tiny.fit(module, [WeightSparsity(0.6, scope="layer")])
    assert pruned(module) == PRUNED
    for name in PRUNED:
        weight = module.get_parameter(name)
        assert (weight == 0).sum() == round(0.6 * weight.numel())
    assert module.second.weight is module.first.weight
    assert module.head.weight is module.embedding.weight
    for name, before in biases.items():
        assert torch.equal(module.get_parameter(name) == 0, before == 0) or (module.get_parameter(name) != 0).all()


def test_targets_and_exclude_name_the_same_things() -> None:
    module = Zoo()
    tiny.fit(module, [WeightSparsity(0.6, scope="layer", exclude=[nn.MultiheadAttention, "out_proj", "c_attn|wide"])])
    assert pruned(module) == {"first.weight", "conv.weight", "back.weight"}
    module = Zoo()
    tiny.fit(
        module, [WeightSparsity(0.6, scope="layer", targets=["head", nn.Conv2d, lambda name, _: name == "second"])]
    )
    assert pruned(module) == {"embedding.weight", "conv.weight", "first.weight"}
    module = Zoo()
    tiny.fit(module, [WeightSparsity(0.6, scope="layer", exclude="second", targets=nn.Linear)])
    assert pruned(module) == {"embedding.weight", "attention.out_proj.weight"}


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_n_m_runs_along_the_input_of_every_layer(method: str) -> None:
    module = Zoo()
    tiny.fit(module, [WeightSparsity(0.5, pattern="2:4", method=method)])
    assert pruned(module) == PRUNED
    by_input = {
        "first.weight": module.first.weight,
        "conv.weight": module.conv.weight.movedim(1, -1),
        "back.weight": module.back.weight.movedim(0, -1),
        "c_attn.weight": module.c_attn.weight.T,
        "wide.weight": module.wide.weight.T,
        "attention.in_proj_weight": module.attention.in_proj_weight,
        "attention.out_proj.weight": module.attention.out_proj.weight,
    }
    for weight in by_input.values():
        assert ((weight == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_n_m_grows_to_its_pattern() -> None:
    module = tiny.Tiny()
    n = size(module)
    most = Watch(
        lambda trainer, pl_module: max(
            int((weight == 0).unflatten(-1, (-1, 4)).sum(-1).max()) for weight in matrices(pl_module).values()
        )
    )
    watch = Watch(lambda trainer, pl_module: zeros(pl_module))
    tiny.fit(module, [WeightSparsity(0.5, pattern="2:4", schedule="linear", end=6), watch, most])
    assert watch.seen == [round(0.5 * min(step / 6, 1) * n) for step in range(1, 9)]
    assert max(most.seen) == 2


def test_wide_pattern_takes_a_rounded_target() -> None:
    module = tiny.Tiny()
    tiny.fit(module, [WeightSparsity(0.875, pattern="1:8", schedule="constant")])
    assert zeros(module) == 7 * size(module) // 8


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("method", ["cubic", "random", "rigl", "two_four"])
def test_with_sigma_reparam_the_raw_weight_is_pruned(method: str, first: bool) -> None:
    module = tiny.Tiny(optimizer="adam")
    callbacks: list[pl.Callback] = [SigmaReparam(), make(method)]

    def in_use(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        return sum(int((part.weight == 0).sum()) for part in pl_module.modules() if isinstance(part, nn.Linear))

    watch = Watch(in_use)
    tiny.fit(module, [*(callbacks if first else callbacks[::-1]), watch])
    wanted = round((0.5 if method == "two_four" else 0.7) * size(module))
    assert watch.seen[-1] == wanted
    assert zeros(module) == wanted  # merged


def test_with_sigma_reparam_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def run(checkpoint: Path | None = None) -> Tensor:
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks = [SigmaReparam(), make("rigl"), keep]
        module = tiny.Tiny(optimizer="adam")
        tiny.trainer(callbacks, max_epochs=2, enable_checkpointing=True).fit(module, ckpt_path=checkpoint)
        return tiny.parameters(module)

    assert torch.equal(run(), run(tmp_path / "step=8.ckpt"))


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("method", ["cubic", "rigl"])
def test_averaged_copies_are_as_sparse_as_the_model(method: str, first: bool, tmp_path: Path) -> None:
    module = tiny.Tiny()
    average = EMAWeightAveraging(decay=0.9)
    keep = ModelCheckpoint(tmp_path, filename="last")
    pair = [make(method), average]
    tiny.fit(module, [*(pair if first else pair[::-1]), keep], enable_checkpointing=True)
    assert zeros(module) == round(0.7 * size(module))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys()
    for name in matrices(module):
        averaged, current = saved["state_dict"][name], saved["current_model_state"][name]
        assert torch.equal(averaged == 0, current == 0)
        assert not torch.equal(averaged, current)


def test_stochastic_weight_averaging_keeps_the_zeros() -> None:
    module = tiny.Tiny()
    tiny.fit(module, [make("cubic"), StochasticWeightAveraging(1e-2, swa_epoch_start=1)], max_epochs=3)
    assert zeros(module) == round(0.7 * size(module))


def test_two_instances_prune_two_parts() -> None:
    module = tiny.Tiny()
    parts = [
        WeightSparsity(0.25 * (i + 1), targets=rf".*blocks\.{i}\..*", scope="layer", name=f"part{i}") for i in (0, 1)
    ]
    tiny.fit(module, parts)
    for i, block in enumerate(module.net.blocks):
        assert zeros(block) == 0.25 * (i + 1) * size(block)
    overlap = [WeightSparsity(0.5, name="a"), WeightSparsity(0.5, name="b", targets="fc1")]
    with pytest.raises(ValueError, match="`targets` of 'b' and 'a' both select 'net.blocks.0.fc1'"):
        tiny.fit(tiny.Tiny(), overlap)


# --- logs ------------------------------------------------------------------------------------------------------------


def test_value_target_and_layers_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = tiny.Tiny()
    tiny.fit(module, [WeightSparsity(0.8, schedule="linear", end=8, every=4)], logger=logger, log_every_n_steps=2)
    logger.save()
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    layers = {f"reg/weight_sparsity/layers/{name.removesuffix('.weight')}" for name in matrices(module)}
    assert layers == {name for name in names if "/layers/" in name}

    def column(name: str) -> list[float]:
        return [float(row.split(",")[names.index(name)]) for row in rows if row.split(",")[names.index(name)]]

    n = size(module)
    assert column("reg/weight_sparsity/target") == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert column("reg/weight_sparsity/value") == pytest.approx(
        [0, round(0.4 * n) / n, round(0.4 * n) / n, round(0.8 * n) / n]
    )
    for name, weight in matrices(module).items():
        logged = column(f"reg/weight_sparsity/layers/{name.removesuffix('.weight')}")
        assert logged[-1] == pytest.approx((weight == 0).double().mean().item())
    assert "reg/weight_sparsity/target: 0.8" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_sparsities_are_those_of_the_weights() -> None:
    callback = make("cubic")
    watch = Watch(lambda trainer, module: (callback.sparsities(), {n: w.clone() for n, w in matrices(module).items()}))
    tiny.fit(tiny.Tiny(), [callback, watch])
    for shares, weights in watch.seen:
        assert {f"{name}.weight" for name in shares} == set(weights)
        for name, share in shares.items():
            assert share == (weights[f"{name}.weight"] == 0).double().mean().float()


# --- a hand-written loop ---------------------------------------------------------------------------------------------


def loop(net: nn.Module, callback: WeightSparsity, make_optimizer: Any, batches: int = 8) -> Any:
    with regularize(net, [callback]) as reg:
        optimizer = make_optimizer(net.parameters())
        for (x,) in tiny.loader(batches):
            optimizer.zero_grad()
            reg.add((net(x) - x.roll(1, 1)).square().mean()).backward()
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("method", METHODS)
def test_hand_written_loop_equals_the_trainer(method: str) -> None:
    times = {"every": 2} if method == "steps" else {"end": 6, "every": 2}
    module, net = tiny.Tiny(), tiny.Tiny()
    tiny.fit(module, [make(method, **times)])
    callback = make(method, **times)
    optimizer = loop(net, callback, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5))
    assert torch.equal(tiny.parameters(net), tiny.parameters(module))
    assert zeros(net) > 0
    assert callback._pruner is None
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_hand_written_loop_without_regularize_knows_its_length() -> None:
    net = tiny.Tiny().net
    callback = WeightSparsity(0.8, end=0.5)
    callback.attach(net, total_steps=8)
    optimizer = torch.optim.AdamW(net.parameters())
    stranger = nn.Linear(2, 2)
    other = torch.optim.SGD(stranger.parameters(), lr=0.1)
    for (x,) in tiny.loader(4):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        callback.after_step(net)
        stranger(torch.ones(2)).sum().backward()
        other.step()
    assert zeros(net) == round(0.8 * size(net))
    for weight in matrices(net).values():
        (state,) = [s for p, s in optimizer.state.items() if p.data_ptr() == weight.data_ptr()]
        assert (state["exp_avg"][weight == 0] == 0).all()
    callback.attach(net, total_steps=8)  # once more: the first one is let go
    assert len(torch_optimizer._global_optimizer_pre_hooks) == 1
    callback.detach(net)
    callback.detach(net)
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert zeros(net) == round(0.8 * size(net))


def test_fractions_without_a_length_are_refused_and_nothing_is_left() -> None:
    net = tiny.Tiny().net
    with pytest.raises(ValueError, match="`end=0.75` is a fraction of training, but the number of training steps is"):
        loop(net, WeightSparsity(0.8, every=1), None)
    assert zeros(net) == 0
    assert not torch_optimizer._global_optimizer_pre_hooks


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5, math.nan, True, "0.5", None])
def test_target_outside_its_range_is_refused(target: Any) -> None:
    with pytest.raises(ValueError, match=r"`target` must be a share of zeros in \[0, 1\), got .*: 0.9 prunes nine"):
        WeightSparsity(target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "snip"}, "`method` must be one of 'magnitude', 'random', 'rigl', got 'snip'"),
        ({"scope": "block"}, "`scope` must be one of 'global', 'layer', 'erk', got 'block'"),
        ({"schedule": "sine"}, "`schedule` must be one of 'cubic', 'linear', 'constant' or a Schedule, got 'sine'"),
        ({"schedule": "multistep"}, r"got 'multistep'. For steps give `lightning_reg.schedules.MultiStep\(milestones"),
        ({"pattern": "2-4"}, "`pattern` must be 'n:m' with 0 < n < m, got '2-4'"),
        ({"pattern": "4:2"}, "`pattern` must be 'n:m' with 0 < n < m, got '4:2'"),
        ({"pattern": "0:4"}, "`pattern` must be 'n:m' with 0 < n < m, got '0:4'"),
        ({"pattern": 124}, "`pattern` must be 'n:m' .* got 124: .* YAML needs the quotes"),
        ({"pattern": "1:4"}, "`target` must be 0.75 with `pattern='1:4'`, got 0.5"),
        ({"pattern": "2:4", "method": "rigl"}, "`pattern='2:4'` fixes the density .* got method='rigl'"),
        ({"pattern": "2:4", "scope": "erk"}, "`pattern='2:4'` fixes the density .* got scope='erk'"),
        ({"begin": -1}, "`begin` must be >= 0"),
        ({"end": 1.5}, "`end` as a fraction of training must be <= 1"),
        ({"begin": 10, "end": 10}, "`end` must be after `begin`, got begin=10 and end=10"),
        ({"begin": 0.5, "end": 0.25}, "`end` must be after `begin`, got begin=0.5 and end=0.25"),
        ({"every": 0}, "`every` must be > 0, got 0"),
        ({"regrow": 1.5}, r"`regrow` must be in \[0, 1\], got 1.5"),
        ({"seed": -1}, r"`seed` must be an integer in \[0, 2\^31\), got -1"),
        ({"name": ""}, "`name` must not be empty"),
        ({"schedule": Cosine(), "end": 9}, "`begin=0` and `end=9` belong to a named schedule, got a Cosine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSparsity(0.5, **arguments)


def test_schedule_must_be_callable() -> None:
    with pytest.raises(TypeError, match="`schedule` must be a name or a Schedule that follows from the step, got 0.5"):
        WeightSparsity(0.5, schedule=0.5)  # type: ignore[arg-type]


def refused(module: pl.LightningModule, callback: WeightSparsity, message: str, **kwargs: Any) -> None:
    """The fit raises, and neither module nor torch is changed."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        tiny.fit(module, [callback], **kwargs)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert_untouched(module)
    assert callback._pruner is None


class Nothing(tiny.Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LayerNorm(8)


class Frozen(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight


class Parametrized(tiny.Tiny):
    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.net.blocks[0].fc1, "weight", Frozen())


def test_what_cannot_be_pruned_is_named() -> None:
    refused(Nothing(), WeightSparsity(0.5), "`targets` and `exclude` leave nothing to prune")
    refused(tiny.Tiny(), WeightSparsity(0.5, exclude=nn.Linear), "`targets` and `exclude` leave nothing to prune")
    refused(tiny.Tiny(), WeightSparsity(0.5, targets="fc3"), "`targets` entry 'fc3' matches no module")
    refused(tiny.Tiny(), WeightSparsity(0.5, exclude="fc3"), "`exclude` entry 'fc3' matches no module")
    refused(
        Parametrized(), WeightSparsity(0.5, targets="fc1"), "selects 'net.blocks.0.fc1', whose weight is parametrized"
    )
    module = Parametrized()
    tiny.fit(module, [WeightSparsity(0.5)])
    assert zeros(module.net.blocks[0].fc1) == 0


def test_sharded_weights_are_refused() -> None:
    module = tiny.Tiny()
    module.net.blocks[1].fc2.weight.full_tensor = lambda: None  # what tells a DTensor
    with pytest.raises(RuntimeError, match=r"The weight of 'net.blocks.1.fc2' is sharded; .* or `DDPStrategy`"):
        tiny.fit(module, [WeightSparsity(0.5)])
    assert zeros(module) == 0


def test_layers_that_a_pattern_does_not_fit_are_named() -> None:
    message = r"`pattern='3:5'` needs .* 5 divides, got 'net.blocks.0.attention.qkv' \(8 inputs\).*'net.blocks.1.fc2'"
    refused(tiny.Tiny(), WeightSparsity(0.4, pattern="3:5"), message)


def test_factor_above_one_is_refused() -> None:
    message = "`schedule` must give factors in .* got 2 at step 8. Raise `target`"
    refused(tiny.Tiny(), WeightSparsity(0.5, schedule=Constant(2.0)), message)


def test_times_that_cross_in_this_training_are_refused() -> None:
    message = "`end` must be after `begin`, got begin=6 and end=0.5, which are the steps 6 and 4 of 8"
    refused(tiny.Tiny(), WeightSparsity(0.5, begin=6, end=0.5), message)


def test_unknown_length_of_training_is_refused_for_fractions() -> None:
    refused(tiny.Tiny(), WeightSparsity(0.5), "number of training steps is unknown", max_epochs=-1)


def test_steps_need_no_length_of_training() -> None:
    module = tiny.Tiny()
    tiny.fit(module, [WeightSparsity(0.5, end=4, every=1)], max_epochs=-1, max_time={"seconds": 1})
    assert zeros(module) == round(0.5 * size(module))


@pytest.mark.parametrize("schedule", ["cubic", Cubic(0.0, 1.0, duration=16)], ids=["named", "object"])
def test_schedule_that_ends_after_the_training_warns_with_numbers(schedule: str | Schedule) -> None:
    named = {"end": 16} if schedule == "cubic" else {}
    with pytest.warns(UserWarning, match=r"its end, step 8, the sparsity is 0.7 of 0.8. Set an earlier `end`"):
        tiny.fit(tiny.Tiny(), [WeightSparsity(0.8, schedule=schedule, **named)])


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"target": 0.6}, "target"),
        ({"target": 0.5, "method": "random"}, "method"),
        ({"target": 0.5, "scope": "layer"}, "scope"),
        ({"target": 0.5, "pattern": "2:4"}, "pattern"),
        ({"target": 0.5, "seed": 1}, "seed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_checkpoint_of_another_definition_is_refused(arguments: dict, argument: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    tiny.fit(tiny.Tiny(), [WeightSparsity(0.5), keep], enable_checkpointing=True)
    module = tiny.Tiny()
    callback = WeightSparsity(**arguments)
    message = f"`{argument}` of WeightSparsity .* but the checkpoint was trained with .*: set `{argument}="
    with pytest.raises(ValueError, match=message):
        tiny.trainer([callback], max_epochs=2).fit(module, ckpt_path=tmp_path / "last.ckpt")
    assert_untouched(module)
    assert callback._pruner is None


def test_checkpoint_whose_masks_do_not_fit_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="last")
    tiny.fit(tiny.Tiny(), [WeightSparsity(0.5), keep], enable_checkpointing=True)
    path = tmp_path / "last.ckpt"

    def resume(callback: WeightSparsity, message: str) -> None:
        module = tiny.Tiny()
        with pytest.raises(ValueError, match=message):
            tiny.trainer([callback], max_epochs=2).fit(module, ckpt_path=path)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())

    resume(
        WeightSparsity(0.5, exclude="fc1"), "fc1.weight' is pruned in the checkpoint, not in the model: set `targets`"
    )
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [state for key, state in checkpoint["callbacks"].items() if "WeightSparsity" in key]
    shape = state["masks"]["shapes"].pop("net.blocks.0.fc1.weight")
    torch.save(checkpoint, path)
    resume(
        WeightSparsity(0.5), "fc1.weight' is pruned in the model, not in the checkpoint: set `targets` and `exclude`"
    )
    state["masks"]["shapes"]["net.blocks.0.fc1.weight"] = [shape[0], shape[1] + 1]
    torch.save(checkpoint, path)
    resume(
        WeightSparsity(0.5),
        r"The mask of 'net.blocks.0.fc1.weight' has shape \(16, 9\) in the checkpoint, but the weight has \(16, 8\)",
    )


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharded_strategies_are_refused(strategy: type, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = WeightSparsity(0.5)
    trainer = tiny.trainer([callback])
    monkeypatch.setattr(type(trainer), "strategy", strategy())
    with pytest.raises(RuntimeError, match=f"WeightSparsity does not work with {strategy.__name__}: .*`DDPStrategy`"):
        callback.setup(trainer, tiny.Tiny(), "fit")
