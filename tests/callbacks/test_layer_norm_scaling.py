"""LayerNorm Scaling on any pre-norm model: a hand-written twin, checkpoints, folding, compilation, what is refused."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer, LayerNormScaling
from lightning_reg.norm_scaling import (
    Probe,
    apply_layer_norm_scaling,
    find_norms,
    fold_layer_norm_scaling,
    load_layer_norm_scaling,
    norm_scaling_record,
    remove_layer_norm_scaling,
)
from tests import tiny
from tests.test_engine import DIFFERENT, EXACT, assert_untouched

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided.*"),
]

DEPTH = 3


class Block(tiny.Block):
    """Pre-norm; `number` is the layer of a hand-written twin, which divides by its root."""

    def __init__(self, norm: Any = nn.LayerNorm, number: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2, self.number = norm(tiny.WIDTH), norm(tiny.WIDTH), number

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x) / math.sqrt(self.number))
        return x + self.fc2(torch.tanh(self.fc1(self.norm2(x) / math.sqrt(self.number))))


class Net(nn.Module):
    def __init__(self, written: bool = False, norm: Any = nn.LayerNorm, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(norm, i + 1 if written else 1) for i in range(DEPTH))
        self.norm, self.use_reentrant = norm(tiny.WIDTH), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant and self.training:
            x = x.detach().requires_grad_()  # a reentrant checkpoint needs an input with gradient
        for block in self.blocks:
            plain = self.use_reentrant is None or not self.training
            x = block(x) if plain else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.norm(x)


class Lit(tiny.Tiny):
    def __init__(self, written: bool = False, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(written, **arguments)


def fit(module: pl.LightningModule, *callbacks: Any, ckpt: Any = None, **settings: Any) -> pl.Trainer:
    trainer = tiny.trainer([*callbacks, *settings.pop("callbacks", [])], **settings)
    trainer.fit(module, ckpt_path=ckpt)
    return trainer


def trained(module: nn.Module) -> nn.Module:
    """With norms whose weights and biases are no ones and zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name.lower() or "ln" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


NORMS = {f"net.blocks.{i}.norm{n}": i + 1 for i in range(DEPTH) for n in (1, 2)}


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_training_equals_a_handwritten_twin(norm: Any, use_reentrant: bool | None) -> None:
    settings = {"accumulate_grad_batches": 3, "limit_val_batches": 2}
    twin, module, plain = Lit(True, norm=norm), Lit(norm=norm, use_reentrant=use_reentrant), Lit(norm=norm)
    wanted = fit(twin, **settings)
    got = fit(module, LayerNormScaling(), **settings)
    fit(plain, **settings)
    assert tiny.distance(tiny.parameters(module), tiny.parameters(twin)) <= EXACT
    assert tiny.distance(tiny.parameters(module), tiny.parameters(plain)) > DIFFERENT
    assert got.callback_metrics["val_loss"].item() == pytest.approx(
        wanted.callback_metrics["val_loss"].item(), abs=1e-6
    )
    (x,) = next(iter(tiny.loader(1)))
    assert tiny.distance(module.eval()(x), twin.eval()(x)) <= 1e-5  # it stays
    assert tiny.distance(plain.eval()(x), twin(x)) > 1e-2


def test_regularizers_see_the_scaled_model() -> None:
    twin, module = Lit(True), Lit()
    fit(twin, AttentionEntropyRegularizer(1.0))
    fit(module, AttentionEntropyRegularizer(1.0), LayerNormScaling())
    assert tiny.distance(tiny.parameters(module), tiny.parameters(twin)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factor_is_as_exact_as_the_model(dtype: torch.dtype) -> None:
    net, x = trained(Net()).to(dtype), torch.randn(2, 5, tiny.WIDTH, dtype=dtype)
    apply_layer_norm_scaling(net)
    twin = Net(written=True).to(dtype)
    twin.load_state_dict(net.state_dict())
    assert net(x).dtype == dtype
    assert tiny.distance(net(x), twin.eval()(x)) <= (1e-14 if dtype == torch.float64 else 0.1)


def test_compiled_blocks_share_their_code_without_graph_break() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    twin, net, x = Net(written=True), Net(), torch.randn(2, 5, tiny.WIDTH, requires_grad=True)
    twin.load_state_dict(net.state_dict())
    counter = CompileCounter()
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True)
    net(x)
    apply_layer_norm_scaling(net)
    counter.clear()
    assert tiny.distance(net(x), twin(x)) <= 1e-6
    assert counter.frame_count == 1
    remove_layer_norm_scaling(net)
    for block in twin.blocks:
        block.number = 1
    assert tiny.distance(net(x), twin(x)) <= 1e-6


