"""Attentions are found by their parts, in the models of timm, torch and Hugging Face and in those written by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lightning_reg.attention import Attention, Projection, find_attentions, has_slots
from tests import attentions
from tests.attentions import HEADS, NETS, SMALL, TOKENS, WIDTH, Written, inputs, make

GROUPED = {**SMALL, "num_key_value_heads": 2}


def outputs(projection: Projection, x: Tensor) -> Tensor:
    """Queries or keys by head from the pieces alone, (batch, heads, tokens, head_dim)."""
    weight, *biases = projection.pieces
    part = weight.by_head(projection.heads, projection.head_dim)
    part = part.permute(1, 2, 0) if projection.transposed else part
    made = torch.einsum("btc,hdc->bhtd", x[..., -part.shape[-1] :], part)
    for bias in biases:
        if bias.axis == 0:
            made = made + bias.by_head(projection.heads, projection.head_dim)[:, None]
    return made


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("qwen2_rope_gqa", "torch_bias_kv")])
def test_pieces_compute_what_enters_the_attention(name: str) -> None:
    net, (x,) = make(name), inputs()
    (attention,) = find_attentions(net)
    entered: list[Tensor] = []
    handle = attention.module.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with attentions.recorded() as seen:
        net(x)
    handle.remove()
    query, key = outputs(attention.query, entered[0]), outputs(attention.key, entered[0])
    key = key.repeat_interleave(attention.groups, 1)
    scores = query @ key.transpose(-1, -2) / attention.query.head_dim**0.5
    torch.testing.assert_close(scores.tril().double(), seen[0].tril(), rtol=1e-5, atol=1e-5)


def shown(attention: Attention) -> tuple[Any, ...]:
    return (
        attention.name, attention.heads, attention.key.heads, attention.query.head_dim, attention.norm,
        [(piece.tensor, piece.start, piece.axis) for piece in attention.key.pieces],
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "timm_vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
        ("blocks.0.attn", 3, 3, 64, None, [("weight", 192, 0), ("bias", 192, 0)]),
    ),
    "timm_vit_normed": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1, qk_norm=True),
        ("blocks.0.attn", 3, 3, 64, "q_norm", [("weight", 192, 0), ("bias", 192, 0)]),
    ),
    "timm_beit": (
        lambda: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2),
        ("blocks.0.attn", 2, 2, 12, None, [("weight", 24, 0)]),
    ),
    "timm_swin2": (
        lambda: timm.create_model("swinv2_tiny_window8_256", depths=(1,), embed_dim=8, num_heads=(2,)),
        ("layers.0.blocks.0.attn", 2, 2, 4, "logit_scale", [("weight", 8, 0)]),
    ),
    "torch_packed": (
        lambda: nn.MultiheadAttention(8, 2),
        ("", 2, 2, 4, None, [("in_proj_weight", 8, 0), ("in_proj_bias", 8, 0)]),
    ),
    "torch_cross": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, add_bias_kv=True),
        ("", 2, 2, 4, None, [("k_proj_weight", 0, 0), ("in_proj_bias", 8, 0), ("bias_k", 0, 2)]),
    ),
    "torch_encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False),
        ("layers.0.self_attn", 2, 2, 4, None, [("in_proj_weight", 8, 0), ("in_proj_bias", 8, 0)]),
    ),
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
        ("encoder.layer.0.attention.self", 4, 4, 4, None, [("weight", 0, 0), ("bias", 0, 0)]),
    ),
    "distilbert": (
        lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(dim=16, n_heads=4, n_layers=1, hidden_dim=32, vocab_size=20)
        ),
        ("transformer.layer.0.attention", 4, 4, 4, None, [("weight", 0, 0), ("bias", 0, 0)]),
    ),
    "gpt2": (attentions.gpt2, ("h.0.attn", 4, 4, 4, None, [("weight", 16, 1), ("bias", 16, 0)])),
    "llama_gqa": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**GROUPED)),
        ("layers.0.self_attn", 4, 2, 4, None, [("weight", 0, 0)]),
    ),
    "phi3_fused_gqa": (
        lambda: transformers.Phi3Model(transformers.Phi3Config(**GROUPED)),
        ("layers.0.self_attn", 4, 2, 4, None, [("weight", 16, 0)]),
    ),
    "qwen3": (
        lambda: transformers.Qwen3Model(transformers.Qwen3Config(**GROUPED, head_dim=6)),
        ("layers.0.self_attn", 4, 2, 6, "q_norm", [("weight", 0, 0)]),
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**GROUPED, head_dim=4)),
        ("layers.0.self_attn", 4, 2, 4, "q_norm", [("weight", 0, 0)]),
    ),
    "olmo2": (
        lambda: transformers.Olmo2Model(transformers.Olmo2Config(**SMALL)),
        ("layers.0.self_attn", 4, 4, 4, "q_norm", [("weight", 0, 0)]),
    ),
    "t5": (
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(d_model=16, d_kv=6, num_heads=2, num_layers=1, d_ff=32, vocab_size=20)
        ),
        ("encoder.block.0.layer.0.SelfAttention", 2, 2, 6, None, [("weight", 0, 0)]),
    ),
    "written": (Written, ("", 4, 2, 4, None, [("weight", 0, 0), ("bias", 0, 0)])),
    "written_fused": (
        lambda: Written(("qkv",)),
        ("", 4, 2, 4, None, [("weight", 16, 0), ("bias", 16, 0)]),
    ),
    "written_kv": (
        lambda: Written(("query", "kv")),
        ("", 4, 2, 4, None, [("weight", 0, 0), ("bias", 0, 0)]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_each_kind(name: str) -> None:
    build, wanted = MODELS[name]
    (found,) = find_attentions(build())
    assert shown(found) == wanted


def test_cross_attention_of_gpt2_is_found_with_its_own_parts() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=4, vocab_size=20, add_cross_attention=True,
                                     bos_token_id=0, eos_token_id=0)  # fmt: skip
    own, cross = find_attentions(transformers.GPT2Model(config))
    assert (own.query.name, own.key.name) == ("h.0.attn.c_attn", "h.0.attn.c_attn")
    assert (cross.query.name, cross.key.name) == ("h.0.crossattention.q_attn", "h.0.crossattention.c_attn")
    assert cross.key.start == 0
    assert own.key.transposed


@pytest.mark.parametrize(
    ("query", "key"),
    [("q", "k"), ("query", "key"), ("to_q", "to_k"), ("q_proj", "k_proj"), ("wq", "wk"), ("W_q", "W_k"),
     ("q_lin", "k_lin"), ("linear_q", "linear_k"), ("q_linear", "k_linear"), ("query_proj", "key_proj"),
     ("fc_q", "fc_k"), ("queries", "keys"), ("query_layer", "key_layer")],
)  # fmt: skip
def test_names_of_projections(query: str, key: str) -> None:
    (found,) = find_attentions(Written((query, key)))
    assert (found.query.name, found.key.name) == (query, key)


@pytest.mark.parametrize("name", ["qkv", "to_qkv", "Wqkv", "qkv_proj", "c_attn", "in_proj"])
def test_names_of_fused_projections(name: str) -> None:
    module = nn.Module()
    module.num_heads = 2
    module.add_module(name, nn.Linear(6, 18))
    (found,) = find_attentions(module)
    assert (found.query.name, found.query.start, found.key.start, found.query.head_dim) == (name, 0, 6, 3)


@pytest.mark.parametrize("name", ["in_proj", "c_attn", "fc1", "qkv_norm", "keyboard", "sequence"])
def test_other_linear_maps_are_no_attention(name: str) -> None:
    module = nn.Module()
    module.num_heads = 2
    module.add_module(name, nn.Linear(6, 12))
    assert find_attentions(module) == []
    assert find_attentions(nn.Sequential(nn.Linear(4, 12), nn.LayerNorm(12))) == []


def test_convolutions_and_separate_biases() -> None:
    module = nn.Module()
    module.config = {"num_heads": 2}
    module.q, module.k = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
    (found,) = find_attentions(module)
    assert found.query.weight.by_head(2, 3).shape == (2, 3, 6, 1, 1)
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2)
    (found,) = find_attentions(beit)
    assert [piece.tensor for piece in found.query.biases] == ["q_bias"]


def test_heads_given_by_hand_come_first() -> None:
    module = Written(key_heads=4)
    module.heads = 2
    (found,) = find_attentions(module, heads=8)
    assert (found.heads, found.key.heads, found.query.head_dim) == (8, 8, 2)


def test_heads_follow_from_their_width() -> None:
    module = nn.Module()
    module.head_dim = 3
    module.q, module.k = nn.Linear(4, 12), nn.Linear(4, 6)
    (found,) = find_attentions(module)
    assert (found.heads, found.key.heads, found.groups) == (4, 2, 2)
    fused = nn.Module()
    fused.head_dim, fused.num_heads = 3, 4
    fused.qkv = nn.Linear(4, 12 + 2 * 6)
    (found,) = find_attentions(fused)
    assert (found.key.heads, found.key.start) == (2, 12)


def test_slots_are_identities() -> None:
    (found,) = find_attentions(attentions.Timm())
    assert has_slots(found.module)
    assert found.norm is None
    assert not has_slots(Written())


def test_targets_select_an_attention_or_what_holds_it() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2)
    assert [one.name for one in find_attentions(model, targets=r"blocks\.1")] == ["blocks.1.attn"]
    assert len(find_attentions(model, targets=[timm.layers.Attention])) == 3
    # what is not selected may be anything
    both = nn.ModuleDict({"good": Written(), "bad": nn.ModuleDict({"qkv": nn.Linear(4, 13)})})
    assert [one.name for one in find_attentions(both, targets="good")] == ["good"]


def test_compiled_projections_are_seen_through() -> None:
    net = Written()
    net.to_q = torch.compile(net.to_q, backend="eager")
    (found,) = find_attentions(net)
    assert isinstance(found.query.module, nn.Linear)


def unknown() -> nn.Module:
    net = Written()
    del net.heads
    return net


def uneven() -> nn.Module:
    net = Written()
    net.heads = 3
    return net


def fused_uneven() -> nn.Module:
    net = Written(("qkv",), key_heads=4)
    net.head_dim = 5
    return net


def too_many_keys() -> nn.Module:
    net = nn.Module()
    net.num_heads, net.q, net.k = 2, nn.Linear(4, 4), nn.Linear(4, 6)
    return net


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            unknown,
            r"the heads of Written cannot be separated: their number is unknown. Looked for num_heads, .*`heads=`",
        ),
        (uneven, "the heads of Written cannot be separated: 3 of them do not divide the 16 outputs of 'to_q'"),
        (fused_uneven, "the heads of Written cannot be separated: 4 of them do not divide the 48 outputs of 'qkv'"),
        (too_many_keys, "the heads of Module cannot be separated: 2 of them"),
        (
            lambda: transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**SMALL)),
            r"'layers.0.attention' \(GPTNeoXAttention\) projects with `query_key_value`, whose outputs interleave",
        ),
        (
            lambda: transformers.DeepseekV3Model(transformers.DeepseekV3Config(**SMALL)),
            r"'layers.0.self_attn' \(DeepseekV3Attention\) is a latent attention \(q_a_proj, .*Leave it out",
        ),
    ],
    ids=["unknown", "uneven", "fused_uneven", "too_many_keys", "interleaved", "latent"],
)
def test_heads_that_cannot_be_separated_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_attentions(build())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`heads` must be an integer >= 1, got 0"):
        find_attentions(Written(), heads=0)
    with pytest.raises(ValueError, match="`targets` select 0.last, where no attention was found: no children named"):
        find_attentions(nn.Sequential(Written()), targets="last")


def test_helpers_of_these_tests_compute_attention() -> None:
    """The independent record of logits is that of torch."""
    net, (x,) = Written(key_heads=HEADS), inputs()
    with attentions.recorded() as seen:
        q, k, v = (torch.randn(2, HEADS, TOKENS, 4) for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(seen[0].softmax(-1).float() @ v, out)
    assert net(x).shape[-1] == WIDTH
