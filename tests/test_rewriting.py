"""Rewritten attention: soft cap and random keys in models of other people, in training and evaluation."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_reg import capture, classes, regularize, rewriting
from lightning_reg.callbacks import (
    AttentionEntropyRegularizer,
    AttentionLogitRegularizer,
    QKClip,
    QKNorm,
    SigmaReparam,
    SoftCap,
    StochasticAttention,
    load_softcap,
    remove_softcap,
)
from lightning_reg.callbacks.softcap import SoftCapRewrite
from lightning_reg.functional import softcap, softcapped_attention
from lightning_reg.functional.stochastic_attention import masked_to
from tests import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty", "ignore:Be aware that when using `ckpt_path`"
)

CAP = 0.05  # far below what the small models compute, so that it shows


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    gc.collect()
    rewriting.release_unused()  # of tests before
    before = F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax
    yield
    for module in list(rewriting._installed):
        for kind in list(rewriting.rewrites_of(module)):
            rewriting.remove(module, kind)
    gc.collect()
    rewriting.release_unused()
    assert (F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax) == before
    assert torch.backends.mha.get_fastpath_enabled()
    assert not capture.rewriting


class CappedAttention(tiny.Attention):
    """The twin of the tiny model's attention, with the cap written into it."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, tiny.HEADS, width // tiny.HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / (width // tiny.HEADS) ** 0.5
        probs = (CAP * torch.tanh(scores / CAP)).softmax(-1)
        return self.out((probs @ v).transpose(1, 2).reshape(x.shape))


def capped(module: tiny.Tiny) -> tiny.Tiny:
    for block in module.net.blocks:
        block.attention.__class__ = CappedAttention
    return module


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [({}, {}), ({}, {"accumulate_grad_batches": 3}), ({"use_reentrant": False}, {}), ({"use_reentrant": True}, {})],
    ids=["plain", "accumulate", "nonreentrant", "reentrant"],
)
def test_training_equals_that_of_a_model_written_with_the_cap(
    arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    wanted = tiny.fit(capped(tiny.Tiny(**arguments)), **settings)
    module = tiny.Tiny(**arguments)
    assert tiny.distance(tiny.fit(module, [SoftCap(CAP)], **settings), wanted) <= 1e-6
    assert tiny.distance(tiny.fit(tiny.Tiny(**arguments), **settings), wanted) > 1e-4
    (x,) = next(iter(tiny.loader(1)))
    twin = capped(tiny.Tiny())
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(module.eval()(x), twin.eval()(x), atol=1e-6, rtol=1e-5)  # stays, also in evaluation
    assert list(module.state_dict()) == list(tiny.Tiny().state_dict())


def test_a_regularizer_sees_the_capped_attention() -> None:
    regularizer = AttentionEntropyRegularizer(1.0)
    module = tiny.Tiny()
    (x,) = next(iter(tiny.loader(1)))
    rewriting.install_everywhere(module, SoftCapRewrite(CAP))
    module.train()
    with regularize(module, [regularizer]) as reg:
        joined = reg.add(module(x).square().mean())
    entropies = []
    for block in module.net.blocks:
        batch, tokens, width = x.shape
        q, k, _ = block.attention.qkv(x).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        p = (CAP * torch.tanh(q @ k.mT / 2 / CAP)).softmax(-1)
        entropies.append(-(p * p.log()).sum(-1).mean() / torch.tensor(5.0).log())
        x = block(x)
    torch.testing.assert_close(reg.values["attention_entropy/value"], torch.stack(entropies).mean())
    joined.backward()


def timm_vit(fused: bool) -> tuple[nn.Module, Tensor]:
    import timm

    net = timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=8, depth=2, num_heads=2
    )
    for block in net.blocks:
        block.attn.fused_attn = fused
    return net, torch.randn(2, 1, 8, 8)


def torch_encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 8)


def llama(implementation: str) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=implementation, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaModel(config), torch.arange(6)[None]


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "timm_fused": lambda: timm_vit(True),
    "timm": lambda: timm_vit(False),
    "torch": torch_encoder,
    "llama_sdpa": lambda: llama("sdpa"),
    "llama_eager": lambda: llama("eager"),
}


def output(net: nn.Module, x: Tensor) -> Tensor:
    result = net(x)
    return result if isinstance(result, Tensor) else result.last_hidden_state


