"""Discovery on models nobody touched: what is found, and that it is what the model computes."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lightning_reg import capture, regularize
from lightning_reg.callbacks import ActivationDensityRegularizer, AttentionEntropyRegularizer
from lightning_reg.engine import Engine
from tests.mil import ABMIL, bags

pytestmark = pytest.mark.filterwarnings("ignore:.*enable_nested_tensor is True.*")


def vit(fused: bool) -> nn.Module:
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2
    )
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def hugging_face(kind: str, implementation: str) -> nn.Module:
    small = {"vocab_size": 20, "attn_implementation": implementation}
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **small,
        )  # fmt: skip
        return transformers.BertModel(config, add_pooling_layer=False)
    if kind == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **dropout, **small))
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, **small
    )
    return transformers.LlamaModel(config)


def tokens() -> Tensor:
    return torch.randint(0, 20, (2, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], list[str], list[str]]] = {
    # name: model, forward, modules with attention, down-projections
    "timm_vit_fused": (
        lambda: vit(True), lambda m: m(torch.randn(2, 1, 8, 8)),
        ["blocks.0.attn", "blocks.1.attn"], ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"],
    ),
    "timm_vit_unfused": (
        lambda: vit(False), lambda m: m(torch.randn(2, 1, 8, 8)),
        ["blocks.0.attn", "blocks.1.attn"], ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"],
    ),
    "torch_encoder": (
        encoder, lambda m: m(torch.randn(2, 5, 16)),
        ["layers.0.self_attn", "layers.1.self_attn"], ["layers.0.linear2", "layers.1.linear2"],
    ),
    **{
        f"bert_{implementation}": (
            lambda implementation=implementation: hugging_face("bert", implementation),
            lambda m: m(tokens()).last_hidden_state,
            ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"],
            ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"],
        )
        for implementation in ("sdpa", "eager")
    },
    **{
        f"gpt2_{implementation}": (
            lambda implementation=implementation: hugging_face("gpt2", implementation),
            lambda m: m(tokens()).last_hidden_state,
            ["h.0.attn", "h.1.attn"], ["h.0.mlp.c_proj", "h.1.mlp.c_proj"],
        )
        for implementation in ("sdpa", "eager")
    },
    **{
        f"llama_{implementation}": (
            lambda implementation=implementation: hugging_face("llama", implementation),
            lambda m: m(tokens()).last_hidden_state,
            ["layers.0.self_attn", "layers.1.self_attn"], ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"],
        )
        for implementation in ("sdpa", "eager")
    },
}  # fmt: skip


def fired(model: nn.Module, callback: Any, forward: Callable[[nn.Module], Tensor]) -> list[str]:
    with regularize(model, [callback]) as reg:
        reg.add(forward(model).square().mean()).backward()
        return [tap.site.name for tap in Engine.of(model).taps[callback] if tap.fired]


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_projections_are_found(name: str) -> None:
    make, forward, attention, projections = MODELS[name]
    model = make().train()
    assert fired(model, AttentionEntropyRegularizer(0.1), forward) == attention
    assert capture.find_down_projections(model) == projections
    assert fired(model, ActivationDensityRegularizer(0.1), forward) == projections


ONE_NODE = ("timm_vit_fused", "torch_encoder", "bert_sdpa", "gpt2_sdpa", "llama_sdpa")


@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_models_and_every_parameter_before_attention_feels_it(name: str) -> None:
    make, forward, _, _ = MODELS[name]
    model = make().train()
    torch.manual_seed(1)
    plain = forward(model)
    with regularize(model, [AttentionEntropyRegularizer(0.1), ActivationDensityRegularizer(0.1, epsilon=0.1)]) as reg:
        torch.manual_seed(1)
        watched = forward(model)
        # bit for bit, except where small attention and its entropy are computed in one node
        assert torch.equal(watched, plain) or (name in ONE_NODE and torch.allclose(watched, plain, rtol=0, atol=1e-6))
        reg.add(watched.sum() * 0).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_value_is_that_of_the_probabilities_the_model_computes() -> None:
    """Hugging Face returns its attention: an independent reading of the same quantity."""
    model = hugging_face("bert", "eager").train()
    ids, valid = tokens(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    callback = AttentionEntropyRegularizer(1.0)
    with regularize(model, [callback]) as reg:
        output = model(ids, attention_mask=valid, output_attentions=True)
        reg.add(output.last_hidden_state.mean())
        got = reg.values["attention_entropy/value"].item()
    layers = []
    for probs in output.attentions:
        p = probs.detach().double()
        entropy = -(p * p.clamp_min(1e-300).log()).sum(-1) / valid.sum(-1).double().log().view(2, 1, 1)
        rows = valid.bool().view(2, 1, 5).expand_as(entropy)
        layers.append(entropy[rows].mean())
    assert got == pytest.approx(torch.stack(layers).mean().item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sdpa_and_eager_give_the_same_entropy_under_padding(kind: str, side: str) -> None:
    values = []
    ids = tokens()
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    valid = valid.flip(1) if side == "left" else valid
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = hugging_face(kind, implementation).train()
        with regularize(model, [AttentionEntropyRegularizer(1.0)]) as reg:
            reg.add(model(ids, attention_mask=valid).last_hidden_state.mean())
            values.append(reg.values["attention_entropy/value"].item())
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_padding_does_not_change_the_entropy() -> None:
    model = hugging_face("bert", "sdpa").train()
    ids = tokens()
    values = []
    for padding in (0, 3):
        padded = F.pad(ids, (0, padding))
        valid = F.pad(torch.ones_like(ids), (0, padding))
        with regularize(model, [AttentionEntropyRegularizer(1.0)]) as reg:
            reg.add(model(padded, attention_mask=valid).last_hidden_state.mean())
            values.append(reg.values["attention_entropy/value"].item())
    assert values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("spelling", ["torch", "functional", "method", "module"])
def test_mil_attention_is_found_in_every_spelling_of_softmax(gated: bool, spelling: str) -> None:
    model = ABMIL(gated=gated, spelling=spelling).train()
    x, mask = bags([4, 4])
    assert fired(model, AttentionEntropyRegularizer(0.1), lambda m: m(x, mask)) == [""]


def test_padded_and_ragged_bags_agree() -> None:
    model = ABMIL(gated=True).train()
    sizes = [2, 5, 7]
    x, mask = bags(sizes)
    values = []
    for run in (
        lambda: model(x, mask),
        lambda: torch.cat([model(x[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(sizes)]),
    ):
        with regularize(model, [AttentionEntropyRegularizer(1.0)]) as reg:
            reg.add(run().mean())
            values.append(reg.values["attention_entropy/value"].item())
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_bag_of_one_instance_is_left_out_without_nan() -> None:
    model = ABMIL(gated=True).train()
    x, mask = bags([1])
    with regularize(model, [AttentionEntropyRegularizer(1.0)]) as reg:
        reg.add(model(x, mask).mean()).backward()
        assert reg.values["attention_entropy/value"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_cross_attention_and_additive_bias_are_part_of_the_definition() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.bias = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.seen = self.q(x)
            return F.scaled_dot_product_attention(self.seen, y, y, attn_mask=self.bias)

    model, x, y = Cross(), torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    with regularize(model, [AttentionEntropyRegularizer(1.0)]) as reg:
        reg.add(model(x, y).sum() * 0).backward()
        got, slope = reg.values["attention_entropy/value"].item(), model.bias.grad.clone()
    bias = model.bias.detach().double().requires_grad_()
    log_p = (model.seen.detach().double() @ y.double().mT / math.sqrt(8) + bias).log_softmax(-1)
    wanted = (-(log_p.exp() * log_p).sum(-1) / math.log(6)).mean()
    (-wanted).backward()
    assert got == pytest.approx(wanted.item(), abs=1e-6)
    torch.testing.assert_close(slope.double(), bias.grad, atol=1e-7, rtol=1e-5)


class Router(nn.Module):
    """A softmax that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1)


