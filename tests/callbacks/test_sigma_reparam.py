"""sigma-Reparam in a Trainer: the weights in use, their gradients, optimizers, checkpoints, and leaving no trace."""

import copy
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize
from torch.optim import lr_scheduler

from lightning_reg import regularize
from lightning_reg.callbacks import (
    SigmaReparam,
    apply_sigma_reparam,
    fold_checkpoint,
    merge_sigma_reparam,
    update_sigma_reparam,
)
from lightning_reg.functional import spectral_norm
from lightning_reg.reparam import SpectralParametrization
from tests import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*You're resuming from a checkpoint that ended before the epoch ended.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*(JsonargparseDeprecationWarning|was deprecated in v4)"),
    pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter is intended.*"),
    pytest.mark.filterwarnings("ignore:.*use_distributed_sampler.*"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*"),
    pytest.mark.filterwarnings("ignore:.*overrides the configure_model.*"),
]


# --- models and helpers ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """All of nn.MultiheadAttention: packed, and with separate weights for keys of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.packed(x, x, x, need_weights=False)[0]
        return x + self.cross(x, x[..., :5], x[..., :6], need_weights=False)[0]


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


class Watch(pl.Callback):
    """Sees the model in the middle of training, after SigmaReparam."""

    def __init__(self, see: Any) -> None:
        self.see, self.seen = see, []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.seen.append(self.see(trainer, pl_module))


class Lit(tiny.Tiny):
    """Net of linear layers; `built` says where, `decay` is the weight decay of one AdamW group."""

    def __init__(self, built: str = "init", decay: float = 0.1, checkpointing: bool | None = None) -> None:
        super().__init__(use_reentrant=checkpointing)
        self.built, self.decay = built, decay
        if built != "init":
            self.net = None

    def _build(self, where: str) -> None:
        if self.built == where and self.net is None:
            torch.manual_seed(0)
            self.net = tiny.Net()

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=self.decay)


def spectral(model: nn.Module) -> dict[str, Any]:
    """Parametrization lists by name."""
    return {
        f"{name}.{tensor}": container
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for tensor, container in module.parametrizations.items()
    }


def in_use(model: nn.Module, key: str) -> Tensor:
    name, _, tensor = key.rpartition(".")
    return getattr(model.get_submodule(name), tensor)


def gains(sigma: SigmaReparam) -> Tensor:
    return torch.cat(list(sigma.spectral_norms().values()))


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        [type(module) for module in model.modules()],
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
        list(model.state_dict()),
        [len(module._state_dict_hooks) + len(module._load_state_dict_pre_hooks) for module in model.modules()],
        sorted(key for key in model.__dict__ if key in ("setup", "configure_model")),
    )  # fmt: skip


def checkpointed(directory: Path, **kwargs: Any) -> dict[str, Any]:
    saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1, **kwargs)
    return {"callbacks": [saver], "enable_checkpointing": True}


def fit(module: pl.LightningModule, *callbacks: pl.Callback, ckpt: Any = None, **kwargs: Any) -> pl.Trainer:
    trainer = tiny.trainer([*callbacks, *kwargs.pop("callbacks", [])], **kwargs)
    trainer.fit(module, ckpt_path=ckpt)
    return trainer


def networks() -> dict[str, tuple[nn.Module, Tensor, int]]:
    """Model, input, number of weights to reparametrize."""
    import timm
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
    )
    gpt = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10, n_positions=8))
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 2))
    return {
        "timm": (vit, torch.randn(2, 3, 32, 32), 6),
        "encoder": (encoder, torch.randn(2, 5, 8), 4),
        "gpt2": (gpt, torch.randint(10, (2, 5)), 4),
        "conv": (conv, torch.randn(2, 3, 8, 8), 3),
        "attention": (Attention(), torch.randn(2, 5, 8), 6),
    }


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result.last_hidden_state


# --- attach and merge ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm", "encoder", "gpt2", "conv", "attention"])
def test_function_is_preserved_every_gain_trains_and_merge_is_exact(name: str) -> None:
    model, x, count = networks()[name]
    model.eval()
    wanted, before = output(model, x), snapshot(model)
    apply_sigma_reparam(model)
    assert len(spectral(model)) == count
    model.train()
    assert all(torch.equal(in_use(model, key), container.original) for key, container in spectral(model).items())
    model.eval()
    assert (output(model, x) - wanted).abs().max() <= 1e-6
    model.train()
    output(model, x).square().mean().backward()
    for container in spectral(model).values():
        assert container[0].gain.grad.abs().sum() > 0
        container[0].gain.data.mul_(1.5)
    torch.manual_seed(0)
    (output(model, x) - 1).square().mean().backward()
    model.eval()
    wanted, weights = output(model, x), {key: in_use(model, key).clone() for key in spectral(model)}
    merge_sigma_reparam(model)
    assert snapshot(model) == before
    assert torch.equal(output(model, x), wanted)
    for key, weight in weights.items():
        assert torch.equal(model.get_parameter(key), weight)


def test_init_one_gives_spectral_norm_one() -> None:
    model = tiny.Net()
    apply_sigma_reparam(model, init="one")
    for block in model.blocks:
        assert spectral_norm(block.fc1.weight).item() == pytest.approx(1.0, rel=1e-5)
        for part in block.attention.qkv.weight.chunk(3):
            assert spectral_norm(part).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("fused_qkv", "parts"), [("split", 3), ("fused", 1)])