def by_patching(monkeypatch: pytest.MonkeyPatch, eager: bool) -> None:
    """Every attention of the process capped, by hand: the reference for models of which there is no twin."""
    softmax = torch.softmax

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **arguments: Any,
    ) -> Tensor:
        return softcapped_attention(q, k, v, attn_mask, is_causal=is_causal, cap=CAP, **arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    if eager:
        capped_softmax = lambda s, dim=-1, dtype=None, **_: softmax(softcap(s, CAP), dim, dtype=dtype)  # noqa: E731
        monkeypatch.setattr(F, "softmax", capped_softmax)
        monkeypatch.setattr(nn.functional, "softmax", capped_softmax)
        monkeypatch.setattr(Tensor, "softmax", lambda self, dim, **_: softmax(softcap(self, CAP), dim))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_others_are_capped_where_they_compute_attention(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = MODELS[name]()
    net.train(training)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # scores that the cap bends
    with torch.set_grad_enabled(training):
        plain = output(net, x)
        rewrite = SoftCapRewrite(CAP)
        rewriting.install_everywhere(net, rewrite)
        got = output(net, x)
        assert rewrite.fired
        copied = output(copy.deepcopy(net), x)
        pickled = output(pickle.loads(pickle.dumps(net)), x)
        rewriting.remove_all(net, "softcap")
        torch.testing.assert_close(output(net, x), plain, atol=1e-6, rtol=1e-5)
        with monkeypatch.context() as patch:
            by_patching(patch, eager=name in ("timm", "llama_eager"))
            torch.backends.mha.set_fastpath_enabled(False)
            wanted = output(net, x)
            torch.backends.mha.set_fastpath_enabled(True)
    for other in (got, copied, pickled):
        torch.testing.assert_close(other, wanted, atol=1e-5, rtol=1e-4)
    assert (got - plain).abs().max() > 1e-4


def test_compiled_blocks_share_code_without_graph_breaks() -> None:
    from torch._dynamo.utils import counters

    wanted = tiny.fit(capped(tiny.Tiny()))
    torch.compiler.reset()
    counters.clear()
    module = tiny.Tiny()
    module.net = tiny.Net(depth=2)
    module.load_state_dict(tiny.Tiny().state_dict())
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert tiny.distance(tiny.fit(module, [SoftCap(CAP)]), wanted) <= 1e-6
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] <= 4  # the first input needs no gradient; training and evaluation


def test_random_keys_compile_without_graph_breaks_and_draw_the_same() -> None:
    from torch._dynamo.utils import counters

    wanted = tiny.fit(tiny.Tiny(), [StochasticAttention(0.5)])
    torch.compiler.reset()
    counters.clear()
    module = tiny.Tiny()
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert tiny.distance(tiny.fit(module, [StochasticAttention(0.5)]), wanted) <= 1e-6
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_a_repeated_forward_draws_the_same_keys(use_reentrant: bool) -> None:
    wanted = tiny.fit(tiny.Tiny(), [StochasticAttention(0.5)])
    got = tiny.fit(tiny.Tiny(use_reentrant=use_reentrant), [StochasticAttention(0.5)])
    assert tiny.distance(got, wanted) <= 1e-6
    assert tiny.distance(tiny.fit(tiny.Tiny()), wanted) > 1e-4
    assert tiny.distance(tiny.fit(tiny.Tiny(), [StochasticAttention(0.5, seed=1)]), wanted) > 1e-5


def test_random_keys_leave_evaluation_and_the_model_alone() -> None:
    seen: list[Tensor] = []

    class Validating(tiny.Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self(batch[0]))

    module = Validating()
    tiny.fit(module, [StochasticAttention(0.2)], limit_val_batches=1)
    assert not rewriting.record(module, "stochastic_attention")
    assert [type(block.attention) for block in module.net.blocks] == [tiny.Attention] * 2
    (x,) = next(iter(tiny.loader(1)))
    torch.testing.assert_close(seen[-1], module.eval()(x), atol=1e-6, rtol=1e-5)


def test_keeping_every_key_is_bit_identical_to_no_callback() -> None:
    assert torch.equal(tiny.fit(tiny.Tiny(), [StochasticAttention(1.0)]), tiny.fit(tiny.Tiny()))


@pytest.mark.parametrize("make", [lambda: SoftCap(CAP), lambda: StochasticAttention(0.5)], ids=["softcap", "ssa"])
def test_resumed_training_equals_uninterrupted_bit_for_bit(make: Callable[[], pl.Callback], tmp_path: Any) -> None:
    def run(checkpoint: str | None = None) -> Tensor:
        module = tiny.Tiny(optimizer="adam")
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        trainer = tiny.trainer([make(), keep], enable_checkpointing=True)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, ckpt_path=checkpoint)
        return tiny.parameters(module)

    whole = run()
    assert torch.equal(run(str(tmp_path / "epoch=0.ckpt")), whole)