def test_softmax_of_routing_and_predictions_is_not_attention() -> None:
    model = nn.Sequential(Router())
    with regularize(model, [AttentionEntropyRegularizer(1.0)]) as reg:
        with pytest.raises(RuntimeError, match="caught no attention"):
            reg.add(model(torch.randn(2, 8)).sum())


def test_softmax_of_a_named_module_is_attention() -> None:
    model = nn.Sequential(Router())
    assert fired(model, AttentionEntropyRegularizer(1.0, targets=Router), lambda m: m(torch.randn(2, 8))) == ["0"]


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (r"blocks\.1\.attn", ["blocks.1.attn"]),
        ("blocks.1", ["blocks.1.attn"]),
        ("attn", ["blocks.0.attn", "blocks.1.attn"]),
        (timm.layers.Attention, ["blocks.0.attn", "blocks.1.attn"]),
        (lambda name, module: name.endswith("0.attn"), ["blocks.0.attn"]),
        (["blocks.0", "blocks.1.attn"], ["blocks.0.attn", "blocks.1.attn"]),
    ],
    ids=["regex", "parent", "ending", "type", "predicate", "list"],
)
def test_targets_select_attention(targets: Any, found: list[str]) -> None:
    callback = AttentionEntropyRegularizer(0.1, targets=targets)
    assert fired(vit(True).train(), callback, lambda m: m(torch.randn(2, 1, 8, 8))) == found


