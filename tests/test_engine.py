"""The case matrix: parameters after training equal those of a hand-written `training_step`, to rounding."""

import gc
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_reg import regularize, rewriting
from lightning_reg.callbacks import (
    ActivationHoyerRegularizer,
    ActivationL1Regularizer,
    AttentionEntropyRegularizer,
)
from lightning_reg.capture import SITE
from lightning_reg.engine import Engine
from tests import tiny

EXACT, DIFFERENT = 1e-6, 1e-3


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    # name: module, its arguments, trainer arguments
    "plain": (tiny.Tiny, {}, {}),
    "accumulate_ragged": (tiny.Tiny, {}, {"accumulate_grad_batches": 3}),
    "clip_norm": (tiny.Tiny, {}, {"gradient_clip_val": 0.5}),
    "clip_value": (tiny.Tiny, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "float64": (tiny.Tiny, {}, {"precision": "64-true"}),
    "returns_dict": (tiny.Tiny, {"returns": "dict"}, {}),
    "returns_none": (tiny.Tiny, {"returns": "none"}, {}),
    # in float64: the gradient of a key bias is 0 but for rounding, which Adam would blow up to a full step
    "adamw_float64": (tiny.Tiny, {"optimizer": "adam"}, {"precision": "64-true"}),
    # in float64: in float32 rounding, which differs between machines, decides between the branches of a line search
    "lbfgs_strong_wolfe_float64": (
        tiny.Tiny,
        {"optimizer": "lbfgs", "batches": 24, "iterations": 1},
        {"precision": "64-true"},
    ),
    "lbfgs_iterated_float64": (tiny.Tiny, {"optimizer": "lbfgs", "batches": 3}, {"precision": "64-true"}),
    "manual_accumulate": (tiny.Manual, {}, {}),
    "manual_two_optimizers": (tiny.Adversarial, {}, {}),
    "nonreentrant_checkpoint": (tiny.Tiny, {"use_reentrant": False}, {}),
    "reentrant_checkpoint": (tiny.Tiny, {"use_reentrant": True}, {}),
    "nonreentrant_accumulate": (tiny.Tiny, {"use_reentrant": False}, {"accumulate_grad_batches": 3}),
    "reentrant_accumulate": (tiny.Tiny, {"use_reentrant": True}, {"accumulate_grad_batches": 3}),
    "reentrant_manual": (tiny.Manual, {"use_reentrant": True}, {}),
    "sanity_validation": (tiny.Tiny, {}, {"limit_val_batches": 2, "num_sanity_val_steps": 2, "val_check_interval": 4}),
}


def reference(module: type, arguments: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor:
    """Hand-written, without checkpointing, which does not change the mathematics."""
    return tiny.fit(module(handwritten=True, **{**arguments, "use_reentrant": None}), **settings)


@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_handwritten_loss(case: str) -> None:
    module, arguments, settings = CASES[case]
    wanted = reference(module, arguments, settings)
    assert tiny.distance(tiny.fit(module(**arguments), tiny.regularizers(), **settings), wanted) <= EXACT
    assert tiny.distance(tiny.fit(module(**arguments), **settings), wanted) > DIFFERENT


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    # rounding of the whole model in that precision: the reference keeps no tap, so operations round elsewhere
    [({"precision": "bf16-mixed"}, 2e-3), ({"precision": "bf16-true"}, 1e-2), ({"plugins": [scaler]}, 2e-4)],
    ids=["bf16_mixed", "bf16_true", "fp16_gradscaler"],
)
def test_low_precision_differs_by_rounding_only(
    settings: dict[str, Any], tolerance: float, use_reentrant: bool | None
) -> None:
    def fresh() -> dict[str, Any]:
        return {key: [make() for make in value] if key == "plugins" else value for key, value in settings.items()}

    wanted = tiny.fit(tiny.Tiny(handwritten=True), **fresh())
    got = tiny.fit(tiny.Tiny(use_reentrant=use_reentrant), tiny.regularizers(), **fresh())
    assert tiny.distance(got, wanted) <= tolerance
    assert tiny.distance(tiny.fit(tiny.Tiny(), **fresh()), wanted) > DIFFERENT