def test_copies_and_pickles_stay_scaled_and_averages_too() -> None:
    net, x = trained(Net()), torch.randn(2, 5, tiny.WIDTH)
    apply_layer_norm_scaling(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
        assert remove_layer_norm_scaling(other)
        assert not torch.equal(other(x), net(x))
    module, averaging = Lit(), EMAWeightAveraging(decay=0.5)
    fit(module, LayerNormScaling(), averaging)
    twin, reference = Lit(True), EMAWeightAveraging(decay=0.5)
    fit(twin, reference)
    assert tiny.distance(module.eval()(x), twin.eval()(x)) <= 1e-5


def test_hand_written_loop_trains_the_scaled_model() -> None:
    nets = [Net(), Net(written=True)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in nets]
    with regularize(nets[0], [LayerNormScaling()]) as reg:
        for (x,) in tiny.loader(3):
            for net, optimizer, add in zip(nets, optimizers, (reg.add, lambda loss: loss), strict=True):
                optimizer.zero_grad()
                add((net(x) - x.roll(1, 1)).square().mean()).backward()
                optimizer.step()
    assert tiny.distance(tiny.parameters(nets[0]), tiny.parameters(nets[1])) <= EXACT
    assert len(norm_scaling_record(nets[0])) == 2 * DEPTH
    untrained = Net()
    with regularize(untrained, [LayerNormScaling()]):
        pass
    assert norm_scaling_record(untrained) == {}


# --- which norms -----------------------------------------------------------------------------------------------------


def test_norms_of_a_stack_are_numbered_by_block_and_the_final_norm_is_left_out() -> None:
    module = Lit()
    assert find_norms(module) == NORMS
    assert find_norms(module, targets=r"blocks\.[12]\.norm1") == {"net.blocks.1.norm1": 2, "net.blocks.2.norm1": 3}
    assert find_norms(module, targets=r"net\.blocks\.2") == {"net.blocks.2.norm1": 3, "net.blocks.2.norm2": 3}
    assert find_norms(module, targets=nn.LayerNorm).keys() == NORMS.keys()
    apply_layer_norm_scaling(module, offset=4)
    assert norm_scaling_record(module) == {name: layer + 4 for name, layer in NORMS.items()}


def networks() -> dict[str, Any]:
    import timm
    from transformers import (
        BertConfig,
        BertModel,
        GemmaConfig,
        GemmaModel,
        GPT2Config,
        GPT2Model,
        LlamaConfig,
        LlamaModel,
        Qwen3Config,
        Qwen3Model,
        T5Config,
        T5EncoderModel,
        T5Model,
    )  # fmt: skip

    sizes = {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
        "num_hidden_layers": 3, "vocab_size": 11, "max_position_embeddings": 8,
    }  # fmt: skip
    t5 = {"d_model": 8, "d_ff": 16, "num_heads": 2, "d_kv": 4, "num_layers": 3, "vocab_size": 11}
    vit = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 2}
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    swin = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 3), "num_heads": (2, 2), "num_classes": 2}
    return {
        "vit": lambda: timm.models.VisionTransformer(**vit),
        "vit_qk_norm": lambda: timm.models.VisionTransformer(**vit, qk_norm=True, class_token=False, global_pool="avg"),
        "swin": lambda: timm.models.SwinTransformer(**swin, window_size=4),
        "gpt2": lambda: GPT2Model(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=11, n_positions=8)),
        "llama": lambda: LlamaModel(LlamaConfig(**sizes)),
        "qwen3": lambda: Qwen3Model(Qwen3Config(**sizes)),
        "gemma": lambda: GemmaModel(GemmaConfig(**sizes)),
        "t5_encoder": lambda: T5EncoderModel(T5Config(**t5)),
        "t5": lambda: T5Model(T5Config(**t5, num_decoder_layers=2)),
        "bert": lambda: BertModel(BertConfig(**{k: sizes[k] for k in list(sizes)[:3] + list(sizes)[5:]})),
        "torch": lambda: nn.TransformerEncoder(encoder, 3, enable_nested_tensor=False),
    }