def test_fused_projections_have_a_gain_for_each_part(fused_qkv: Any, parts: int) -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 24) for name in ("qkv", "c_attn", "in_proj", "Wqkv", "fc")})
    model["kv_heads_qkv"] = nn.Linear(12, 18)  # grouped queries: unequal parts
    model["query_key_value"] = nn.Linear(8, 24)  # rows of the three are interleaved
    model["mha"] = nn.MultiheadAttention(8, 2)
    apply_sigma_reparam(model, fused_qkv=fused_qkv)
    found = {key: len(container[0].gain) for key, container in spectral(model).items()}
    assert found == {
        **{f"{name}.weight": parts for name in ("qkv", "c_attn", "in_proj", "Wqkv")},
        "fc.weight": 1, "kv_heads_qkv.weight": 1, "query_key_value.weight": 1,
        "mha.in_proj_weight": parts, "mha.out_proj.weight": 1,
    }  # fmt: skip


def test_state_is_float32_contiguous_and_survives_half_precision() -> None:
    model = nn.Linear(6, 4).bfloat16()
    assert apply_sigma_reparam(model) == ["weight"]
    model.to(torch.bfloat16)
    state = spectral(model)[".weight"][0]
    assert {name: tuple(t.shape) for name, t in state.state_dict().items()} == {"gain": (1,), "u": (1, 4), "v": (1, 6)}
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in state.state_dict().values())
    assert model.weight.dtype == torch.bfloat16


def test_applying_twice_is_applying_once() -> None:
    model = tiny.Net()
    names = apply_sigma_reparam(model)
    assert names[:2] == ["blocks.0.attention.qkv", "blocks.0.attention.out"]
    keys = [name for name, _ in model.named_parameters()]
    assert apply_sigma_reparam(model) == []
    assert [name for name, _ in model.named_parameters()] == keys
    assert merge_sigma_reparam(model) == names
    assert merge_sigma_reparam(model) == []


def test_a_copy_keeps_working_after_the_original_is_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    apply_sigma_reparam(model)
    copied = copy.deepcopy(model).eval()
    wanted = copied(torch.ones(4))
    merge_sigma_reparam(model)
    assert torch.equal(copied(torch.ones(4)), wanted)
    assert list(copied.state_dict()) == ["0.weight", "0.bias"]
    assert isinstance(copied[0].parametrizations.weight[0], SpectralParametrization)


def test_another_parametrization_of_the_same_module_survives_merge() -> None:
    model = nn.Linear(4, 4)
    parametrize.register_parametrization(model, "bias", nn.Tanh())
    apply_sigma_reparam(model)
    merge_sigma_reparam(model)
    assert parametrize.is_parametrized(model, "bias")
    assert not parametrize.is_parametrized(model, "weight")
    assert "weight" in dict(model.named_parameters())
    model(torch.ones(4)).sum().backward()
    assert model.weight.grad is not None


def test_weights_tied_to_an_embedding_are_left_out_unless_named() -> None:
    model = Tied()
    assert apply_sigma_reparam(model) == ["body"]
    merge_sigma_reparam(model)
    tokens, wanted = torch.arange(4), model(torch.arange(4))
    before = snapshot(model)
    assert sorted(apply_sigma_reparam(model, targets="head")) == ["embedding", "head"]
    assert torch.equal(model(tokens), wanted)
    lists = spectral(model)
    assert lists["head.weight"][0] is lists["embedding.weight"][0]
    assert lists["head.weight"].original is lists["embedding.weight"].original
    model.load_state_dict(model.state_dict())
    with torch.no_grad():
        lists["head.weight"].original.add_(torch.randn(10, 8))
    v = lists["head.weight"][0].v.clone()
    update_sigma_reparam(model)
    expected = nn.functional.normalize(lists["head.weight"].original @ v[0], dim=0)
    assert torch.allclose(lists["head.weight"][0].u[0], expected)  # one iteration, not one for each owner
    merge_sigma_reparam(model)
    assert model.head.weight is model.embedding.weight
    assert snapshot(model) == before


def test_state_dict_is_plain_in_the_original_order_and_loads_both_ways() -> None:
    model = Attention()
    plain = copy.deepcopy(model)
    apply_sigma_reparam(model)
    live = {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    folded = model.state_dict()
    assert list(folded) == list(plain.state_dict())
    for key, tensor in plain.state_dict().items():
        assert torch.allclose(folded[key], tensor, atol=1e-6)
    assert list(model.packed.state_dict(prefix="x.")) == [f"x.{key}" for key in plain.packed.state_dict()]

    other = Attention()
    x = torch.randn(2, 5, 8)
    model.load_state_dict(other.state_dict())
    assert torch.allclose(model(x), other(x), atol=1e-6)
    container = spectral(model)["packed.out_proj.weight"]
    assert torch.equal(container.original, other.packed.out_proj.weight)
    assert container[0].gain.item() == pytest.approx(spectral_norm(other.packed.out_proj.weight).item(), rel=1e-6)
    model.load_state_dict(live)
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.named_parameters())