def whole(x: Tensor) -> DataLoader:
    return DataLoader(x, batch_size=len(x))


def saved(tmp_path: Any) -> tuple[tiny.Tiny, str]:
    module = tiny.Tiny()
    tiny.fit(module, [SoftCap(CAP), ModelCheckpoint(tmp_path, filename="last")], enable_checkpointing=True)
    return module, str(tmp_path / "last.ckpt")


def test_checkpoint_restores_the_cap_with_and_without_a_trainer(tmp_path: Any) -> None:
    module, path = saved(tmp_path)
    (x,) = next(iter(tiny.loader(1)))
    wanted = module.eval()(x)
    checkpoint = torch.load(path, weights_only=True)
    plain = tiny.Tiny()
    plain.load_state_dict(checkpoint["state_dict"])
    assert not torch.allclose(plain.eval()(x), wanted, atol=1e-5)
    assert load_softcap(plain, checkpoint) == ["net.blocks.0.attention", "net.blocks.1.attention"]
    assert torch.equal(plain(x), wanted)
    assert remove_softcap(plain) == ["net.blocks.0.attention", "net.blocks.1.attention"]
    assert remove_softcap(plain) == []
    outputs = tiny.trainer([SoftCap(CAP)]).predict(other := tiny.Tiny(), whole(x), ckpt_path=path, weights_only=False)
    assert torch.equal(outputs[0], wanted)
    remove_softcap(other)
    with pytest.raises(
        ValueError, match=r"`cap` of SoftCap is 3, but the checkpoint was trained with 0.05: set `cap=0"
    ):
        tiny.trainer([SoftCap(3.0)]).predict(tiny.Tiny(), whole(x), ckpt_path=path, weights_only=False)
    with pytest.raises(ValueError, match="holds no record of `SoftCap`"):
        load_softcap(tiny.Tiny(), {})


def test_a_record_for_another_model_changes_nothing(tmp_path: Any) -> None:
    _, path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    other = tiny.Tiny()
    other.net = tiny.Net(depth=1)
    with pytest.raises(ValueError, match=r"rewritten attention|which this model has not"):
        load_softcap(other, checkpoint)
    assert not rewriting.record(other, "softcap")


class Crashing(tiny.Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise RuntimeError("crash")


@pytest.mark.parametrize("make", [lambda: SoftCap(CAP), lambda: StochasticAttention(0.5)], ids=["softcap", "ssa"])
def test_what_trained_nothing_is_put_back(make: Callable[[], pl.Callback]) -> None:
    module = Crashing()
    with pytest.raises(RuntimeError, match="^crash$"):
        tiny.fit(module, [make()])
    assert type(module.net.blocks[0].attention) is tiny.Attention


def test_a_forward_that_raises_leaves_no_scope_behind() -> None:
    net = tiny.Net()
    rewriting.install_everywhere(net, SoftCapRewrite(CAP))
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 3))
    assert not capture.rewriting


