"""Substitution of activations: every kind of MLP, its undo, its record in a checkpoint, its folding."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lightning_reg.activations import (
    FATReLU,
    ReLU2,
    StatisticalTopK,
    TopK,
    activation_record,
    fold_activations,
    gives_zeros,
    load_activations,
    make_activation,
    restore_activations,
    substitute_activations,
)
from lightning_reg.functional import statistical_topk, topk

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


class Plain(nn.Module):
    """An activation in a function attribute, as in many hand-written models."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act_fn = nn.Linear(16, 32), nn.Linear(32, 16), act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act_fn(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(16, 64)
        else:
            self.w1, self.w3 = nn.Linear(16, 32), nn.Linear(16, 32)
        self.act, self.w2 = nn.SiLU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.w1(x), self.w3(x))
        return self.w2(self.act(gate) * up)


class Inline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def shared() -> nn.Module:
    act = nn.GELU()
    blocks = [Plain() for _ in range(2)]
    for block in blocks:
        block.act_fn = act
    return nn.Sequential(*blocks)


def encoder(activation: Any = "gelu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=activation, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**SMALL, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    )


def vit() -> nn.Module:
    return timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 32), nn.SiLU(), nn.Dropout(), nn.Linear(32, 16)
    )


pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "attribute": (Plain, X), "partial": (lambda: Plain(partial(F.gelu, approximate="tanh")), X),
    "gated": (Gated, X), "fused": (lambda: Gated(True), X), "shared": (shared, X), "sequential": (sequential, X),
    "encoder": (encoder, X), "encoder_function": (lambda: encoder(F.silu), X), "bert": (bert, IDS),
    "llama": (llama, IDS), "gpt2": (gpt2, IDS), "phi3": (phi3, IDS), "timm": (vit, IMAGES),
}  # fmt: skip
MLPS = {"attribute": 1, "partial": 1, "gated": 1, "fused": 1}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    build, x = MODELS[name]
    return build().eval(), x


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out[0]


def zeros_in_hidden(model: nn.Module, x: Tensor) -> list[float]:
    """Share of exact zeros in what enters each down-projection."""
    names = {"fc2", "w2", "c_proj", "down_proj", "linear2", "dense", "2", "6"}
    shares: list[float] = []

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        if args[0].shape[-1] in (32, 64):
            shares.append((args[0] == 0).float().mean().item())

    hooks = [m.register_forward_pre_hook(see) for n, m in model.named_modules() if n.rpartition(".")[2] in names]
    model.train()  # torch's encoder calls no submodule in evaluation
    run(model, x)
    model.eval()
    for hook in hooks:
        hook.remove()
    return [share for share in shares if share > 0]


@pytest.mark.parametrize("name", MODELS)
def test_relu_takes_the_place_of_the_activation(name: str) -> None:
    model, x = make(name)
    keys, before = list(model.state_dict()), run(model, x)
    paths = substitute_activations(model, "relu")
    count = MLPS.get(name, 2)
    assert len(paths) == count
    assert len(zeros_in_hidden(model, x)) == count
    assert list(model.state_dict()) == keys
    assert not torch.equal(run(model, x), before)
    assert substitute_activations(model, "relu") == []


@pytest.mark.parametrize("name", MODELS)
def test_substitution_is_undone_also_in_a_copy(name: str) -> None:
    model, x = make(name)
    described, before = str(model), run(model, x)
    paths = substitute_activations(model, "topk")
    again = substitute_activations(model, "relu2")
    duplicate = copy.deepcopy(model)
    assert sorted(again) == sorted(paths)
    for part in (model, duplicate):
        assert sorted(restore_activations(part)) == sorted(paths)
        assert restore_activations(part) == []
        assert str(part) == described
        assert torch.equal(run(part, x), before)