def test_averaged_vectors_are_normalised_outside_training() -> None:
    model = nn.Linear(4, 4)
    apply_sigma_reparam(model)
    wanted = model.eval().weight.clone()
    model.parametrizations.weight[0].u.mul_(0.5)
    assert torch.allclose(model.weight, wanted)


# --- training --------------------------------------------------------------------------------------------------------


def test_sigma_tracks_the_true_spectral_norm_and_the_weight_in_use_has_norm_gain() -> None:
    def worst(trainer: pl.Trainer, module: pl.LightningModule) -> float:
        module.eval()
        norms = sigma.spectral_norms()
        errors = [
            abs(spectral_norm(block.fc1.weight) / norms[f"net.blocks.{i}.fc1"][0] - 1).item()
            for i, block in enumerate(module.net.blocks)
        ]
        module.train()
        return max(errors)

    sigma, watch = SigmaReparam(), Watch(worst)
    trainer = fit(tiny.Tiny(batches=30, optimizer="adam"), sigma, watch, max_epochs=2, log_every_n_steps=1)
    assert max(watch.seen[20:]) < 0.01
    assert trainer.logged_metrics["reg/spectral_norm/max"] > 0
    assert sigma.spectral_norms() == {}


def test_logged_value_is_the_largest_gain() -> None:
    sigma = SigmaReparam(name="mine")
    watch = Watch(lambda trainer, _: (trainer.callback_metrics["reg/mine/max"], gains(sigma).abs().max()))
    fit(Lit(), sigma, watch, log_every_n_steps=1)
    assert all(torch.equal(logged, true) for logged, true in watch.seen)


def test_vectors_move_once_per_optimizer_step() -> None:
    watch = Watch(lambda _, module: module.net.blocks[0].fc1.parametrizations.weight[0].u.clone())
    fit(Lit(), SigmaReparam(), watch, accumulate_grad_batches=3, max_steps=2)
    u = watch.seen
    assert torch.equal(u[0], u[1])
    assert not torch.equal(u[1], u[2])
    assert torch.equal(u[2], u[3])


def assert_followed(layer: nn.Linear, v: Tensor) -> None:
    """``u`` is that of one iteration from ``v``."""
    container = layer.parametrizations.weight
    expected = nn.functional.normalize(container.original.detach() @ v[0], dim=0)
    assert torch.allclose(container[0].u[0], expected, atol=1e-6)


def test_a_hand_written_loop_updates_what_is_there() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
    apply_sigma_reparam(model, targets="0")
    update_sigma_reparam(model)
    apply_sigma_reparam(model, targets="1")
    for _ in range(2):
        for layer in model:
            layer.parametrizations.weight.original.data = torch.randn_like(layer.weight)  # another place in memory
        before = [layer.parametrizations.weight[0].v.clone() for layer in model]
        update_sigma_reparam(model)
        for layer, v in zip(model, before):
            assert_followed(layer, v)
    copied = copy.deepcopy(model)
    assert copied[0].parametrizations.weight[0].updates is None
    with torch.no_grad():
        copied[1].parametrizations.weight.original.neg_().add_(1)
    v, kept = copied[1].parametrizations.weight[0].v.clone(), model[1].parametrizations.weight[0].u.clone()
    update_sigma_reparam(copied)
    assert_followed(copied[1], v)
    assert torch.equal(model[1].parametrizations.weight[0].u, kept)


def test_regularize_updates_once_after_each_step() -> None:
    model, sigma = nn.Sequential(nn.Linear(6, 4)), SigmaReparam()
    with regularize(model, [sigma]) as reg:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(2):
            reg.add(model(torch.randn(3, 6)).square().mean()).backward()
            v = model[0].parametrizations.weight[0].v.clone()
            optimizer.step()
            assert_followed(model[0], v)
        assert list(sigma.spectral_norms()) == ["0"]
    assert sigma.spectral_norms() == {}


def test_autocast_on_cpu_leaves_the_weight_in_use_alone() -> None:
    model = nn.Linear(4, 4)
    apply_sigma_reparam(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.weight.dtype == torch.float32


@pytest.mark.parametrize(("owner", "casts"), [("stock", True), ("own_forward", False), ("tied", False)])
def test_only_products_may_have_the_weight_in_low_precision(owner: str, casts: bool) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight / self.weight.norm())

    model = {"stock": nn.Linear(8, 8), "own_forward": Own(8, 8), "tied": Tied()}[owner]
    apply_sigma_reparam(model, targets=["head"] if owner == "tied" else None)
    assert [container[0].casts for container in spectral(model).values()] == [casts] * (2 if owner == "tied" else 1)


def test_gradients_are_the_same_under_activation_checkpointing() -> None:
    def run(checkpointing: bool | None) -> list[Tensor]:
        watch = Watch(lambda _, module: tiny.parameters(module))
        fit(Lit(checkpointing=checkpointing), SigmaReparam(), watch, accumulate_grad_batches=2)
        return watch.seen

    plain, reentrant, nonreentrant = run(None), run(True), run(False)
    for a, b, c in zip(plain, reentrant, nonreentrant):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_compiled_block_trains_like_the_eager_one() -> None:
    class Compiled(Lit):
        def configure_model(self) -> None:
            for block in self.net.blocks:
                block.compile(backend="aot_eager", fullgraph=True)

    eager, compiled = Lit(), Compiled()
    for module in (eager, compiled):
        fit(module, SigmaReparam(), max_steps=4)
    assert tiny.distance(tiny.parameters(eager), tiny.parameters(compiled)) < 1e-5