class Inline(pl.LightningModule):
    """Attention in the forward of a module that holds others."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Outer()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.block(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def test_attention_that_is_not_reached_raises() -> None:
    with pytest.raises(RuntimeError, match="SoftCap did not reach the attention computed in Outer"):
        tiny.trainer([SoftCap(CAP)]).fit(Inline(), tiny.loader(2))
    module = Inline()
    tiny.trainer([SoftCap(CAP, targets="block")]).fit(module, tiny.loader(2))
    assert set(rewriting.record(module, "softcap")) == {"block", "block.inner"}


def test_a_model_without_attention_raises() -> None:
    class Plain(Inline):
        def __init__(self) -> None:
            super().__init__()
            self.block = tiny_mlp()

    with pytest.raises((ValueError, RuntimeError), match="no module that computes attention|reached no attention"):
        tiny.trainer([SoftCap(CAP)]).fit(Plain(), tiny.loader(2))


def tiny_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(tiny.WIDTH, 4), nn.ReLU(), nn.Linear(4, tiny.WIDTH))


def test_installing_twice_is_installing_once() -> None:
    net = tiny.Net()
    assert rewriting.install_everywhere(net, SoftCapRewrite(CAP)) == ["blocks.0.attention", "blocks.1.attention"]
    assert rewriting.install_everywhere(net, SoftCapRewrite(CAP)) == []
    assert isinstance(net.blocks[0].attention, tiny.Attention)
    assert type(net.blocks[0].attention) is type(net.blocks[1].attention)


def test_switched_off_it_leaves_attention_alone() -> None:
    callback = SoftCap(CAP)
    callback.enabled = False
    assert torch.equal(tiny.fit(tiny.Tiny(), [callback]), tiny.fit(tiny.Tiny()))
    assert callback.state_dict() == {"softcap": {}}


@pytest.mark.parametrize("seed", [-1, 1.5, True], ids=str)
def test_bad_seed(seed: object) -> None:
    with pytest.raises(ValueError, match=r"`seed` must be an integer in \[0, 2\*\*31\), got"):
        StochasticAttention(0.5, seed=seed)  # type: ignore[arg-type]


def test_attention_that_holds_norms_of_its_own_is_reached() -> None:
    net, x = timm_vit(True)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = tiny.trainer([QKNorm(), SoftCap(CAP)], max_steps=2)
    trainer.fit(module, DataLoader(torch.cat([x, x]), batch_size=2))
    capped_at = {name for name in rewriting.record(module, "softcap") if name.endswith("attn")}
    assert capped_at == {"net.blocks.0.attn", "net.blocks.1.attn"}


class Encoder(pl.LightningModule):
    """``nn.TransformerEncoder``, whose attention is compiled code's business and whose fast path runs no module."""

    def __init__(self, crash: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.crash = torch_encoder()[0], crash
        for parameter in self.net.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == self.crash:
            raise RuntimeError("crash")
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def batches() -> DataLoader:
    return DataLoader(torch.randn(4, 5, 8), batch_size=2)


@pytest.mark.parametrize("crash", [None, 0, 1], ids=["no_crash", "crash_at_0", "crash_at_1"])
@pytest.mark.parametrize("turned", [False, True], ids=["sigma_first", "sigma_last"])
@pytest.mark.parametrize(
    "make",
    [lambda: SoftCap(CAP), lambda: QKNorm(), lambda: StochasticAttention(0.5)],
    ids=["softcap", "qk_norm", "stochastic"],
)
def test_with_sigma_reparam_each_takes_off_its_own_class(
    make: Callable[[], pl.Callback], turned: bool, crash: int | None
) -> None:
    module = Encoder(crash)
    callbacks = [SigmaReparam(), make()][:: -1 if turned else 1]
    if crash is None:
        tiny.trainer(callbacks).fit(module, batches())
    else:
        with pytest.raises(RuntimeError, match="^crash$"):
            tiny.trainer(callbacks).fit(module, batches())
    for layer in module.net.layers:
        assert isinstance(layer.self_attn, nn.MultiheadAttention)
        assert set(classes.kinds_of(layer.self_attn)) <= {"rewritten"}
        assert not hasattr(layer.self_attn, "parametrizations")
    assert torch.isfinite(module.eval()(torch.randn(2, 5, 8))).all()


def test_compiled_multihead_attention_is_reached_in_training_and_after_it() -> None:
    torch.compiler.reset()
    wanted, module = Encoder(), Encoder()
    for layer in module.net.layers:
        layer.compile(backend="aot_eager")
    for one in (wanted, module):
        torch.manual_seed(1)
        tiny.trainer([SoftCap(CAP)]).fit(one, batches())
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), wanted.eval()(x), atol=1e-5, rtol=1e-4)
        capped_output = module(x)
        remove_softcap(module)
        torch.compiler.reset()
        assert (module(x) - capped_output).abs().max() > 1e-3


def test_what_others_have_taken_away_does_not_hide_a_crash() -> None:
    class Broken(Crashing):
        pass

    module = Broken()
    with pytest.raises(RuntimeError, match="^crash$"):
        tiny.fit(module, [QKNorm(heads=2), SoftCap(CAP), AttentionEntropyRegularizer(1.0)])
    assert type(module.net.blocks[0].attention) is tiny.Attention
    assert capture.unrewritten is None
    assert not capture._active