@pytest.mark.parametrize("part", ["block", "net", "attention", "module"])
def test_compiled_training_equals_eager_without_graph_breaks(part: str) -> None:
    from torch._dynamo.utils import counters

    wanted = reference(tiny.Tiny, {}, {"accumulate_grad_batches": 3})
    torch.compiler.reset()
    counters.clear()
    module = tiny.Tiny()
    if part == "block":
        for block in module.net.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    elif part == "attention":
        module.net.blocks[0].attention.compile(backend="aot_eager", fullgraph=True)
    elif part == "net":
        module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
    target = torch.compile(module, backend="aot_eager") if part == "module" else module
    tiny.trainer(tiny.regularizers(), accumulate_grad_batches=3).fit(target)
    assert tiny.distance(tiny.parameters(module), wanted) <= EXACT
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0


def test_inductor_equals_eager() -> None:
    wanted = reference(tiny.Tiny, {}, {})
    torch.compiler.reset()
    module = tiny.Tiny()
    for block in module.net.blocks:
        block.compile(fullgraph=True)
    tiny.trainer(tiny.regularizers()).fit(module)
    assert tiny.distance(tiny.parameters(module), wanted) <= EXACT


def test_compiled_blocks_share_code() -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    module = tiny.Tiny()
    module.net = tiny.Net(depth=12)
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    tiny.trainer(tiny.regularizers()).fit(module)
    # the first block's input needs no gradient, the others' does
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_compiled_net_that_holds_a_checkpoint_equals_eager(use_reentrant: bool) -> None:
    wanted = reference(tiny.Tiny, {}, {})
    torch.compiler.reset()
    module = tiny.Tiny(use_reentrant=use_reentrant)
    module.net.compile(backend="aot_eager")
    tiny.trainer(tiny.regularizers()).fit(module)
    assert tiny.distance(tiny.parameters(module), wanted) <= EXACT


def test_compiled_blocks_inside_a_nonreentrant_checkpoint_equal_eager() -> None:
    settings = {"accumulate_grad_batches": 3}
    wanted = reference(tiny.Tiny, {}, settings)
    torch.compiler.reset()
    module = tiny.Tiny(use_reentrant=False)
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert tiny.distance(tiny.fit(module, tiny.regularizers(), **settings), wanted) <= EXACT


def test_compiled_block_inside_reentrant_checkpoint_raises() -> None:
    torch.compiler.reset()
    module = tiny.Tiny(use_reentrant=True)
    for block in module.net.blocks:
        block.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        tiny.trainer(tiny.regularizers()).fit(module)
    assert_untouched(module)


def test_compiled_before_the_fit_is_compiled_again() -> None:
    wanted = tiny.Tiny(handwritten=True)
    tiny.fit(wanted)
    tiny.fit(wanted)
    torch.compiler.reset()
    module = tiny.Tiny()
    reference = tiny.Tiny(handwritten=True)
    module.net.compile(backend="aot_eager")
    tiny.fit(module)  # without callbacks: the compiled code holds no hooks
    reference.handwritten = False
    tiny.fit(reference)
    reference.handwritten = True
    tiny.fit(reference)
    assert tiny.distance(tiny.fit(module, tiny.regularizers()), tiny.parameters(reference)) <= EXACT


def test_two_fits_equal_two_handwritten_fits() -> None:
    module, wanted, callbacks = tiny.Tiny(), tiny.Tiny(handwritten=True), tiny.regularizers()
    for _ in range(2):
        tiny.fit(module, callbacks)
        tiny.fit(wanted)
    assert tiny.distance(tiny.parameters(module), tiny.parameters(wanted)) <= EXACT


class Crashing(tiny.Tiny):
    crash: str | None = "training_step"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.crash == "training_step" and batch_idx == 2:
            raise RuntimeError("crash")
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self.crash == "backward":
            raise RuntimeError("crash")

    def on_train_start(self) -> None:
        if self.crash == "start":
            raise RuntimeError("crash")

    def on_validation_start(self) -> None:
        if self.crash == "validation":
            raise RuntimeError("crash")


@pytest.mark.parametrize("crash", ["training_step", "backward", "start", "validation"])
def test_fit_after_a_crash_equals_the_handwritten_loss(crash: str) -> None:
    module, wanted = Crashing(), Crashing(handwritten=True)
    module.crash = wanted.crash = crash
    for one, callbacks in ((module, tiny.regularizers()), (wanted, None)):
        with pytest.raises(RuntimeError, match="^crash$"):
            tiny.fit(one, callbacks, limit_val_batches=1)
        assert_untouched(one)
        one.crash = None
        one.train()  # a crash in validation leaves evaluation mode behind
    got = tiny.fit(module, tiny.regularizers())
    assert tiny.distance(got, tiny.fit(wanted)) <= EXACT