def test_compiled_blocks_share_their_code() -> None:
    frames = []
    for reparam in (False, True):
        torch._dynamo.reset()
        counter, net = CompileCounter(), tiny.Net(depth=4)
        if reparam:
            apply_sigma_reparam(net)
        for block in net.blocks:
            block.compile(backend=counter)
        net(torch.randn(2, tiny.TOKENS, tiny.WIDTH))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_train(precision: Any) -> None:
    module = Lit()
    if precision != "bf16-mixed":  # the data follows the model
        module.loss = lambda x: (module.net(x.to(next(module.parameters()).dtype)) - 1).square().mean()  # type: ignore[method-assign]
    watch = Watch(lambda _, m: m.net.blocks[0].fc1.parametrizations.weight[0].gain.dtype)
    fit(module, SigmaReparam(), watch, precision=precision, max_steps=2)
    assert watch.seen[0] == (torch.float64 if precision == "64-true" else torch.float32)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("module", [tiny.Manual, tiny.Adversarial])
def test_manual_optimization_trains_the_gains(module: type) -> None:
    watch = Watch(lambda _, m: m.net.blocks[0].fc1.parametrizations.weight[0].gain.item())
    fit(module(), SigmaReparam(), watch)
    assert watch.seen[0] != watch.seen[-1]


def test_frozen_weights_have_frozen_gains() -> None:
    module = Lit()
    module.net.blocks[0].requires_grad_(False)
    watch = Watch(lambda _, m: [c[0].gain.item() for key, c in spectral(m).items() if "blocks.0.fc1" in key])
    fit(module, SigmaReparam(), watch)
    assert watch.seen[0] == watch.seen[-1]


def test_two_instances_share_a_model() -> None:
    first, second = SigmaReparam(targets="fc1", name="a"), SigmaReparam(targets="fc2", init="one", name="b")
    watch = Watch(lambda *_: (set(first.spectral_norms()), set(second.spectral_norms())))
    fit(Lit(), first, second, watch)
    assert watch.seen[0] == ({f"net.blocks.{i}.fc1" for i in (0, 1)}, {f"net.blocks.{i}.fc2" for i in (0, 1)})


def test_layers_that_the_user_attached_are_trained_and_stay() -> None:
    module = Lit()
    apply_sigma_reparam(module.net, targets="fc1")
    sigma = SigmaReparam(targets="fc2")
    watch = Watch(lambda _, m: (len(sigma.spectral_norms()), m.net.blocks[0].fc1.parametrizations.weight[0].u.clone()))
    fit(module, sigma, watch)
    assert watch.seen[0][0] == 4
    assert not torch.equal(watch.seen[0][1], watch.seen[1][1])
    assert set(spectral(module)) == {f"net.blocks.{i}.fc1.weight" for i in (0, 1)}


# --- leaving no trace ------------------------------------------------------------------------------------------------


class Crash(pl.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("crash", [False, True])
def test_the_model_is_plain_after_the_fit(crash: bool) -> None:
    module = Lit()
    before = snapshot(module)
    watch = Watch(lambda _, m: copy.deepcopy(m).eval().state_dict())
    for _ in range(2):  # again after a finished or crashed fit
        if crash:
            with pytest.raises(ZeroDivisionError):
                fit(module, SigmaReparam(), watch, Crash())
        else:
            fit(module, SigmaReparam(), watch)
        assert snapshot(module) == before
        assert all(torch.equal(tensor, watch.seen[-1][key]) for key, tensor in module.state_dict().items())


def test_other_stages_leave_the_model_alone() -> None:
    module = Lit()
    trainer = tiny.trainer([SigmaReparam()], limit_val_batches=1)
    trainer.validate(module, verbose=False)
    assert spectral(module) == {}
    assert trainer.callback_metrics["val_loss"] > 0


# --- optimizers ------------------------------------------------------------------------------------------------------


def groups_of_gains(trainer: pl.Trainer, module: pl.LightningModule) -> list[dict[str, Any]]:
    gains = {id(container[0].gain) for container in spectral(module).values()}
    groups = [g for o in trainer.optimizers for g in o.param_groups if any(id(p) in gains for p in g["params"])]
    assert sum(id(p) in gains for g in groups for p in g["params"]) == len(gains)
    assert all(len(g["params"]) > 0 for o in trainer.optimizers for g in o.param_groups)
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


@pytest.mark.parametrize("built", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("decay_gain", [False, True])
def test_gains_are_trained_wherever_the_net_is_built(built: str, decay_gain: bool) -> None:
    sigma = SigmaReparam(decay_gain=decay_gain)
    watch = Watch(lambda trainer, module: (groups_of_gains(trainer, module), gains(sigma)))
    fit(Lit(built=built), sigma, watch)
    (groups, first), (_, last) = watch.seen[0], watch.seen[-1]
    assert [group["weight_decay"] for group in groups] == [0.1 if decay_gain else 0.0]
    assert len(first) == 12
    assert (first != last).all()


def test_command_line_optimizer_gets_the_gains(tmp_path: Path) -> None:
    class Plain(Lit):
        configure_optimizers = pl.LightningModule.configure_optimizers

    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer: {accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false,"
        " enable_model_summary: false, limit_val_batches: 0, max_epochs: 1, callbacks:"
        " [{class_path: lightning_reg.callbacks.spectral_norm.SigmaReparam,"
        " init_args: {targets: [fc1, 'blocks.0.fc2'], init: one}}]}\n"
        "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01, weight_decay: 0.1}}\n"
        "lr_scheduler: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.5}}\n"
    )
    cli = LightningCLI(
        Plain, run=False, save_config_callback=None, seed_everything_default=False, args=["--config", str(config)]
    )
    sigma = cli.trainer.callbacks[0]
    watch = Watch(lambda trainer, module: (groups_of_gains(trainer, module), gains(sigma)))
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit(cli.model)
    assert [group["weight_decay"] for group in watch.seen[0][0]] == [0.0]
    assert len(watch.seen[0][1]) == 3
    assert (watch.seen[0][1] != watch.seen[-1][1]).all()
    lrs = [group["lr"] for group in cli.trainer.optimizers[0].param_groups]
    assert lrs == [0.005, 0.005]


def schedulers(optimizer: Any) -> dict[str, Any]:
    return {
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 0.5**step]),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 8),
        "one_cycle": lambda: lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=9),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, total_iters=4),
        "sequential": lambda: lr_scheduler.SequentialLR(
            optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 5)], [3]
        ),
        "cyclic": lambda: lr_scheduler.CyclicLR(optimizer, [0.01, 0.02], [0.1, 0.2], 2, cycle_momentum=False),
    }