def run(model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    if isinstance(model, nn.TransformerEncoder):
        return model(torch.randn(2, 5, 8))
    if hasattr(model, "config"):
        tokens = torch.randint(11, (2, 5))
        more = {"decoder_input_ids": tokens} if type(model).__name__ == "T5Model" else {}
        return model(input_ids=tokens, **more).last_hidden_state
    return model(torch.randn(2, 3, *((32, 32) if "Swin" in type(model).__name__ else (16, 16))))


FOUND = {
    "vit": (("norm1", "norm2"), "blocks.{}", [1, 2, 3]),
    "vit_qk_norm": (("norm1", "norm2"), "blocks.{}", [1, 2, 3]),
    "gpt2": (("ln_1", "ln_2"), "h.{}", [1, 2, 3]),
    "llama": (("input_layernorm", "post_attention_layernorm"), "layers.{}", [1, 2, 3]),
    "qwen3": (("input_layernorm", "post_attention_layernorm"), "layers.{}", [1, 2, 3]),
    "gemma": (("input_layernorm", "post_attention_layernorm"), "layers.{}", [1, 2, 3]),
    "t5_encoder": (("layer.0.layer_norm", "layer.1.layer_norm"), "encoder.block.{}", [1, 2, 3]),
    "torch": (("norm1", "norm2"), "layers.{}", [1, 2, 3]),
}


@pytest.mark.parametrize("name", FOUND)
def test_models_of_others_are_scaled_and_fold_to_a_plain_model(name: str) -> None:
    norms, path, layers = FOUND[name]
    model = trained(networks()[name]())
    before = run(model)
    keys = list(model.state_dict())
    assert find_norms(model) == {f"{path.format(i)}.{norm}": n for i, n in enumerate(layers) for norm in norms}
    # by hand: the norms' own outputs
    seen: dict[str, list[Tensor]] = {"plain": [], "scaled": []}
    last = model.get_submodule(f"{path.format(2)}.{norms[0]}")
    apply_layer_norm_scaling(model)
    x = torch.randn(2, 5, 8)
    seen["plain"].append(last.forward(x))
    seen["scaled"].append(last(x))
    torch.testing.assert_close(seen["scaled"][0], seen["plain"][0] / math.sqrt(3), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        scaled = run(model)
    assert (scaled - before).abs().max() > 1e-4
    assert fold_layer_norm_scaling(model) is model
    assert norm_scaling_record(model) == {}
    assert not any(module._forward_hooks for module in model.modules())
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        torch.testing.assert_close(run(model), scaled, rtol=1e-4, atol=1e-5)


def test_stages_count_on_and_an_encoder_and_a_decoder_of_one_class_each_from_one() -> None:
    swin = find_norms(networks()["swin"]())
    assert [swin[name] for name in swin if name.endswith("norm1")] == [1, 2, 3, 4, 5]
    assert not any("downsample" in name for name in swin)
    t5 = find_norms(networks()["t5"]())
    assert {t5[f"encoder.block.{i}.layer.0.layer_norm"] - i for i in range(3)} == {1}
    assert {t5[f"decoder.block.{i}.layer.2.layer_norm"] - i for i in range(2)} == {1}


# --- folding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_keeps_the_function_to_rounding_and_trains_on(dtype: torch.dtype) -> None:
    net, x = trained(Net()).to(dtype), torch.randn(2, 5, tiny.WIDTH, dtype=dtype)
    apply_layer_norm_scaling(net)
    scaled = net(x).detach()
    fold_layer_norm_scaling(net)
    assert tiny.distance(net(x).detach(), scaled) <= (1e-5 if dtype == torch.float32 else 0.1)
    net(x).sum().backward()
    assert all(parameter.dtype == dtype and parameter.grad is not None for parameter in net.blocks.parameters())


@pytest.mark.parametrize("why", ["no_affine", "shared"])
def test_norms_that_cannot_be_folded_are_named_and_nothing_changes(why: str) -> None:
    net = trained(Net())
    if why == "no_affine":
        net.blocks[2].norm2 = nn.LayerNorm(tiny.WIDTH, elementwise_affine=False)
    else:
        net.blocks[2].norm2.weight = net.blocks[1].norm2.weight
    apply_layer_norm_scaling(net)
    before, x = copy.deepcopy(net.state_dict()), torch.randn(2, 5, tiny.WIDTH)
    scaled = net(x)
    with pytest.raises(ValueError, match=r"the norm 'blocks.\d.norm2' \(LayerNorm\) has no weight of its own"):
        fold_layer_norm_scaling(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(x), scaled)


# --- life ------------------------------------------------------------------------------------------------------------


def test_applying_twice_is_applying_once_and_removing_leaves_nothing() -> None:
    net, x = trained(Net()), torch.randn(2, 5, tiny.WIDTH)
    before, plain = [set(vars(module)) for module in net.modules()], net(x)
    assert len(apply_layer_norm_scaling(net)) == 2 * DEPTH
    once = net(x)
    assert apply_layer_norm_scaling(net) == []
    assert torch.equal(net(x), once)
    assert remove_layer_norm_scaling(net, ["blocks.0.norm1"]) == ["blocks.0.norm1"]
    assert len(remove_layer_norm_scaling(net)) == 2 * DEPTH - 1
    assert torch.equal(net(x), plain)
    assert [set(vars(module)) for module in net.modules()] == before


class Crash(pl.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise RuntimeError("crash")


@pytest.mark.parametrize(("batch", "scaled"), [(0, 0), (1, 2 * DEPTH)], ids=["before", "after"])
def test_what_trained_nothing_is_put_back(batch: int, scaled: int) -> None:
    module = Lit()
    with pytest.raises(RuntimeError, match="crash"):
        fit(module, LayerNormScaling(), Crash(batch))
    assert len(norm_scaling_record(module)) == scaled
    assert sum(len(part._forward_hooks) for part in module.modules()) == scaled


def test_net_that_is_built_late_is_scaled() -> None:
    class Late(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                torch.manual_seed(0)
                self.net = Net()

    module, twin = Late(), Lit(True)
    fit(module, LayerNormScaling())
    fit(twin)
    assert tiny.distance(tiny.parameters(module), tiny.parameters(twin)) <= EXACT


def keep(directory: Path) -> ModelCheckpoint:
    return ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path: Path) -> None:
    settings = {"max_epochs": 2, "enable_checkpointing": True}
    whole, resumed = Lit(), Lit()
    fit(whole, LayerNormScaling(), keep(tmp_path), **settings)
    fit(resumed, LayerNormScaling(), keep(tmp_path), ckpt=tmp_path / "epoch=0.ckpt", **settings)
    assert torch.equal(tiny.parameters(resumed), tiny.parameters(whole))


def test_checkpoints_are_plain_and_remember_the_scaling(tmp_path: Path) -> None:
    module = Lit()
    fit(module, LayerNormScaling(offset=1), keep(tmp_path), enable_checkpointing=True)
    path = tmp_path / "epoch=0.ckpt"
    loaded = torch.load(path, weights_only=True)
    assert list(loaded["state_dict"]) == list(Lit().state_dict())
    (x,) = next(iter(tiny.loader(1)))
    other = Lit()
    other.load_state_dict(loaded["state_dict"])
    assert sorted(load_layer_norm_scaling(other, loaded)) == sorted(NORMS)
    assert torch.equal(other.eval()(x), module.eval()(x))
    fresh = Lit()
    tiny.trainer([LayerNormScaling(offset=1)], limit_val_batches=1).validate(fresh, ckpt_path=str(path), verbose=False)
    assert torch.equal(fresh.eval()(x), module(x))
    untouched = Lit()
    tiny.trainer([LayerNormScaling()], limit_val_batches=1).validate(untouched, verbose=False)
    assert norm_scaling_record(untouched) == {}
    for wrong in (LayerNormScaling(), LayerNormScaling(offset=1, targets="norm1")):
        victim = Lit()
        wrong.__dict__["state_key"] = LayerNormScaling(offset=1).state_key
        with pytest.raises(ValueError, match=r"the checkpoint was trained with 'net.blocks.0.norm\d' as layer 2, but"):
            fit(victim, wrong, ckpt=path, max_epochs=2)
        assert norm_scaling_record(victim) == {}


# --- what is refused -------------------------------------------------------------------------------------------------


class PostBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.fc2(torch.tanh(self.fc1(x))))


class Bypassed(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        inner = nn.functional.layer_norm(x, (tiny.WIDTH,), self.norm2.weight, self.norm2.bias)
        return x + self.fc2(torch.tanh(self.fc1(inner)))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(2, 5, tiny.WIDTH)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("block", "message"),
    [(PostBlock, r"'net.blocks.0' \(PostBlock\) is post-norm"), (Bypassed, "net.blocks.0.norm2, .* did not run when")],
)
def test_post_norm_and_norms_that_are_passed_by_are_refused_before_anything_is_trained(
    block: type, message: str
) -> None:
    module = Lit()
    module.net.blocks = nn.ModuleList(block() for _ in range(2))
    before = tiny.parameters(module)
    with pytest.raises(RuntimeError, match=message):
        fit(module, LayerNormScaling())
    assert torch.equal(tiny.parameters(module), before)
    assert norm_scaling_record(module) == {}
    assert_untouched(module)
    assert not any(part._forward_hooks for part in module.modules())
    optimizer = torch.optim.SGD(module.net.parameters(), lr=0.1)
    with regularize(module.net, [LayerNormScaling()]), pytest.raises(RuntimeError, match=message.replace("net.", "")):
        step(module.net, optimizer)


def test_post_norm_models_of_others_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"'layers.0' \(TransformerEncoderLayer\) normalises after .*`norm_first`"):
        apply_layer_norm_scaling(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    bert = networks()["bert"]()
    apply_layer_norm_scaling(bert)
    probe = Probe(bert)
    with pytest.raises(RuntimeError, match=r"'encoder.layer.0' \(BertLayer\) is post-norm"):
        run(bert)
    probe.close()
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    gemma = Gemma2Model(Gemma2Config(**sizes, head_dim=4, num_hidden_layers=2, vocab_size=11))
    with pytest.raises(ValueError, match="'layers.0.post_feedforward_layernorm'"):
        apply_layer_norm_scaling(gemma)
    assert len(apply_layer_norm_scaling(gemma, targets=["input_layernorm", "pre_feedforward_layernorm"])) == 4


@pytest.mark.parametrize("offset", [-1, 0.5, True])
def test_bad_offset_is_named(offset: Any) -> None:
    with pytest.raises(ValueError, match=f"`offset` must be an integer >= 0, .* got {offset}"):
        LayerNormScaling(offset=offset)


def test_models_without_a_stack_and_targets_outside_of_one_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with pytest.raises(ValueError, match="no stack of blocks was found"):
        apply_layer_norm_scaling(plain)
    module = Lit()
    with pytest.raises(ValueError, match="`targets` entry selects net.norm, where no norm of a stack"):
        find_norms(module, targets=["norm1", r"net\.norm"])
    with pytest.raises(ValueError, match="`targets` entry selects net.blocks.0.fc1, .* where no norm of a stack"):
        find_norms(module, targets="fc1")
    with pytest.raises(ValueError, match="matches no module"):
        fit(module, LayerNormScaling(targets="norms"))
    assert norm_scaling_record(module) == {}


def test_norm_that_is_scaled_otherwise_is_refused_and_nothing_changes() -> None:
    net = Net()
    apply_layer_norm_scaling(net, targets=r"blocks\.2")
    with pytest.raises(ValueError, match="'blocks.2.norm1' is scaled as layer 3 already, not 4"):
        apply_layer_norm_scaling(net, offset=1)
    assert norm_scaling_record(net) == {"blocks.2.norm1": 3, "blocks.2.norm2": 3}
    with pytest.raises(ValueError, match="the checkpoint scaled other.norm, which this model does not have"):
        load_layer_norm_scaling(net, {"blocks.0.norm1": 1, "other.norm": 2})
    with pytest.raises(ValueError, match="the checkpoint holds no scaled norms"):
        load_layer_norm_scaling(net, {"callbacks": {}})
    assert len(norm_scaling_record(net)) == 2