def assert_untouched(module: torch.nn.Module) -> None:
    """Nothing of the library is left on the model or on torch."""
    gc.collect()  # models of other tests, whose cap holds torch's attention
    rewriting.release_unused()
    assert Engine.find(module) is None
    assert not {"training_step", "manual_backward", "configure_model"} & set(module.__dict__)
    for part in module.modules():
        assert SITE not in part.__dict__
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    assert F.softmax.__module__ == "torch.nn.functional"
    assert torch.softmax.__module__ is None or "lightning_reg" not in torch.softmax.__module__
    assert "lightning_reg" not in (getattr(torch.Tensor.softmax, "__module__", None) or "")


@pytest.mark.parametrize("case", ["plain", "manual_two_optimizers", "reentrant_checkpoint"])
def test_model_is_as_it_was_after_the_fit(case: str) -> None:
    module, arguments, settings = CASES[case]
    trained, plain = module(**arguments), module(**arguments)
    tiny.fit(trained, tiny.regularizers(), **settings)
    tiny.fit(plain, **settings)
    assert_untouched(trained)
    assert set(trained.__dict__) == set(plain.__dict__)


class Watching(tiny.Tiny):
    """Notes whether anything of ours is in place during validation and prediction."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in self.modules())
        assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
        super().validation_step(batch, batch_idx)


def test_validation_runs_without_hooks_or_patches() -> None:
    tiny.fit(Watching(), tiny.regularizers(), limit_val_batches=2, val_check_interval=2, num_sanity_val_steps=2)


def test_prediction_after_the_fit_is_that_of_the_plain_model() -> None:
    module = tiny.Tiny()
    trainer = tiny.trainer(tiny.regularizers())
    trainer.fit(module)
    plain = tiny.Tiny()
    plain.load_state_dict(module.state_dict())
    (x,) = next(iter(tiny.loader(1)))
    assert torch.equal(module.eval()(x), plain.eval()(x))


class Teacher(tiny.Tiny):
    """A training step that also runs the model without gradient, as self-distillation does."""

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.net(x.roll(1, 1))
        loss = (self.net(x) - target).square().mean()
        return loss + tiny.handwritten_penalty(self.net, x) if self.handwritten else loss


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
def test_forward_without_gradient_is_not_counted(use_reentrant: bool | None) -> None:
    wanted = tiny.fit(Teacher(handwritten=True))
    assert tiny.distance(tiny.fit(Teacher(use_reentrant=use_reentrant), tiny.regularizers()), wanted) <= EXACT


class GradientPenalty(tiny.Tiny):
    """Differentiates the network a second time inside the loss."""

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (slope,) = torch.autograd.grad(self.net(x).square().mean(), x, create_graph=True)
        loss = slope.square().sum()
        return loss + tiny.handwritten_penalty(self.net, x) if self.handwritten else loss


def test_double_backward_through_taps_is_exact() -> None:
    wanted = tiny.fit(GradientPenalty(handwritten=True))
    assert tiny.distance(tiny.fit(GradientPenalty(), tiny.regularizers()), wanted) <= EXACT


class Unfused(tiny.Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, tiny.HEADS, width // tiny.HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (width // tiny.HEADS) ** -0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "softmax"])
def test_several_entropies_of_one_attention_are_exact(fused: bool, use_reentrant: bool | None) -> None:
    """Three regularizers on the same scores, two of them the whole row and one its two largest scores."""

    def run(use_reentrant: bool | None) -> torch.Tensor:
        module = tiny.Tiny(use_reentrant=use_reentrant)
        if not fused:
            for block in module.net.blocks:
                other = Unfused()
                other.load_state_dict(block.attention.state_dict())
                block.attention = other
        callbacks = [
            tiny.AttentionEntropyRegularizer(1.5, name="a"),
            tiny.AttentionEntropyRegularizer(1.0, name="b", top_k=2, objective="minimize"),
            tiny.AttentionEntropyRegularizer(0.5, name="c"),
            tiny.AttentionEntropyRegularizer(0.0, name="d", top_k=3),
        ]
        return tiny.fit(module, callbacks)

    def term(net: tiny.Net, x: torch.Tensor) -> torch.Tensor:
        terms = []
        for block in net.blocks:
            q, k, _ = block.attention.qkv(x).view(*x.shape[:2], 3, tiny.HEADS, -1).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT / 2
            whole, two = scores.log_softmax(-1), scores.topk(2).values.log_softmax(-1)
            entropy = [-(log_p.exp() * log_p).sum(-1).mean() for log_p in (whole, two)]
            terms.append(-2.0 * entropy[0] / math.log(tiny.TOKENS) + entropy[1] / math.log(2))
            x = block(x)
        return torch.stack(terms).mean()

    class Handwritten(tiny.Tiny):
        def loss(self, x: torch.Tensor) -> torch.Tensor:
            return super().loss(x) + term(self.net, x)

    assert tiny.distance(run(use_reentrant), tiny.fit(Handwritten())) <= EXACT


class Sparse(tiny.Tiny):
    """Writes the L1 and the Hoyer-square of the hidden activations, and the L1 of what enters them, by hand."""

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        loss = (self(x) - x.roll(1, 1)).square().mean()
        if not self.handwritten:
            return loss
        terms = []
        for block in self.net.blocks:
            x = x + block.attention(x)
            before = block.fc1(x)
            hidden = torch.tanh(before)
            l1, square = hidden.abs().sum(-1), hidden.square().sum(-1)
            terms.append(0.5 * hidden.abs().mean() + 2.0 * (l1.square() / square).mean() / hidden.shape[-1])
            terms[-1] = terms[-1] + 0.3 * (before.clamp_min(-0.5) + 0.5).mean()
            x = x + block.fc2(hidden)
        return loss + torch.stack(terms).mean()


def sparse() -> list[Any]:
    before = ActivationL1Regularizer(0.3, role="mlp_pre_activation", floor=-0.5, name="before")
    return [ActivationL1Regularizer(0.5), ActivationHoyerRegularizer(2.0), before]


@pytest.mark.parametrize("case", [name for name, (module, _, _) in CASES.items() if module is tiny.Tiny])
def test_elementwise_and_per_token_penalties_equal_the_handwritten_loss(case: str) -> None:
    _, arguments, settings = CASES[case]
    wanted = reference(Sparse, arguments, settings)
    assert tiny.distance(tiny.fit(Sparse(**arguments), sparse(), **settings), wanted) <= EXACT
    assert tiny.distance(tiny.fit(Sparse(**arguments), **settings), wanted) > DIFFERENT


def test_elementwise_and_per_token_penalties_compile_without_graph_breaks() -> None:
    from torch._dynamo.utils import counters

    wanted = reference(Sparse, {}, {})
    torch.compiler.reset()
    counters.clear()
    module = Sparse()
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    got = tiny.fit(module, sparse())
    assert tiny.distance(got, wanted) <= EXACT
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0


# --- causal attention ------------------------------------------------------------------------------------------------


class Causal(nn.Module):
    """Causal attention of the first ``tokens`` to themselves, and the entropy of its rows by hand."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.qkv = tokens, nn.Linear(8, 24)

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : self.tokens]
        attended = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return x + attended.transpose(1, 2).flatten(2)

    def entropy(self, x: Tensor) -> Tensor:
        """Mean of the normalised entropy of the rows that see two keys or more."""
        q, k, _ = self.heads(x[:, : self.tokens])
        future = torch.ones(self.tokens, self.tokens, dtype=torch.bool).triu(1)
        p = (q @ k.mT / 2).masked_fill(future, -math.inf).softmax(-1)
        rows = -(p * p.clamp_min(1e-30).log()).sum(-1)
        return (rows[..., 1:] / torch.arange(2.0, self.tokens + 1).log()).mean()


def test_causal_rows_are_counted_once_for_layers_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, seen = nn.Sequential(Causal(5), Causal(5), Causal(4)), torch.randn(3, 6, 8), []
    regularizer = AttentionEntropyRegularizer(0.7, objective="minimize")
    see = regularizer.see_attention
    monkeypatch.setattr(
        regularizer, "see_attention", lambda rows, visible, valid: seen.append(visible) or see(rows, visible, valid)
    )
    with regularize(model, [regularizer]) as regularizers:
        for _ in range(2):
            y = model(x).square().mean()
            loss = regularizers.add(y)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert [len(visible[0, 0]) for visible in seen] == [5, 5, 4] * 2
    assert seen[0] is seen[1]
    assert seen[3] is seen[4]
    assert seen[3] is not seen[0]  # nothing stays beyond a step
    entropies, y = [], x
    for layer in model:
        entropies.append(layer.entropy(y))
        y = layer(y)
    wanted = y.square().mean() + 0.7 * torch.stack(entropies).mean()
    torch.testing.assert_close(loss, wanted)
    for got, right in zip(gradients, torch.autograd.grad(wanted, list(model.parameters())), strict=True):
        torch.testing.assert_close(got, right)