@pytest.mark.parametrize("name", ["lambda", "cosine", "one_cycle", "linear", "sequential", "cyclic"])
@pytest.mark.parametrize("prebuilt", [False, True], ids=["moved", "missing"])
def test_the_own_group_follows_the_schedule_of_its_weights(name: str, prebuilt: bool) -> None:
    class Scheduled(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.ready = self._build_optimizer() if prebuilt else None

        def _build_optimizer(self) -> Any:
            first, second = (list(block.parameters()) for block in self.net.blocks)
            optimizer = torch.optim.AdamW([{"params": first}, {"params": second, "lr": 2e-3}], lr=1e-3)
            return optimizer, schedulers(optimizer)[name]()

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = self.ready or self._build_optimizer()
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    watch = Watch(lambda trainer, _: [group["lr"] for group in trainer.optimizers[0].param_groups])
    fit(Scheduled(), SigmaReparam(), watch, max_steps=8)
    assert len(watch.seen) == 8
    for first, second, first_gains, second_gains in watch.seen:
        assert (first_gains, second_gains) == (first, second)
    assert watch.seen[0] != watch.seen[1]


def test_named_parameter_groups_stay_named() -> None:
    class Named(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.named_parameters(), weight_decay=0.1)

    def lengths(trainer: pl.Trainer, _: Any) -> list[tuple[int, int]]:
        return [(len(group["params"]), len(group["param_names"])) for group in trainer.optimizers[0].param_groups]

    watch = Watch(lengths)
    fit(Named(), SigmaReparam(), watch)
    assert all(params == names for params, names in watch.seen[0])
    assert watch.seen[0][1][0] == 8


def test_optimizers_without_weight_decay_are_left_alone() -> None:
    watch = Watch(lambda trainer, _: len(trainer.optimizers[0].param_groups))
    fit(tiny.Tiny(optimizer="lbfgs"), SigmaReparam(), watch, max_steps=2)
    assert watch.seen[0] == 1


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_training_equals_uninterrupted_training(tmp_path: Path, averaging: bool, accumulate: int) -> None:
    def callbacks() -> list[pl.Callback]:
        return [SigmaReparam(), *([EMAWeightAveraging(decay=0.8)] if averaging else [])]

    class Repeating(Lit):
        """The same batch again and again: Lightning does not restore the position of a plain DataLoader."""

        def train_dataloader(self) -> Any:
            data = tiny.loader(1).dataset.tensors[0].repeat(8, 1, 1)
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)

    whole, resumed, settings = Repeating(), Repeating(), {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    ends = [Watch(lambda _, m: {k: v.clone() for k, v in [*m.named_parameters(), *m.named_buffers()]}) for _ in "ab"]
    fit(whole, *callbacks(), ends[0], **settings, **checkpointed(tmp_path))
    torch.manual_seed(123)
    for parameter in resumed.parameters():
        nn.init.normal_(parameter)
    fit(resumed, *callbacks(), ends[1], ckpt=tmp_path / "step=2.ckpt", **settings)
    assert all(torch.equal(tensor, ends[1].seen[-1][key]) for key, tensor in ends[0].seen[-1].items())
    assert all(torch.equal(tensor, resumed.state_dict()[key]) for key, tensor in whole.state_dict().items())


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_are_plain_and_hold_the_function(tmp_path: Path, weights_only: bool) -> None:
    x = torch.randn(2, tiny.TOKENS, tiny.WIDTH)
    watch = Watch(lambda _, m: copy.deepcopy(m).eval()(x))
    module = Lit()
    fit(module, SigmaReparam(), watch, **checkpointed(tmp_path, save_weights_only=weights_only))
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(module.state_dict())
    assert ("lightning_reg" in checkpoint) is not weights_only
    net = tiny.Net()
    net.load_state_dict({key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()})
    assert torch.equal(net.eval()(x), watch.seen[2])
    assert torch.equal(Lit.load_from_checkpoint(tmp_path / "step=3.ckpt").eval()(x), watch.seen[2])


def test_checkpoints_load_where_the_library_is_not_installed(tmp_path: Path) -> None:
    module = Lit()
    module.net = nn.Sequential(nn.Linear(tiny.WIDTH, 16), nn.Tanh(), nn.Linear(16, tiny.WIDTH))
    x = torch.randn(2, tiny.WIDTH)
    watch = Watch(lambda _, m: copy.deepcopy(m).eval()(x))
    fit(module, SigmaReparam(), watch, **checkpointed(tmp_path), max_steps=2)
    script = f"""
import sys, torch
from torch import nn
sys.modules["lightning_reg"] = None
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear({tiny.WIDTH}, 16), nn.Tanh(), nn.Linear(16, {tiny.WIDTH}))
state = torch.load({str(tmp_path / "step=2.ckpt")!r})["state_dict"]
net.load_state_dict({{key.removeprefix("net."): value for key, value in state.items()}})
torch.save(net(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "output.pt")!r})
"""
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "output.pt"), watch.seen[1])