@pytest.mark.filterwarnings("ignore:the .*Config of the model says")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", ["relu", "fatrelu"])
def test_folded_model_is_plain_and_gives_the_same_bits(name: str, activation: str) -> None:
    model, x = make(name)
    substitute_activations(model, FATReLU(0.07) if activation == "fatrelu" else "relu")
    before = run(model, x)
    plain = fold_activations(model)
    assert plain is model
    assert not any(type(part).__module__.startswith("lightning_reg") for part in plain.modules())
    assert restore_activations(plain) == []
    assert torch.equal(run(plain, x), before)
    buffer = io.BytesIO()
    torch.save(plain, buffer)  # pickled whole: nothing of the library is in it
    assert b"lightning_reg" not in buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "said"), [("llama", "silu"), ("bert", "gelu"), ("gpt2", "gelu_new"), ("t5", "gelu_new")]
)
def test_folding_warns_where_a_config_would_be_saved_with_the_old_activation(name: str, said: str) -> None:
    config = transformers.T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50,
                                   feed_forward_proj="gated-gelu")  # fmt: skip
    model = transformers.T5EncoderModel(config) if name == "t5" else make(name)[0]
    substitute_activations(model, "relu")
    with pytest.warns(UserWarning, match=f"='{said}', and `save_pretrained` will write that. Set it to 'relu' first"):
        fold_activations(model)


@pytest.mark.filterwarnings("ignore:the .*Config of the model says")
def test_torch_activations_of_any_kind_fold_by_staying() -> None:
    model = Plain()
    substitute_activations(model, nn.SiLU())
    assert type(fold_activations(model).act_fn) is nn.SiLU
    assert restore_activations(model) == []
    assert substitute_activations(fold_activations(shift(Plain(F.relu))), "relu") == []  # a folded threshold stays


def shift(model: nn.Module) -> nn.Module:
    substitute_activations(model, FATReLU(0.2))
    return model


class Two(nn.Module):
    """Two MLPs in one module, with one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(16, 32), nn.Linear(32, 16), nn.ReLU()
        self.fc3, self.fc4 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc4(self.act(self.fc3(self.fc2(self.act(self.fc1(x))))))


def test_activation_of_two_mlps_is_replaced_for_both_or_not_at_all() -> None:
    model = Two()
    with pytest.raises(ValueError, match="'act' serves the MLPs of 'fc2' and 'fc4': select both"):
        substitute_activations(model, "topk", targets="fc2")
    assert type(model.act) is nn.ReLU
    assert substitute_activations(model, "topk") == ["act"]


class Head(Inline):
    """The only activation in an attribute is not that of the MLP."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(16, 16), nn.SiLU())
        if where == "gate":
            self.sigmoid = nn.Sigmoid()
        elif where == "factory":
            self.act_layer = partial(nn.GELU, approximate="tanh")


@pytest.mark.parametrize("where", ["stem", "gate", "factory"])
def test_activations_of_other_things_are_left_alone(where: str) -> None:
    model = Head(where)
    described = str(model)
    with pytest.raises(ValueError, match="calls its activation inline"):
        substitute_activations(model, "relu")
    assert str(model) == described
    squeeze = timm.create_model("efficientnet_b0")
    assert not any("gate" in path for path in substitute_activations(squeeze, "relu"))


def test_attention_by_another_name_is_no_mlp() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = *(nn.Linear(16, 32) for _ in range(3)), nn.Linear(32, 16)

    class Camel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.SelfAttention = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))

    for model in (Mixer(), Camel()):
        with pytest.raises(ValueError, match="no MLP down-projection was found"):
            substitute_activations(model, "relu")


def test_what_looks_at_the_last_axis_is_refused_for_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.GELU(), nn.Conv2d(16, 4, 1))
    for activation in ("topk", "statistical_topk", FATReLU(torch.ones(16))):
        with pytest.raises(ValueError, match="looks at the last axis, but the channels of '2', a convolution"):
            substitute_activations(model, activation)
    assert substitute_activations(model, "relu2") == ["1"]


def test_compiled_and_checkpointed_mlps_are_found() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for wrap in (lambda mlp: torch.compile(mlp, backend="eager"), checkpoint_wrapper):
        model = nn.Sequential(wrap(Plain()))
        assert substitute_activations(model, "relu") == ["0.act_fn"]
        assert (model(X) == model(X)).all()
        restore_activations(model)