def test_a_model_is_trained_again_with_a_new_callback_and_keeps_its_cap() -> None:
    module = tiny.Tiny()
    tiny.fit(module, [SoftCap(CAP)])
    tiny.fit(module, [SoftCap(CAP)])
    with pytest.raises(ValueError, match=r"`cap` of SoftCap is 3, but 'net.blocks.0.attention' was trained with 0.05"):
        tiny.fit(module, [SoftCap(3.0)])
    assert {entry["cap"] for entry in rewriting.record(module, "softcap").values()} == {CAP}


def test_one_callback_for_two_models_leaves_the_first_as_it_was_trained() -> None:
    callback, first = SoftCap(CAP), tiny.Tiny()
    tiny.fit(first, [callback])
    (x,) = next(iter(tiny.loader(1)))
    wanted = first.eval()(x)
    callback.enabled = True
    second = tiny.Tiny()
    tiny.fit(second, [callback])
    callback.enabled = False
    assert torch.equal(first(x), wanted)


def test_two_caps_on_one_attention_are_refused_and_two_caps_apart_resume(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="two SoftCaps act on the attention of 'net.blocks.0.attention'"):
        tiny.fit(tiny.Tiny(), [SoftCap(CAP), SoftCap(2 * CAP, targets="blocks.0")])
    apart = lambda: [SoftCap(CAP, targets="blocks.0"), SoftCap(2 * CAP, targets="blocks.1")]  # noqa: E731
    module = tiny.Tiny()
    tiny.fit(module, [*apart(), ModelCheckpoint(tmp_path, filename="last")], enable_checkpointing=True)
    (x,) = next(iter(tiny.loader(1)))
    outputs = tiny.trainer(apart()).predict(
        tiny.Tiny(), whole(x), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False
    )
    assert torch.equal(outputs[0], module.eval()(x))


def test_a_named_parent_does_not_make_its_predictions_attention() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = tiny.Attention()

        def forward(self, x: Tensor) -> Tensor:
            return (100 * self.attention(x).mean(1)).softmax(-1)

    net, x = nn.ModuleDict({"net": Classifier()}), torch.randn(2, 5, 8)
    by_hand = copy.deepcopy(net)
    by_hand["net"].attention.__class__ = CappedAttention
    rewriting.install_everywhere(net, SoftCapRewrite(CAP), "net")
    torch.testing.assert_close(net["net"](x), by_hand["net"](x), atol=1e-5, rtol=1e-4)


def test_random_keys_in_eager_attention_survive_rows_of_padding() -> None:
    fill = torch.finfo(torch.float32).min
    scores = torch.randn(1, 1, 4, 4).masked_fill(torch.tensor([[True] * 4] + [[False] * 4] * 3), fill)
    hidden = masked_to(scores, torch.tensor([1, 2]), 4, 4)
    assert torch.isfinite(hidden.softmax(-1)).all()
    assert torch.equal(hidden[0, 0, 0], scores[0, 0, 0])
    assert torch.equal(hidden[0, 0, 1].isinf(), torch.tensor([True, False, False, True]))


def test_two_random_draws_on_one_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="two StochasticAttentions act on"):
        tiny.fit(tiny.Tiny(), [StochasticAttention(0.5), StochasticAttention(0.2, targets="blocks.0")])


def test_when_the_last_capped_model_is_gone_torch_is_as_it_was() -> None:
    net = tiny.Net()
    rewriting.install_everywhere(net, SoftCapRewrite(CAP))
    assert F.scaled_dot_product_attention is capture._attention
    del net
    gc.collect()
    rewriting.release_unused()
    assert F.scaled_dot_product_attention is not capture._attention
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "make",
    [lambda: QKClip(threshold=100.0, heads=2), lambda: AttentionLogitRegularizer(1.0, bound=50.0)],
    ids=["clip", "penalty"],
)
def test_what_acts_above_the_cap_is_refused(make: Callable[[], pl.Callback]) -> None:
    with pytest.raises(ValueError, match=r"but a SoftCap of 50 lets no attention logit come so far"):
        tiny.fit(tiny.Tiny(), [SoftCap(50.0), make()])
    tiny.fit(tiny.Tiny(), [SoftCap(200.0), make()])