def test_the_optimizer_state_of_a_plain_training_is_refused(tmp_path: Path) -> None:
    fit(Lit(), **checkpointed(tmp_path), max_steps=2)
    with pytest.raises(ValueError, match=r"was trained without SigmaReparam.*fit without `ckpt_path`"):
        fit(Lit(), SigmaReparam(), ckpt=tmp_path / "step=2.ckpt", max_steps=4)


def test_a_checkpoint_saved_after_the_fit_continues_the_function(tmp_path: Path, caplog: Any) -> None:
    module = Lit()
    trainer = fit(module, SigmaReparam(), max_steps=2)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert "lightning_reg" not in torch.load(tmp_path / "after.ckpt")
    resumed = Lit()
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(resumed, SigmaReparam(), ckpt=tmp_path / "after.ckpt", max_steps=2)
    assert "The checkpoint holds no state of SigmaReparam" in caplog.text
    assert tiny.distance(tiny.parameters(module), tiny.parameters(resumed)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"targets": "fc1"},
            r"'net.blocks.0.attention.qkv.weight' is reparametrized in the checkpoint, not in the model: set `targets`",
        ),
        (
            {"fused_qkv": "fused"},
            r"`gain` of 'net.blocks.0.attention.qkv.weight' has shape \(1,\), but \(3,\) in .* set `fused_qkv`",
        ),
        ({"decay_gain": True}, r"`decay_gain` is True, but the checkpoint has the opposite"),
    ],
    ids=["targets", "fused_qkv", "decay_gain"],
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path, arguments: Any, message: str) -> None:
    fit(Lit(), SigmaReparam(), **checkpointed(tmp_path), max_steps=2)
    module = Lit()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        fit(module, SigmaReparam(**arguments), ckpt=tmp_path / "step=2.ckpt", max_steps=4)
    assert snapshot(module) == before


def test_fold_checkpoint(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(6, 4), Conv1D(8, 8), nn.MultiheadAttention(8, 2), nn.Conv2d(3, 4, 2))
    apply_sigma_reparam(model)
    for container in spectral(model).values():
        container[0].gain.data.mul_(2.0)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    for container in spectral(model).values():
        container[0].plain_keys = False  # as in sharded training
    live = model.state_dict()
    assert set(live) != set(wanted)
    path, output = tmp_path / "live.ckpt", tmp_path / "plain.ckpt"
    torch.save({"epoch": 3, "state_dict": live}, path)
    content = path.read_bytes()
    assert fold_checkpoint(path, output) == output
    assert path.read_bytes() == content
    folded = torch.load(output)
    assert folded["epoch"] == 3
    assert list(folded["state_dict"]) == list(wanted)
    assert all(torch.equal(folded["state_dict"][key], value) for key, value in wanted.items())
    assert fold_checkpoint(str(path)) == path
    assert list(torch.load(path)["state_dict"]) == list(wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live.ckpt", "plain.ckpt"]
    with pytest.raises(ValueError, match="holds no sigma-Reparam keys; it is plain already"):
        fold_checkpoint(path)
    with pytest.raises(ValueError, match="Consolidate a sharded checkpoint first"):
        fold_checkpoint(tmp_path)
    torch.save({"state_dict": live, "hyper_parameters": Path("x")}, path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="If you trust it, pass `weights_only=False`"):
        fold_checkpoint(path)
    assert path.read_bytes() == content
    fold_checkpoint(path, weights_only=False)


# --- averaging -------------------------------------------------------------------------------------------------------


def test_averaging_after_it_works_and_its_checkpoint_is_the_averaged_function(tmp_path: Path) -> None:
    ema = EMAWeightAveraging(decay=0.5)
    x = torch.randn(2, tiny.TOKENS, tiny.WIDTH)
    watch = Watch(lambda *_: copy.deepcopy(ema._average_model.module).eval()(x))
    module = Lit()
    fit(module, SigmaReparam(), ema, watch, limit_val_batches=1, **checkpointed(tmp_path))
    checkpoint = torch.load(tmp_path / "step=8.ckpt")
    assert list(checkpoint["state_dict"]) == list(module.state_dict())
    assert torch.equal(Lit.load_from_checkpoint(tmp_path / "step=8.ckpt").eval()(x), watch.seen[-1])
    assert torch.equal(module.eval()(x), watch.seen[-1])


@pytest.mark.parametrize("average", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)])
def test_averaging_before_it_is_refused(average: pl.Callback) -> None:
    with pytest.raises(ValueError, match=r"comes before SigmaReparam in `callbacks`.* Put SigmaReparam first"):
        fit(Lit(), average, SigmaReparam())