def test_padded_batches_pass_torchs_encoder_in_evaluation() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        before = model(X, src_key_padding_mask=padding)
        substitute_activations(model, "relu2")
        model(X, src_key_padding_mask=padding)
        restore_activations(model)
        assert model.use_nested_tensor
        assert torch.equal(model(X, src_key_padding_mask=padding), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_folded_threshold_cuts_as_the_trained_one(dtype: torch.dtype) -> None:
    model = Plain()
    substitute_activations(model, FATReLU(0.1))
    x = torch.cat([torch.linspace(-1, 1, 3001), torch.tensor([0.1])]).to(dtype)
    before = model.act_fn(x)
    assert torch.equal(fold_activations(model).act_fn(x), before)


@pytest.mark.parametrize(
    "activation",
    ["relu", "relu2", "shifted_relu", "fatrelu", "topk", "statistical_topk", FATReLU(torch.rand(32)),
     FATReLU(0.2, sharpness=30.0), TopK(0.3, straight_through=False), StatisticalTopK(0.7)],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)  # fmt: skip
@pytest.mark.parametrize("name", ["attribute", "gated", "encoder"])
def test_record_rebuilds_the_trained_model(name: str, activation: Any) -> None:
    model, x = make(name)
    substitute_activations(model, activation)
    buffer = io.BytesIO()
    torch.save({"callbacks": {"other": {"state": 1}, "this": {"activations": activation_record(model)}}}, buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=True)
    plain, _ = make(name)
    load_activations(plain, checkpoint)
    assert torch.equal(run(plain, x), run(model, x))


def test_drelu_rectifies_both_branches() -> None:
    for name in ("gated", "fused", "llama", "phi3"):
        model, x = make(name)
        keys, before = list(model.state_dict()), run(model, x)
        substitute_activations(model, "drelu")
        assert all(share > 0.6 for share in zeros_in_hidden(model, x))
        duplicate, (other, _) = copy.deepcopy(model), make(name)
        load_activations(other, activation_record(model))
        assert torch.equal(run(other, x), run(model, x))
        assert torch.equal(run(duplicate, x), run(model, x))
        assert list(model.state_dict()) == keys
        for part in (model, duplicate, other):
            restore_activations(part)
            assert torch.equal(run(part, x), before)
    model = Gated()
    substitute_activations(model, "drelu")
    wanted = model.w2(F.relu(F.linear(X, model.w1.weight, model.w1.bias)) * F.linear(
        X, model.w3.weight, model.w3.bias).relu())  # fmt: skip
    torch.testing.assert_close(model(X), wanted)


def test_evaluation_path_of_torch_encoder_uses_the_substitute() -> None:
    for activation in ("relu", "relu2", "fatrelu"):
        model, x = make("encoder")
        substitute_activations(model, activation)
        fast = run(model, x)
        model.train()
        torch.testing.assert_close(fast, run(model, x), rtol=1e-4, atol=1e-5)
        restore_activations(model)
        assert all(layer.activation_relu_or_gelu == 2 for layer in model.layers)


def test_modules_compute_the_functions() -> None:
    x = torch.randn(4, 9)
    assert torch.equal(ReLU2()(x), x.relu() ** 2)
    assert torch.equal(TopK(0.4)(x), topk(x.relu(), 0.4))
    assert torch.equal(StatisticalTopK(0.6)(x), statistical_topk(x, 0.6))
    assert [repr(m) for m in (FATReLU(0.1), FATReLU(torch.ones(3)), TopK(), StatisticalTopK())] == [
        "FATReLU(0.1)", "FATReLU((3,))", "TopK(0.1, straight_through=True)", "StatisticalTopK(0.95)",
    ]  # fmt: skip
    assert FATReLU(torch.tensor(0.5)).threshold == 0.5
    assert list(FATReLU(torch.ones(3)).state_dict()) == []
    assert FATReLU(torch.ones(3)).to(torch.float64).threshold.dtype == torch.float64


def test_targets_choose_the_mlps() -> None:
    model, x = make("timm")
    assert substitute_activations(model, "relu", targets=r"blocks\.1\.mlp\.fc2") == ["blocks.1.mlp.act"]
    assert len(zeros_in_hidden(model, x)) == 1


def test_activation_that_is_there_already_stays_the_users() -> None:
    model = Plain(F.relu)
    assert substitute_activations(model, "relu") == []
    assert model.act_fn is F.relu
    shifted = Plain()
    substitute_activations(shifted, FATReLU(0.3))
    assert substitute_activations(shifted, "relu") == []  # a calibrated threshold stays


@pytest.mark.parametrize(
    ("activation", "zeros"),
    [
        (nn.ReLU(), True), (F.relu, True), (ReLU2(), True), (TopK(), True), (FATReLU(), True), (nn.GELU(), False),
        (F.silu, False), (torch.tanh, False), (transformers.activations.ACT2FN["gelu_new"], False),
        (transformers.activations.ACT2FN["relu2"], True), (nn.PReLU(), None), (lambda x, y: x, None),
        (lambda x: None, None), (nn.LeakyReLU(), False), (nn.Hardswish(), True),
    ],
)  # fmt: skip
def test_smooth_activations_are_recognised(activation: Any, zeros: bool | None) -> None:
    assert gives_zeros(activation) is zeros


# --- bad input -------------------------------------------------------------------------------------------------------


class Learned(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.PReLU()


@pytest.mark.parametrize(
    ("model", "activation", "message"),
    [
        (nn.Sequential(Plain(), Inline()), "relu", "the MLP of '1.fc2' calls its activation inline.*attribute"),
        (nn.Sequential(Plain(), Learned()), "relu", r"'1.act_fn' \(PReLU\) has parameters"),
        (nn.Sequential(Gated(), Plain()), "drelu", "'drelu'` needs a gated MLP; that of '1.fc2' is not. Use 'relu'"),
        (nn.Linear(3, 3), "relu", "no MLP down-projection was found"),
        (Plain(), "gelu", "`activation` must be one of 'relu', .* or a module, got 'gelu'"),
    ],
    ids=["inline", "parameters", "not_gated", "no_mlp", "unknown"],
)
def test_what_cannot_be_substituted_leaves_the_model_alone(model: nn.Module, activation: str, message: str) -> None:
    described = str(model)
    with pytest.raises(ValueError, match=message):
        substitute_activations(model, activation)
    assert str(model) == described
    assert activation_record(model) == {}


def test_activation_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a name or a module, got int"):
        make_activation(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), torch.tensor([0.1, -0.1]), torch.zeros(2, 2)])