def test_ending_of_a_name_does_not_match_a_longer_number() -> None:
    modules = {f"blocks.{i}": nn.Identity() for i in (1, 10, 11)}
    assert capture.match_targets("blocks.1", modules) == {"blocks.1"}


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("blocks.0.mlp.fc3", ValueError, r"matches no module. Near names: .*blocks.0.mlp.fc2"),
        (nn.LSTM, ValueError, "entry LSTM matches no module"),
        ([], ValueError, "`targets` must not be empty"),
        ("(", ValueError, "not a valid regular expression"),
        ([3], TypeError, "must hold strings, types or predicates, got 3"),
        ("blocks.0.mlp", ValueError, "is a Mlp. Its down-projections: blocks.0.mlp.fc2"),
        ("blocks.0.norm1", ValueError, "must name down-projections"),
    ],
)
def test_wrong_targets_say_what_is_wrong(targets: Any, error: type, message: str) -> None:
    model = vit(True)
    with pytest.raises(error, match=message):
        regularize(model, [ActivationDensityRegularizer(0.1, targets=targets)]).__enter__()
    assert Engine.find(model) is None or not Engine.of(model).sites
    assert not any(capture.SITE in module.__dict__ for module in model.modules())


def test_model_without_mlp_lists_its_linear_maps() -> None:
    with pytest.raises(ValueError, match="no MLP down-projection was found.*the linear maps are 0, 1"):
        regularize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [ActivationDensityRegularizer(0.1)]).__enter__()


def test_target_that_computes_no_attention_is_named() -> None:
    model = vit(True).train()
    with regularize(model, [AttentionEntropyRegularizer(0.1, targets=["attn", "mlp"])]) as reg:
        with pytest.raises(RuntimeError, match="no attention was computed in blocks.0.mlp"):
            reg.add(model(torch.randn(2, 1, 8, 8)).mean())


def test_frozen_prefix_without_gradient_is_named() -> None:
    model = vit(True).train().requires_grad_(False)
    model.head.requires_grad_(True)
    with regularize(model, [ActivationDensityRegularizer(0.1)]) as reg:
        with pytest.raises(RuntimeError, match=r"blocks.0.mlp.fc2: the penalty has no gradient.*allow_unused=True"):
            reg.add(model(torch.randn(2, 1, 8, 8)).mean())


class Latents(nn.Module):
    """Attention between a batch and learned latents, as Perceivers have it; torch broadcasts them."""

    def __init__(self, learned: str, heads: int) -> None:
        super().__init__()
        self.learned, self.project = learned, nn.Linear(4, 8)
        self.latents = nn.Parameter(torch.randn(1, heads, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
        query, key = (self.latents, seen) if self.learned == "query" else (seen, self.latents)
        return F.scaled_dot_product_attention(query, key, key)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("learned", ["query", "key"])
def test_broadcast_latents_are_seen_with_their_gradient(learned: str, heads: int) -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"attention": Latents(learned, heads)}).train(), torch.randn(5, 6, 4)
    plain = model["attention"](x)
    with regularize(model, [AttentionEntropyRegularizer(1.0, objective="minimize", normalize=False)]) as reg:
        output = model["attention"](x)
        reg.add(output.sum() * 0).backward()
        value = reg.values["attention_entropy/value"].item()
    torch.testing.assert_close(output, plain)
    got = model["attention"].latents.grad.clone()
    model.zero_grad()
    seen = model["attention"].project(x).unflatten(-1, (2, 4)).transpose(1, 2)
    pair = (model["attention"].latents, seen) if learned == "query" else (seen, model["attention"].latents)
    log_p = (pair[0] @ pair[1].mT / 2).log_softmax(-1)
    wanted = -(log_p.exp() * log_p).sum(-1).mean()
    wanted.backward()
    assert value == pytest.approx(wanted.item(), abs=1e-6)
    torch.testing.assert_close(got, model["attention"].latents.grad)