# --- errors ----------------------------------------------------------------------------------------------------------


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match=r"`init` must be 'preserve' or 'one', got 'two'"):
        SigmaReparam(init="two")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`fused_qkv` must be 'split' or 'fused', got 'x'"):
        apply_sigma_reparam(nn.Linear(2, 2), fused_qkv="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`name` must not be empty"):
        SigmaReparam(name="")


def test_hyperparameters_are_plain() -> None:
    assert SigmaReparam(targets=["fc1", nn.Linear]).hyperparameters() == {
        "targets": ["fc1", "Linear"], "init": "preserve", "fused_qkv": "split", "decay_gain": False,
    }  # fmt: skip


@pytest.mark.parametrize("built", ["init", "setup"])
@pytest.mark.parametrize("targets", ["blocks.0.attention", "fc3", ["fc1", "fc3"]], ids=str)
def test_targets_without_match_name_their_neighbours(built: str, targets: Any) -> None:
    with pytest.raises(ValueError, match=r"matches no module. Near names: .*net.blocks"):
        fit(Lit(built=built), SigmaReparam(targets=targets))


def test_a_model_without_weights_is_refused() -> None:
    module = Lit()
    module.net = nn.LayerNorm(tiny.WIDTH)
    with pytest.raises(ValueError, match="found no Linear, convolution, Conv1D or MultiheadAttention weight"):
        fit(module, SigmaReparam())
    with pytest.raises(ValueError, match="found no Linear"):
        apply_sigma_reparam(module)


def test_weights_that_cannot_be_reparametrized() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model[3]._parameters["weight"] = None
    reasons = ["is parametrized already", "is quantised", "is not initialised yet", "is no parameter"]
    for index, reason in enumerate(reasons):
        with pytest.raises(ValueError, match=rf"`targets` selects '{index}', whose weight {reason}"):
            apply_sigma_reparam(model, targets=str(index))
    assert apply_sigma_reparam(model) == ["4"]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_zero_and_broken_weights_are_named(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[1].weight, value)
    before = snapshot(model)
    with pytest.raises(ValueError, match="The weight of '1' has spectral norm"):
        apply_sigma_reparam(model)
    assert snapshot(model) == before
    nn.init.ones_(model[1].weight)
    apply_sigma_reparam(model)
    with pytest.raises(RuntimeError, match=r"'1.weight' is zero or not finite"):
        model.load_state_dict({**model.state_dict(), "1.weight": torch.full((4, 4), value)})


def test_meta_weights_are_refused() -> None:
    with pytest.raises(RuntimeError, match="is on the meta device"):
        apply_sigma_reparam(nn.Linear(4, 4, device="meta"))


def test_sharded_weights_are_refused() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> Tensor:
            return self

    layer = nn.Linear(4, 4)
    layer._parameters["weight"] = nn.Parameter(torch.randn(4, 4).as_subclass(Sharded))
    with pytest.raises(RuntimeError, match="before `fully_shard`"):
        apply_sigma_reparam(layer)