def test_bad_thresholds_are_refused(threshold: Any) -> None:
    with pytest.raises(ValueError, match="`threshold` must be"):
        FATReLU(threshold)


def test_record_that_does_not_fit_is_refused() -> None:
    trained, other = nn.Sequential(Plain(), Gated()), nn.Sequential(Plain())
    substitute_activations(trained, "relu")
    record = activation_record(trained)
    with pytest.raises(ValueError, match="the checkpoint substituted 1.act, which this model does not have"):
        load_activations(other, record)
    assert activation_record(other) == {}
    with pytest.raises(ValueError, match="holds no substituted activations"):
        load_activations(other, {"callbacks": {}, "state_dict": {}})


class Mine(nn.ReLU):
    pass


def test_module_of_ones_own_is_trained_with_but_not_rebuilt() -> None:
    model = Plain()
    substitute_activations(model, Mine())
    assert type(model.act_fn) is Mine
    with pytest.raises(ValueError, match="by a Mine of your own, .* call `substitute_activations` with it"):
        load_activations(Plain(), activation_record(model))


@pytest.mark.parametrize(
    "activation",
    [
        "relu2",
        "shifted_relu",
        "topk",
        "statistical_topk",
        "drelu",
        FATReLU(torch.rand(32)),
        FATReLU(0.1, sharpness=2.0),
    ],
)
def test_what_torch_does_not_have_is_not_folded(activation: Any) -> None:
    model = Gated()
    substitute_activations(model, activation)
    described = str(model)
    with pytest.raises(ValueError, match="no torch module computes .*: only ReLU and FATReLU with one hard threshold"):
        fold_activations(model)
    assert str(model) == described
