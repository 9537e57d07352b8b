"""Norms of queries and keys, put into models: they compute what timm and hand-written models do, and come off again."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_reg import qk_norm
from lightning_reg.qk_norm import HeadNorm, apply_qk_norm, load_qk_norm, qk_norm_record, remove_qk_norm
from tests import attentions
from tests.attentions import HEADS, NETS, WIDTH, Written, inputs, make


def reference(x: Tensor, norm: HeadNorm) -> Tensor:
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if norm.norm == "layer" else x
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    x = x if norm.weight is None else x * norm.weight.double()
    return x if norm.bias is None else x + norm.bias.double()


def disturb(net: nn.Module) -> None:
    """Gains and biases that are not 1 and 0."""
    for norms in qk_norm.norms_of(net).values():
        for norm in norms:
            for parameter in norm.parameters():
                nn.init.normal_(parameter)


def queries_and_keys(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the attention function of a net."""
    seen: list[Tensor] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.extend((q.detach(), k.detach()))
        return plain(q, k, v, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        net(x)
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
    return seen[0], seen[1]


INSIDE = [name for name in NETS if not name.startswith("torch") and name != "eager"]  # calls torch's attention itself


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("name", [name for name in NETS if name in INSIDE and name != "qwen2_rope_gqa"])
def test_queries_and_keys_are_normalised_by_head(name: str, norm: Any) -> None:
    net, (x,) = make(name), inputs()
    before = queries_and_keys(net, x)
    (found,) = apply_qk_norm(net, norm=norm)
    disturb(net)
    own = qk_norm.norms_of(net)[found]
    for plain, normed, module in zip(before, queries_and_keys(net, x), own, strict=True):
        torch.testing.assert_close(normed.double(), reference(plain, module), rtol=1e-5, atol=1e-5)
    assert own[0].weight.shape == (WIDTH // HEADS,)  # type: ignore[union-attr]


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("name", ["torch", "torch_cross", "torch_bias_kv", "eager"])
def test_attention_of_normalised_queries_and_keys_by_hand(name: str, norm: Any) -> None:
    net, (x,) = make(name).double(), inputs().double()
    apply_qk_norm(net, norm=norm, eps=1e-3)
    disturb(net)
    if name == "eager":
        parts = [(x, m.weight, m.bias) for m in (net.q_lin, net.k_lin, net.to_v)]
        last = net.last
    else:
        mha, last = net.mha, net.mha.out_proj
        weights = (
            [mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight] if net.cross else mha.in_proj_weight.chunk(3)
        )
        given = (x, x[..., 3:], x[..., 5:]) if net.cross else (x, x, x)
        parts = list(zip(given, weights, mha.in_proj_bias.chunk(3), strict=True))
    made = [part @ weight.T + bias for part, weight, bias in parts]
    if name == "torch_bias_kv":
        made[1:] = [torch.cat([m, b.expand(len(x), 1, -1)], 1) for m, b in zip(made[1:], (mha.bias_k, mha.bias_v))]
    q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in made)
    ((own_q, own_k),) = qk_norm.norms_of(net).values()
    q, k, v = (
        reference(q, own_q),
        *(part.repeat_interleave(HEADS // part.shape[1], 1) for part in (reference(k, own_k), v)),
    )
    wanted = last(((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(net(x), wanted, rtol=1e-10, atol=1e-10)


def test_rotary_embedding_comes_after_the_norm() -> None:
    net, (x,) = make("qwen2_rope_gqa"), inputs()
    (found,) = apply_qk_norm(net, affine=False)
    for part in queries_and_keys(net, x):  # a rotation keeps the norm
        torch.testing.assert_close(part.square().mean(-1), torch.ones(part.shape[:-1]), rtol=1e-3, atol=0)
    transformers = pytest.importorskip("transformers")
    # Qwen 3 is Qwen 2 with these norms
    config = {**attentions.SMALL, "num_key_value_heads": 2, "head_dim": 4}
    torch.manual_seed(0)
    qwen3 = transformers.Qwen3Model(transformers.Qwen3Config(**config, rms_norm_eps=1e-6))
    qwen2 = transformers.Qwen2Model(transformers.Qwen2Config(**config, rms_norm_eps=1e-6))
    for layer in qwen2.layers:
        layer.self_attn.q_proj.bias = layer.self_attn.k_proj.bias = layer.self_attn.v_proj.bias = None
    apply_qk_norm(qwen2)
    disturb(qwen2)
    qwen3.load_state_dict(qwen2.state_dict())
    wanted = qwen3(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(qwen2(inputs_embeds=x).last_hidden_state, wanted, rtol=1e-5, atol=1e-6)
    assert found.endswith("self_attn")


def test_timm_with_our_norms_is_timm_with_its_own() -> None:
    sizes: dict[str, Any] = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    torch.manual_seed(0)
    ours = timm.models.VisionTransformer(**sizes)
    theirs = timm.models.VisionTransformer(**sizes, qk_norm=True)
    apply_qk_norm(ours, norm="layer", eps=theirs.blocks[0].attn.q_norm.eps)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    disturb(ours)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [("to_q", "to_k"), ("qkv",), ("query", "kv")], ids="-".join)
def test_values_and_gradients_are_those_of_a_model_that_has_them_written(names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    ours = Written(names)
    twin = Written(names, norm=lambda: nn.RMSNorm(WIDTH // HEADS, eps=1e-6))
    apply_qk_norm(ours)
    disturb(ours)
    state = {key.replace("q_norm", "inner.0").replace("k_norm", "inner.1"): v for key, v in ours.state_dict().items()}
    twin.load_state_dict(state)
    (x,) = inputs()
    torch.testing.assert_close(ours(x), twin(x), rtol=1e-6, atol=1e-6)
    for model in (ours, twin):
        (model(x) * x).sum().backward()
    wanted = {key.replace("inner.0", "q_norm").replace("inner.1", "k_norm"): p for key, p in twin.named_parameters()}
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_is_normalised_in_evaluation_too(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
    net, (x,) = nn.TransformerEncoder(layer, 2).train(training), inputs()
    with torch.no_grad():
        before = net(x)
        apply_qk_norm(net)
        for norms in qk_norm.norms_of(net).values():
            nn.init.constant_(norms[0].weight, 3.0)  # type: ignore[arg-type]
        normed = net(x)
        assert float((normed - before).abs().max()) > 1e-3
        torch.testing.assert_close(normed, net.train(not training)(x), rtol=1e-5, atol=1e-5)
        remove_qk_norm(net)
        assert torch.equal(net.train(training)(x), before)


def test_parameters_have_the_dtype_of_the_projection() -> None:
    net = make("written").to(torch.bfloat16)
    apply_qk_norm(net)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert net(inputs()[0].to(torch.bfloat16)).dtype == torch.bfloat16
    net = make("written_fused_gqa")
    apply_qk_norm(net)
    with torch.autocast("cpu", torch.bfloat16):
        queries_and_keys(net, inputs()[0])
        assert net(inputs()[0]).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["timm", "written_fused_gqa"])
def test_compiled_without_graph_break(name: str) -> None:
    net, (x,) = make(name), inputs()
    apply_qk_norm(net)
    disturb(net)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-6, atol=1e-6)


# --- on and off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_removal_leaves_the_model_as_it_was(name: str) -> None:
    net, (x,) = make(name), inputs()
    before, state, kinds = net(x), copy.deepcopy(net.state_dict()), [type(part) for part in net.modules()]
    found = apply_qk_norm(net)
    assert apply_qk_norm(net) == []  # twice is once
    assert not torch.equal(net(x), before)
    assert remove_qk_norm(net) == found
    assert remove_qk_norm(net) == []
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == list(state)
    assert [type(part) for part in net.modules()] == kinds
    assert not any(part._forward_hooks for part in net.modules())
    assert not any(key.startswith("_lightning_reg") for part in net.modules() for key in part.__dict__)


@pytest.mark.parametrize("name", ["timm", "torch", "written", "gpt2"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how: str, name: str) -> None:
    net, (x,) = make(name), inputs()
    apply_qk_norm(net)
    disturb(net)
    before = net(x)
    other = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert torch.equal(other(x), before)
    disturb(other)
    assert not torch.equal(other(x), before)
    assert torch.equal(net(x), before)
    remove_qk_norm(other)
    assert torch.equal(net(x), before)
    torch.testing.assert_close(other(x), make(name)(x))


@pytest.mark.parametrize("with_weights", [True, False])
def test_record_brings_norms_and_gains_to_a_plain_model(with_weights: bool) -> None:
    net, (x,) = nn.Sequential(make("written"), make("timm")), inputs()
    net[0].heads = float(HEADS)  # no number of heads
    with pytest.raises(ValueError, match="cannot be separated"):
        apply_qk_norm(net)
    apply_qk_norm(net, norm="layer", eps=1e-3, targets="0", heads=HEADS)
    apply_qk_norm(net, targets="1.attn", affine=False)
    disturb(net)
    record = qk_norm_record(net)
    assert record == {
        "0": {"norm": "layer", "eps": 1e-3, "affine": True, "heads": HEADS, "head_dim": 4},
        "1.attn": {"norm": "rms", "eps": 1e-6, "affine": False, "heads": HEADS, "head_dim": 4},
    }
    plain = nn.Sequential(make("written"), make("timm"))
    plain[0].heads = float(HEADS)
    states = {"state_dict": net.state_dict()} if with_weights else {}
    checkpoint = {"callbacks": {"QKNorm": {"qk_norm": record}, "other": {"qk_norm": 3}, "third": 4}, **states}
    assert load_qk_norm(plain, checkpoint) == ["0", "1.attn"]
    assert load_qk_norm(plain, checkpoint) == []
    assert torch.equal(plain[0].q_norm.weight, net[0].q_norm.weight) == with_weights
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(x), net(x))
    bare = make("timm")
    assert load_qk_norm(bare, {"attn": record["1.attn"]}) == ["attn"]


# --- bad input -------------------------------------------------------------------------------------------------------


class Taken(Written):
    q_norm = None


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.q, self.k = 2, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)


def tied() -> nn.Module:
    net = Written(key_heads=HEADS)
    net.to_k.weight = net.to_q.weight
    return net


REFUSED: dict[str, tuple[Any, str]] = {
    "normed": (
        lambda: attentions.Timm(qk_norm=True, norm_layer=nn.LayerNorm),
        r"'attn' normalises its queries and keys already \('q_norm'\)",
    ),
    "taken": (Taken, "'Taken' has an attribute 'q_norm' of its own"),
    "convolution": (Convolution, "'q' is a convolution, whose channels are not the last axis"),
    "tied": (tied, "shares the weight of a query or key projection"),
    "nothing": (lambda: nn.Linear(3, 3), "QKNorm found no attention: no module has children named"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_normalised_is_refused_and_nothing_changes(name: str) -> None:
    build, message = REFUSED[name]
    both = nn.ModuleList([make("written"), build()]) if name != "nothing" else build()
    keys = list(both.state_dict())
    with pytest.raises(ValueError, match=message.replace("'attn'", "'1.attn'").replace("'Taken'", "'1'")
                       .replace("'q' is", "'1.q' is")):  # fmt: skip
        apply_qk_norm(both)
    assert list(both.state_dict()) == keys
    assert not any(part._forward_hooks for part in both.modules())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`norm` must be 'rms' or 'layer', got 'batch'"):
        apply_qk_norm(Written(), norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`eps` must be a finite number > 0, got -1"):
        apply_qk_norm(Written(), eps=-1)
    with pytest.raises(ValueError, match="`heads` must be an integer >= 1, got 0"):
        apply_qk_norm(Written(), heads=0)


def test_torch_that_returns_its_weights_says_so() -> None:
    net, (x,) = make("torch"), inputs()
    apply_qk_norm(net)
    with pytest.raises(RuntimeError, match="QK-norm cannot reach .* Call it with `need_weights=False`"):
        net.mha(x, x, x)


def test_checkpoint_that_does_not_fit_is_refused() -> None:
    net = make("written")
    entry = {"norm": "rms", "eps": 1e-6, "affine": True, "heads": HEADS, "head_dim": 4}
    with pytest.raises(ValueError, match="the checkpoint has norms in gone, which this model does not have"):
        load_qk_norm(net, {"gone": entry})
    with pytest.raises(ValueError, match="holds no norms of queries and keys: it was trained without QKNorm"):
        load_qk_norm(net, {"callbacks": {"other": {"x": 1}}})
    with pytest.raises(ValueError, match="has norms of heads of width 8 in '', which this model has not"):
        load_qk_norm(net, {"": {**entry, "head_dim": 8}})
    assert "q_norm.weight" not in net.state_dict()