def test_gains_that_no_optimizer_can_take_are_named() -> None:
    class Forgetful(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.blocks[0].parameters(), lr=0.1)

    class Prebuilt(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.ready = torch.optim.LBFGS(self.parameters())

        def configure_optimizers(self) -> Any:
            return self.ready

    for module, name in ((Forgetful(), "net.blocks.1.attention.qkv"), (Prebuilt(), "net.blocks.0.attention.qkv")):
        with pytest.raises(RuntimeError, match=rf"No optimizer trains the gain of '{name}'"):
            fit(module, SigmaReparam())


def test_strategies_that_flatten_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_reg.callbacks.spectral_norm.FSDPStrategy", SingleDeviceStrategy)
    with pytest.raises(RuntimeError, match="SigmaReparam does not work with SingleDeviceStrategy, which flattens"):
        fit(Lit(), SigmaReparam())


def test_modules_that_come_too_late_are_named() -> None:
    class Late(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.net.blocks[0].fc1 = nn.Linear(tiny.WIDTH, 2 * tiny.WIDTH)

    with pytest.raises(RuntimeError, match=r"'net.blocks.0.fc1' was created after `configure_model`"):
        fit(Lit(), Late(), SigmaReparam(targets="fc1"))


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_data_parallel_ranks_agree() -> None:
    class Agree(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            mine = torch.cat([t.flatten() for t in [*pl_module.parameters(), *pl_module.buffers()]]).detach()
            assert torch.equal(trainer.strategy.broadcast(mine), mine)

    module = Lit()
    ddp = DDPStrategy(process_group_backend="gloo", start_method="fork")
    fit(module, SigmaReparam(), Agree(), devices=2, strategy=ddp)
    assert spectral(module) == {}


def run_script(text: str, folder: Path) -> None:
    """Run a script that starts its own processes, with ``folder`` as argument."""
    script = folder / "script.py"
    script.write_text(text)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MASTER_", "LOCAL_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.distributed
def test_sharded_training_equals_single_device_training(tmp_path: Path) -> None:
    run_script(FSDP2_SCRIPT, tmp_path)
    single = Lit()
    watch = Watch(lambda _, m: m.state_dict())
    fit(single, SigmaReparam(), watch, max_steps=4)
    for built in ("init", "configure_model"):
        sharded = torch.load(fold_checkpoint(tmp_path / f"{built}.pt"))
        assert list(sharded) == list(watch.seen[-1])
        for key, tensor in watch.seen[-1].items():
            if key.endswith("qkv.bias"):  # the bias of the keys has no gradient but rounding, which Adam scales to 1
                tensor, sharded[key] = (bias[[0, 2]] for bias in (tensor.view(3, -1), sharded[key].view(3, -1)))
            assert torch.allclose(sharded[key], tensor, atol=1e-5), key


def uneven() -> nn.Module:
    """Shards that are empty, of unequal size, cut within a third of a fused projection, or cut along the inputs."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(OrderedDict({
        "one": nn.Linear(6, 1), "odd": nn.Linear(4, 7), "qkv": nn.Linear(5, 15), "conv": nn.Conv2d(3, 5, 2),
        "c_attn": Conv1D(12, 4), "c_proj": Conv1D(6, 3),
    }))  # fmt: skip


@pytest.mark.distributed
def test_shards_iterate_like_the_whole_weights_with_one_collective(tmp_path: Path) -> None:
    run_script(SHARDS_SCRIPT, tmp_path)
    model = uneven()
    apply_sigma_reparam(model, init="one")
    assert len(spectral(model)["qkv.weight"][0].gain) == 3
    assert spectral(model)["c_attn.weight"][0].transposed
    for _ in range(2):
        for container in spectral(model).values():
            container.original.data.mul_(1.5).add_(0.1)
        update_sigma_reparam(model)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["collectives"] == [["all_reduce"], ["all_reduce"]]
        for key, container in spectral(model).items():
            for name in ("u", "v"):
                assert torch.allclose(found[f"{key}.{name}"], getattr(container[0], name), atol=2e-6), (key, name)


# two processes over gloo; collectives are counted where torch dispatches them
SHARDS_SCRIPT = """
import os, sys, torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from tests.callbacks.test_sigma_reparam import spectral, uneven
from lightning_reg.callbacks import apply_sigma_reparam, update_sigma_reparam

def run(rank, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(29500 + os.getppid() % 1000)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = uneven()
    apply_sigma_reparam(model, init="one")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    collectives = []
    for _ in range(2):
        for container in spectral(model).values():
            container.original.data.mul_(1.5).add_(0.1)
        called = []
        for name in ("all_reduce", "all_gather_into_tensor", "_all_gather_base"):
            def count(*args, name=name, original=getattr(torch.distributed, name), **kwargs):
                called.append(name)
                return original(*args, **kwargs)
            count.original = getattr(torch.distributed, name)
            setattr(torch.distributed, name, count)
        with CommDebugMode() as functional:
            update_sigma_reparam(model)
        for name in ("all_reduce", "all_gather_into_tensor", "_all_gather_base"):
            setattr(torch.distributed, name, getattr(torch.distributed, name).original)
        assert "all_gather" not in str(functional.get_comm_counts()), functional.get_comm_counts()
        collectives.append(called)
    found = {f"{key}.{name}": getattr(c[0], name) for key, c in spectral(model).items() for name in ("u", "v")}
    torch.save({"collectives": collectives, **found}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (sys.argv[1],), nprocs=2)
"""


# the net is built in `__init__` and attached by the callback, or built, attached and sharded in `configure_model`
FSDP2_SCRIPT = """
import sys, torch
from pathlib import Path
import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tests import tiny
from lightning_reg.callbacks import SigmaReparam, apply_sigma_reparam, merge_sigma_reparam

class Sharded(tiny.Tiny):
    def __init__(self, built):
        super().__init__()
        self.built = built
        if built == "configure_model":
            self.net = None

    def configure_model(self):
        if self.net is not None and any(isinstance(p, DTensor) for p in self.parameters()):
            return
        if self.built == "configure_model":
            torch.manual_seed(0)
            self.net = tiny.Net()
            apply_sigma_reparam(self.net)
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

class Save(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        state = get_model_state_dict(pl_module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if trainer.global_rank == 0:
            torch.save(state, Path(sys.argv[1]) / f"{pl_module.built}.pt")
        try:
            merge_sigma_reparam(pl_module)
        except RuntimeError as error:
            assert "is sharded and cannot be merged in place" in str(error)

torch.set_num_threads(1)
for built in ("init", "configure_model"):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    settings = dict(devices=2, strategy=strategy, max_steps=4, use_distributed_sampler=False, log_every_n_steps=1)
    tiny.trainer([SigmaReparam(), Save()], **settings).fit(Sharded(built))
"""
