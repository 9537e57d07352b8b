"""QK-clip: after the step the logits of an offending head reach the threshold, and nothing else moves."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer, QKClip, QKNorm, SigmaReparam
from lightning_reg.callbacks.qk_clip import _over_processes
from lightning_reg.engine import Engine
from tests import attentions, tiny
from tests.attentions import BATCH, HEADS, NETS, TOKENS, WIDTH, Fit, Written, inputs, make, max_logits
from tests.test_engine import assert_untouched, scaler

GROUPED = {**attentions.SMALL, "num_key_value_heads": 2}
GROUPS = {"qwen2_rope_gqa": 2, "written": 2, "written_fused_gqa": 2, "eager": 2}


def sharpen(net: nn.Module, name: str) -> None:
    """Larger logits, not alike in all heads."""
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if any(part in key for part in ("attn", "mha", "attention.self", "to_q", "query", "q_lin", "qkv")):
                parameter.mul_(torch.linspace(1.0, 6.0, parameter.shape[-1]))


def by_group(values: Tensor, name: str) -> Tensor:
    groups = GROUPS.get(name, 1)
    return values.unflatten(0, (-1, groups)).amax(1).repeat_interleave(groups)


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_offending_heads_reach_the_threshold_and_others_keep_their_logits(name: str, alpha: float) -> None:
    net = make(name)
    sharpen(net, name)
    (x,) = inputs()
    before = max_logits(net, x)
    threshold = float(by_group(before, name).sort().values[HEADS // 2 - 1] * 1.001)
    wanted = before * (threshold / by_group(before, name)).clamp(max=1.0)
    assert 0 < int((wanted < before).sum()) < HEADS  # some, not all
    tiny.fit(Fit(net), [QKClip(threshold=threshold, alpha=alpha)])
    torch.testing.assert_close(max_logits(net, x), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("alpha", "moved"), [(0.0, "to_k"), (1.0, "to_q")])
def test_alpha_says_which_side_moves(alpha: float, moved: str) -> None:
    net = make("written")
    before = copy.deepcopy(net.state_dict())
    tiny.fit(Fit(net), [QKClip(threshold=1e-3, alpha=alpha)])
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{moved}.weight", f"{moved}.bias"}


def test_every_micro_batch_counts() -> None:
    net, x = make("timm"), inputs(3)
    each = torch.stack([max_logits(net, batch) for batch in x])
    largest = each.amax(0)
    assert (each.argmax(0) != 2).any()  # not the last one alone
    threshold = float(largest.min()) / 2
    tiny.fit(Fit(net, batches=3), [QKClip(threshold=threshold)], accumulate_grad_batches=3)
    after = torch.stack([max_logits(net, batch) for batch in x]).amax(0)
    torch.testing.assert_close(after, torch.full_like(after, threshold), rtol=2e-6, atol=0)


def test_every_says_how_often() -> None:
    seen: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(module.net.to_q.weight.detach().clone())

    net = make("written")
    start = net.to_q.weight.detach().clone()
    calls: list[int] = []
    callback = QKClip(threshold=1e-3, every=3)
    see = callback.see_scores
    callback.see_scores = lambda *args: (calls.append(len(seen)), see(*args))[1]  # type: ignore[method-assign]
    tiny.fit(Fit(net, batches=7), [callback, Look()])
    moved = [not torch.equal(a, b) for a, b in zip([start, *seen], seen, strict=False)]
    assert moved == [False, False, True, False, False, True, False]
    assert calls == [2, 5]


def test_padding_and_float_bias_do_not_count() -> None:
    class Padded(Written):
        def forward(self, x: Tensor) -> Tensor:
            self.to_q.weight.data  # noqa: B018
            q, k, v = (
                part(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)
            )
            hidden = torch.zeros(TOKENS, TOKENS)
            hidden[:, -2:], hidden[:, 0] = -math.inf, 40.0  # padding, and a bias
            return self.last(torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=hidden).transpose(1, 2).flatten(-2))  # fmt: skip

    torch.manual_seed(0)
    net, (x,) = Padded(key_heads=HEADS), inputs()
    loud = x.clone()
    loud[:, -2:] *= 100
    with torch.no_grad():
        q, k = (part(x)[:, :-2].unflatten(-1, (-1, net.dim)) for part in (net.to_q, net.to_k))
        before = torch.einsum("bqhd,bkhd->bhqk", q, k).abs().amax((0, 2, 3)) / net.dim**0.5
    threshold = float(before.min()) / 2
    with regularize(net, [callback := QKClip(threshold=threshold)]) as reg:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        reg.add(net(loud).mean()).backward()
        optimizer.step()
        (layer,) = callback._layers
        torch.testing.assert_close(layer.last[0], before, rtol=1e-5, atol=0)  # type: ignore[index]


def test_clipping_follows_the_optimizer_step() -> None:
    """Parameters are those of a hand-written loop: step, then scale by what the forward saw."""
    net, (x,) = make("written"), inputs()
    twin = copy.deepcopy(net)
    tiny.fit(Fit(net, lr=0.5), [QKClip(threshold=0.2, alpha=0.3)])
    eta = (0.2 / by_group(max_logits(twin, x), "written")).clamp(max=1.0)
    module = Fit(twin, lr=0.5)
    module.training_step([x], 0).backward()
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    with torch.no_grad():
        for part, factors in ((twin.to_q, eta**0.3), (twin.to_k, eta[::2] ** 0.7)):
            part.weight.mul_(factors.repeat_interleave(4).unsqueeze(1))
            part.bias.mul_(factors.repeat_interleave(4))
    assert tiny.distance(tiny.parameters(net), tiny.parameters(twin)) <= 1e-6


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("module", [tiny.Tiny, tiny.Manual], ids=["automatic", "manual"])
def test_checkpointing_neither_loses_nor_doubles(module: type, use_reentrant: bool) -> None:
    def fit(**kwargs: Any) -> Tensor:
        return tiny.fit(module(**kwargs), [QKClip(threshold=0.1, heads=2)])

    assert torch.equal(fit(use_reentrant=use_reentrant), fit())
    assert tiny.distance(fit(), tiny.fit(module())) > 1e-2


def test_each_optimizer_clips_what_it_trains() -> None:
    module = tiny.Adversarial()
    tiny.fit(module, [QKClip(threshold=0.1, heads=2)])
    alone = tiny.fit(tiny.Adversarial(), [QKClip(threshold=0.1, heads=2, targets=["net"])])
    assert not torch.equal(tiny.parameters(module), alone)
    assert torch.equal(tiny.parameters(module.net), alone[: len(alone) // 2])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "fp16"])
def test_precisions(precision: str) -> None:
    arguments: dict[str, Any] = {"plugins": [scaler()]} if precision == "fp16" else {"precision": precision}
    net = make("timm")
    before = max_logits(net, inputs()[0])
    threshold = float(before.min()) / 3
    tiny.fit(Fit(net), [QKClip(threshold=threshold)], **arguments)
    after = max_logits(net.float(), inputs()[0])
    tolerance = 1e-6 if precision == "64-true" else 2e-2
    torch.testing.assert_close(after, torch.full_like(after, threshold), rtol=tolerance, atol=0)


def test_step_that_the_scaler_skips_is_not_clipped() -> None:
    class Overflow(Fit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (math.inf if batch_idx == 0 else 1.0)

    net = make("timm")
    with torch.no_grad():
        net.attn.qkv.weight *= 4
    loud = inputs(2)
    first, second = (max_logits(net, x) for x in loud)
    threshold = float(torch.minimum(first, second).min()) / 2
    tiny.fit(Overflow(net, batches=2), [QKClip(threshold=threshold)], plugins=[scaler()])
    # by the second batch alone: the maxima of the first are gone
    torch.testing.assert_close(max_logits(net, loud[1]), torch.full((HEADS,), threshold, dtype=torch.float64),
                               rtol=2e-2, atol=0)  # fmt: skip


def test_logits_that_are_not_finite_clip_nothing() -> None:
    net = make("timm")
    before = copy.deepcopy(net.state_dict())

    class Broken(Fit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net(batch[0] * 1e38)
            return self.net.attn.proj.bias.sum()  # no gradient passes the attention

    tiny.fit(Broken(net), [QKClip(threshold=1e-3)])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_maximum_that_is_no_number_is_the_largest_for_every_process() -> None:
    """A reduction to the maximum may drop it on one process and keep it on another."""
    one, other = _over_processes([torch.tensor([math.nan, 1.0]), torch.tensor([2.0], dtype=torch.float64)])
    assert one.tolist() == [math.inf, 1.0]
    assert (other.tolist(), other.dtype) == ([2.0], torch.float64)


def test_compiled_attention_equals_eager_without_graph_breaks() -> None:
    def fit(compiled: bool) -> Tensor:
        module = tiny.Tiny(batches=2)
        if compiled:
            torch.compiler.reset()
            module.net.blocks[0].attention.compile(backend="aot_eager", fullgraph=True)
        return tiny.fit(module, [QKClip(threshold=0.1, heads=2)])

    assert tiny.distance(fit(True), fit(False)) <= 1e-6


def test_both_layers_of_torchs_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
    net, (x,) = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), inputs()
    tiny.fit(Fit(net), [QKClip(threshold=0.01)])
    with attentions.recorded() as seen:
        net.train()(x)
    assert seen[0].detach().abs().amax((0, 2, 3)).tolist() == pytest.approx([0.01] * HEADS, rel=1e-5)
    assert len(seen) == 2


# --- what it costs, and what it leaves alone -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_below_the_threshold_every_bit_stays(name: str) -> None:
    plain, clipped = make(name), make(name)
    tiny.fit(Fit(plain, lr=0.1, batches=3))
    tiny.fit(Fit(clipped, lr=0.1, batches=3), [QKClip(threshold=1e3)])
    assert torch.equal(tiny.parameters(plain), tiny.parameters(clipped))


@pytest.mark.parametrize("off", ["infinite", "disabled"])
def test_off_switch_is_bit_identical(off: str) -> None:
    callback = QKClip(threshold=math.inf if off == "infinite" else 1e-3, heads=2)
    callback.enabled = off == "infinite"
    assert torch.equal(tiny.fit(tiny.Tiny(), [callback]), tiny.fit(tiny.Tiny()))


def test_disabled_measures_nothing_and_wakes_up_when_enabled() -> None:
    class Switch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((len(calls), module.net.to_q.weight.detach().clone()))
            callback.enabled = batch_idx == 0

    seen: list[Any] = []
    calls: list[int] = []
    callback = QKClip(threshold=1e-3)
    callback.enabled = False
    see = callback.see_scores
    callback.see_scores = lambda *args: (calls.append(1), see(*args))[1]  # type: ignore[method-assign]
    net = make("written")
    start = net.to_q.weight.detach().clone()
    tiny.fit(Fit(net, batches=3), [callback, Switch()])
    assert [count for count, _ in seen] == [0, 1, 1]
    assert torch.equal(seen[0][1], start)
    assert not torch.equal(seen[1][1], start)
    assert torch.equal(seen[2][1], seen[1][1])


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    net, (x,) = make("written"), inputs()
    with regularize(net, [QKClip(threshold=1e-3)]) as reg:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        for _ in range(2):
            loss = reg.add(net(x).mean())
            loss.backward()
            with NoSync():
                optimizer.step()
        with NoSync():
            net(x)


def test_hand_written_loop_equals_the_trainer() -> None:
    net, twin = make("written"), make("written")
    tiny.fit(Fit(net, lr=0.3, batches=4), [QKClip(threshold=0.05, every=2)])
    module, optimizer = Fit(twin), torch.optim.SGD(twin.parameters(), lr=0.3)
    with regularize(twin, [QKClip(threshold=0.05, every=2)]) as reg:
        for x in inputs(4):
            optimizer.zero_grad()
            reg.add(module.training_step([x], 0)).backward()
            optimizer.step()
    assert torch.equal(tiny.parameters(net), tiny.parameters(twin))
    assert Engine.find(twin) is None


def test_logged_at_logging_steps_only(tmp_path: Path) -> None:
    net = make("timm")
    before = max_logits(net, inputs(4)[1])
    logger = CSVLogger(tmp_path)
    threshold = float(before.sort().values[1:3].mean())
    trainer = tiny.trainer([QKClip(threshold=threshold, every=2)], logger=logger, log_every_n_steps=4)
    trainer.fit(Fit(net, batches=4))
    logger.save()
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {"reg/qk_clip/max_logit", "reg/qk_clip/clipped"} <= set(header.split(","))
    assert len(rows) == 1
    assert "reg/qk_clip/threshold:" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_logged_values_are_those_of_the_step() -> None:
    net = make("timm")
    before = max_logits(net, inputs()[0])
    threshold = float(before.sort().values[:2].mean())
    trainer = tiny.trainer([QKClip(threshold=threshold)], log_every_n_steps=1)
    trainer.fit(Fit(net))
    assert float(trainer.logged_metrics["reg/qk_clip/max_logit"]) == pytest.approx(float(before.max()), rel=1e-6)
    assert float(trainer.logged_metrics["reg/qk_clip/clipped"]) == 0.75


def test_engine_and_other_callbacks_are_left_alone() -> None:
    module = tiny.Tiny()
    callback = QKClip(threshold=0.1, heads=2)
    tiny.fit(module, [AttentionEntropyRegularizer(1.0), callback])
    assert_untouched(module)
    assert Engine.find(module) is None
    assert callback._layers == []
    order = tiny.fit(tiny.Tiny(), [QKClip(threshold=0.1, heads=2), AttentionEntropyRegularizer(1.0)])
    assert torch.equal(tiny.parameters(module), order)


@pytest.mark.parametrize("averaging", ["before", "after"])
def test_averaged_weights_are_clipped_ones(averaging: str) -> None:
    module = tiny.Tiny(batches=1)
    callbacks = [WeightAveraging(avg_fn=lambda averaged, new, count: new), QKClip(threshold=1e-4, heads=2)]
    tiny.fit(module, callbacks[:: 1 if averaging == "before" else -1])
    assert torch.equal(tiny.parameters(module), tiny.fit(tiny.Tiny(batches=1), [QKClip(threshold=1e-4, heads=2)]))


def test_state_remembers_whether_it_acts() -> None:
    callback, other = QKClip(), QKClip()
    callback.enabled = False
    other.load_state_dict(callback.state_dict())
    assert other.enabled is False


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "`threshold` must be a number > 0, got 0.0; `math.inf` clips nothing"),
        ({"threshold": math.nan}, "`threshold` must be a number > 0, got nan"),
        ({"threshold": True}, "`threshold` must be a number > 0, got True"),
        ({"alpha": 1.1}, r"`alpha` must be in \[0, 1\], got 1.1: the share"),
        ({"alpha": math.nan}, r"`alpha` must be in \[0, 1\], got nan"),
        ({"every": 0}, "`every` must be an integer >= 1, got 0: optimizer steps between clips"),
        ({"every": 1.5}, "`every` must be an integer >= 1, got 1.5"),
        ({"heads": 0}, "`heads` must be an integer >= 1, got 0; leave it out"),
        ({"heads": True}, "`heads` must be an integer >= 1, got True"),
        ({"name": ""}, "`name` must not be empty"),
    ],
    ids=["zero", "nan", "bool", "alpha", "alpha_nan", "every", "every_float", "heads", "heads_bool", "name"],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QKClip(**arguments)


def frozen() -> nn.Module:
    net = make("written")
    net.to_k.weight.requires_grad_(False)
    return net


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_old_weight_norm_is_refused() -> None:
    net = make("written")
    net.to_q = weight_norm(net.to_q)
    with pytest.raises(ValueError, match="the weight of 'net.to_q' is parametrized"):
        tiny.fit(Fit(net), [QKClip()])


def parametrized() -> nn.Module:
    net = make("written")
    net.to_k = parametrizations.weight_norm(net.to_k)
    return net


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = base, nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def lora() -> nn.Module:
    net = make("written")
    net.to_q = Lora(net.to_q)
    return net


def tied() -> nn.Module:
    net = Written(key_heads=HEADS)
    net.to_k.weight = net.to_q.weight
    return net


def quantised() -> nn.Module:
    net = make("written")
    net.to_q.weight = nn.Parameter(net.to_q.weight.data.to(torch.int8), requires_grad=False)
    return net


REFUSED: dict[str, tuple[Any, str]] = {
    "timm_norm": (
        lambda: attentions.Timm(qk_norm=True, norm_layer=nn.LayerNorm),
        r"'net.attn' normalises its queries and keys \('q_norm'\)",
    ),
    "qwen3": (
        lambda: transformers.Qwen3Model(transformers.Qwen3Config(**GROUPED, head_dim=4)),
        r"normalises its queries and keys \('q_norm'\)",
    ),
    "frozen": (frozen, "the weight of 'net.to_k' is frozen, and clipping would change it"),
    "weight_norm": (parametrized, "the weight of 'net.to_k' is parametrized"),
    "lora": (lora, r"the weight of 'net.to_q' is wrapped \(Lora, as of LoRA\)"),
    "tied": (tied, "'net' shares the weight of a query or key projection with 'net'"),
    "quantised": (quantised, "the weight of 'net.to_q' is quantised"),
    "no_attention": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)), "QKClip found no attention"),
    "latent": (
        lambda: transformers.DeepseekV3Model(transformers.DeepseekV3Config(**attentions.SMALL)),
        "is a latent attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_clipped_is_refused(name: str) -> None:
    build, message = REFUSED[name]
    module = Fit(build())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        tiny.fit(module, [QKClip(threshold=1e-3)])
    assert_untouched(module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("other", [lambda: QKNorm(heads=2), SigmaReparam], ids=["qk_norm", "sigma_reparam"])
def test_callbacks_that_undo_the_scale_are_refused(other: Any, order: int) -> None:
    callbacks = [QKClip(heads=2), other()]
    with pytest.raises(ValueError, match=r"normalises its queries and keys \('q_norm'\)|is parametrized"):
        tiny.fit(tiny.Tiny(), callbacks[:: 1 if order else -1])


def test_targets_limit_and_two_instances_may_not_overlap() -> None:
    module = tiny.Tiny()
    before = [block.attention.qkv.weight.detach().clone() for block in module.net.blocks]
    tiny.fit(module, [QKClip(threshold=1e-4, heads=2, targets=r"blocks\.1\.attention")], max_steps=1)
    plain = tiny.Tiny()
    tiny.fit(plain, max_steps=1)
    weights = [[block.attention.qkv.weight for block in model.net.blocks] for model in (module, plain)]
    assert torch.equal(weights[0][0], weights[1][0])
    assert not torch.equal(weights[0][1], weights[1][1])
    assert before
    with pytest.raises(ValueError, match="both select 'net.blocks.0.attention', which would be clipped twice"):
        tiny.fit(tiny.Tiny(), [QKClip(heads=2), QKClip(heads=2, name="other")])
    with pytest.raises(ValueError, match="`targets` select net.blocks.0.fc1, where no attention was found"):
        tiny.fit(tiny.Tiny(), [QKClip(heads=2, targets="blocks.0.fc1")])


def test_sharded_strategies_are_refused() -> None:
    trainer = tiny.trainer([])
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(RuntimeError, match="QKClip does not work with FSDPStrategy"):
        QKClip().setup(trainer, tiny.Tiny(), "fit")


class Idle(tiny.Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.idle = tiny.Block()


def test_attention_that_does_not_run_is_named_or_allowed() -> None:
    with pytest.raises(RuntimeError, match="`qk_clip`: no attention was seen in idle.attention in the first measured"):
        tiny.fit(Idle(), [QKClip(heads=2)])
    tiny.fit(Idle(), [QKClip(heads=2, allow_unused=True)])


class Unseen(Written):
    def forward(self, x: Tensor) -> Tensor:
        q, k = self.to_q(x), self.to_k(x)
        return self.last((q @ k.transpose(-1, -2)).sigmoid() @ self.to_v(x))


def test_attention_that_cannot_be_seen_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no attention was seen in net in the first measured step"):
        tiny.fit(Fit(Unseen(key_heads=HEADS)), [QKClip(allow_unused=True)])


def test_heads_on_another_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the 8 heads of 'net.blocks.0.attention' are not on the axis before"):
        tiny.fit(tiny.Tiny(), [QKClip(heads=8)])


def test_torch_returning_its_weights_is_seen_as_scores() -> None:
    class Weights(attentions.Torch):
        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x)[0]

    torch.manual_seed(0)
    net, (x,) = Weights(), inputs()
    tiny.fit(Fit(net), [QKClip(threshold=1e-2)])
    with attentions.recorded() as seen:
        attentions.Torch.forward(net, x)
    assert seen[0].abs().amax((0, 2, 3)).tolist() == pytest.approx([1e-2] * HEADS, rel=1e-5)
    assert len(seen[0]) == BATCH
