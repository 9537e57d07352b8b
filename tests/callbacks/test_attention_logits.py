"""Penalty on attention logits: training equals the hand-written loss wherever the attention is computed."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer, AttentionLogitRegularizer
from lightning_reg.schedules import TargetController
from tests import tiny
from tests.test_engine import assert_untouched

EXACT, DIFFERENT = 1e-6, 1e-3
BOUND = 0.05  # the logits of a fresh model are small
WEIGHTS = {"hinge": 1.0, "square": 0.1}


class Attention(tiny.Attention):
    """Self-attention that hides padded keys, by SDPA or by a softmax."""

    fused, causal = True, False
    tokens: Tensor | None = None  # valid ones, (batch, tokens)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.fused and self.tokens is None:
            return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal), x)
        shown = self.shown(x)
        if self.fused:
            return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=shown), x)
        bias = torch.zeros(shown.shape, dtype=x.dtype).masked_fill(~shown, -1e9)
        return self.join((q @ k.mT * (tiny.WIDTH // tiny.HEADS) ** -0.5 + bias).softmax(-1) @ v, x)

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).view(*x.shape[:2], 3, tiny.HEADS, -1).permute(2, 0, 3, 1, 4)

    def join(self, output: Tensor, x: Tensor) -> Tensor:
        return self.out(output.transpose(1, 2).reshape(x.shape))

    def shown(self, x: Tensor) -> Tensor:
        """Keys that are seen, (batch, 1, queries, keys)."""
        shown = torch.ones(len(x), 1, x.shape[1], x.shape[1], dtype=torch.bool)
        shown = shown if self.tokens is None else shown & self.tokens[:, None, None]
        return shown.tril() if self.causal else shown


class Padded(tiny.Tiny):
    """Some tokens are padding; optionally with the penalty by hand."""

    def __init__(
        self, objective: str = "", fused: bool = True, causal: bool = False, padded: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.objective, self.padded = objective, padded
        for block in self.net.blocks:
            other = Attention()
            other.load_state_dict(block.attention.state_dict())
            other.fused, other.causal = fused, causal
            block.attention = other

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, tokens = batch
        for block in self.net.blocks:
            block.attention.tokens = tokens if self.padded else None
        loss = (self(x) - x.roll(1, 1)).square().mean()
        return loss + self.term(x) if self.objective else loss

    def term(self, x: Tensor) -> Tensor:
        """Row by row of what is no padding."""
        terms = []
        for block in self.net.blocks:
            q, k, _ = block.attention.heads(x)
            scores = (q @ k.mT / 2).float()
            shown = block.attention.shown(x).expand(scores.shape)
            if self.objective == "hinge":
                rows = (scores.abs().masked_fill(~shown, 0).amax(-1) - BOUND).relu().square()
            else:
                rows = scores.exp().masked_fill(~shown, 0).sum(-1).log().square()
            # a row counts if its own token is one that some query sees
            terms.append(rows[shown.any(-2)].mean())
            x = block(x)
        return WEIGHTS[self.objective] * torch.stack(terms).mean()

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4 * self.batches, tiny.TOKENS, tiny.WIDTH, generator=generator)
        tokens = torch.ones(4 * self.batches, tiny.TOKENS, dtype=torch.bool)
        tokens[1::3, -2:] = False
        return DataLoader(TensorDataset(x, tokens), batch_size=4)


def callback(objective: str, **arguments: Any) -> AttentionLogitRegularizer:
    return AttentionLogitRegularizer(WEIGHTS[objective], objective=objective, bound=BOUND, **arguments)


@cache
def by_hand(objective: str, accumulate: int = 1, **arguments: Any) -> Tensor:
    return tiny.fit(Padded(objective, **arguments), accumulate_grad_batches=accumulate)


CASES = {
    # use_reentrant, accumulate_grad_batches
    "plain": (None, 1),
    "accumulate_ragged": (None, 3),
    "nonreentrant_checkpoint": (False, 1),
    "reentrant_checkpoint": (True, 1),
    "reentrant_accumulate": (True, 3),
}
KINDS = {
    "sdpa": {},
    "softmax": {"fused": False},
    "causal_sdpa": {"causal": True, "padded": False},
    "causal_softmax": {"causal": True, "fused": False},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", WEIGHTS)
def test_training_equals_the_handwritten_loss(objective: str, kind: str, case: str) -> None:
    use_reentrant, accumulate = CASES[case]
    wanted = by_hand(objective, accumulate, **KINDS[kind])
    module = Padded(use_reentrant=use_reentrant, **KINDS[kind])
    got = tiny.fit(module, [callback(objective)], accumulate_grad_batches=accumulate)
    assert tiny.distance(got, wanted) <= EXACT
    assert tiny.distance(by_hand("", accumulate, **KINDS[kind]), wanted) > DIFFERENT


class Both(Padded):
    """Hinge and square on the same attention."""

    def term(self, x: Tensor) -> Tensor:
        terms = []
        for self.objective in WEIGHTS:
            terms.append(super().term(x))
        return torch.stack(terms).sum()


def both() -> list[AttentionLogitRegularizer]:
    return [callback(objective, name=objective) for objective in WEIGHTS]


def test_compiled_training_equals_eager_without_graph_breaks() -> None:
    from torch._dynamo.utils import counters

    wanted = tiny.fit(Both("both", batches=3))
    torch.compiler.reset()
    counters.clear()
    module = Padded(batches=3)
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert tiny.distance(tiny.fit(module, both()), wanted) <= EXACT
    assert tiny.distance(tiny.fit(Padded(batches=3)), wanted) > DIFFERENT
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    wanted = tiny.fit(Both("both", batches=2))
    torch.compiler.reset()
    module = Padded(batches=2)
    module.net.blocks[1].attention.compile(fullgraph=True)
    assert tiny.distance(tiny.fit(module, both()), wanted) <= EXACT


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16_gradscaler"])
@pytest.mark.parametrize("objective", WEIGHTS)
def test_low_precision_differs_by_rounding_only(objective: str, precision: str) -> None:
    def settings() -> dict[str, Any]:
        if precision == "bf16-mixed":
            return {"precision": precision}
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}

    arguments = {"padded": False, "fused": False}
    wanted = tiny.fit(Padded(objective, **arguments), **settings())
    trainer = tiny.trainer([callback(objective)], log_every_n_steps=1, **settings())
    module = Padded(**arguments)
    trainer.fit(module)
    change = tiny.distance(tiny.fit(Padded(**arguments), **settings()), wanted)
    assert tiny.distance(tiny.parameters(module), wanted) < change / 4
    assert change > DIFFERENT
    assert trainer.logged_metrics["reg/attention_logits/value"].dtype == torch.float32


def test_mask_of_the_batch_limits_the_queries_and_value_is_the_mean_maximum() -> None:
    valid = torch.tensor([[True, True, False, False, True]]).expand(4, -1)
    module = Padded(batches=1, padded=False)
    x, _ = next(iter(module.train_dataloader()))
    wanted = []
    for block in module.net.blocks:
        q, k, _ = block.attention.heads(x)
        wanted.append((q @ k.mT / 2).abs().amax(-1).transpose(1, 2)[valid].mean())
        x = block(x)
    trainer = tiny.trainer([callback("hinge", mask=lambda batch: valid)], log_every_n_steps=1)
    trainer.fit(module)
    value = trainer.logged_metrics["reg/attention_logits/value"].item()
    assert value == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-5)


def test_bound_that_is_never_met_changes_nothing() -> None:
    got = tiny.fit(Padded(), [AttentionLogitRegularizer(1e3)])
    assert torch.equal(got, by_hand(""))


def test_layer_weights_and_targets_choose_the_layers() -> None:
    first = tiny.fit(Padded(), [callback("hinge", layer_weights=[1.0, 0.0])])
    named = AttentionLogitRegularizer(
        WEIGHTS["hinge"] / 2, objective="hinge", bound=BOUND, targets=r"blocks\.0\.attention"
    )
    assert tiny.distance(tiny.fit(Padded(), [named]), first) <= EXACT
    assert tiny.distance(first, by_hand("hinge")) > DIFFERENT


def test_beside_an_entropy_penalty_on_the_same_attention() -> None:
    together = tiny.fit(Padded(padded=False), [callback("hinge"), AttentionEntropyRegularizer(tiny.ENTROPY_WEIGHT)])
    alone = tiny.fit(Padded(padded=False), [callback("hinge")])

    class WithEntropy(Padded):
        def term(self, x: Tensor) -> Tensor:
            penalty, terms = super().term(x), []
            for block in self.net.blocks:
                q, k, _ = block.attention.heads(x)
                p = (q @ k.mT / 2).softmax(-1)
                terms.append(-(p * p.log()).sum(-1).mean() / torch.tensor(tiny.TOKENS).log())
                x = block(x)
            return penalty - tiny.ENTROPY_WEIGHT * torch.stack(terms).mean()

    assert tiny.distance(together, tiny.fit(WithEntropy("hinge", padded=False))) <= EXACT
    assert tiny.distance(together, alone) > DIFFERENT


def test_training_brings_large_logits_down() -> None:
    def logits(weight: float) -> float:
        module = Padded(padded=False, batches=64)
        with torch.no_grad():
            for block in module.net.blocks:
                block.attention.qkv.weight[: 2 * tiny.WIDTH] *= 8
        callbacks = [AttentionLogitRegularizer(weight, bound=5.0)]
        trainer = tiny.trainer(callbacks, log_every_n_steps=1, gradient_clip_val=5.0)
        trainer.fit(module)
        return trainer.logged_metrics["reg/attention_logits/value"].item()

    assert logits(0.0) > 15
    assert logits(1e-2) < 8


def test_hand_written_loop() -> None:
    net = tiny.Net()
    x = torch.randn(4, tiny.TOKENS, tiny.WIDTH)
    with regularize(net, [AttentionLogitRegularizer(0.1, objective="square")]) as reg:
        loss = reg.add(net(x).mean())
    wanted = []
    for block in net.blocks:
        q, k, _ = block.attention.qkv(x).view(4, tiny.TOKENS, 3, tiny.HEADS, -1).permute(2, 0, 3, 1, 4)
        wanted.append((q @ k.mT / 2).logsumexp(-1).square().mean())
        x = block(x)
    torch.testing.assert_close(loss - 0.1 * torch.stack(wanted).mean(), x.mean())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`quantity='density'` is of MLP activations, but attention_logits is about"):
        AttentionLogitRegularizer(1.0, schedule=TargetController(0.1))
    with pytest.raises(ValueError, match=r"`objective` must be 'hinge' or 'square', got 'max'"):
        AttentionLogitRegularizer(1.0, objective="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`bound` must be a finite number >= 0, got -1"):
        AttentionLogitRegularizer(1.0, bound=-1)


def test_attention_that_is_not_there_is_named() -> None:
    class Mlp(tiny.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(tiny.WIDTH, 16), torch.nn.Linear(16, tiny.WIDTH))

    with pytest.raises(RuntimeError, match=r"`attention_logits` caught no attention.*attn_implementation='sdpa'"):
        tiny.fit(module := Mlp(), [AttentionLogitRegularizer(1.0)])
    assert_untouched(module)
    with pytest.raises(ValueError, match=r"`targets` select net.blocks.0.fc1, where no attention can be computed"):
        tiny.fit(tiny.Tiny(), [AttentionLogitRegularizer(1.0, targets=r"blocks\.0\.fc1")])

    class Idle(tiny.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.idle = tiny.Attention()

    with pytest.raises(RuntimeError, match=r"`attention_logits`: no attention was computed in idle in the first"):
        tiny.fit(Idle(), [AttentionLogitRegularizer(1.0, targets=["idle", "blocks.0"])])
    tiny.fit(Idle(), [AttentionLogitRegularizer(1.0, targets=["idle", "blocks.0"], allow_unused=True)])


@pytest.mark.parametrize(
    ("saved", "resumed", "argument"),
    [
        (AttentionLogitRegularizer(1.0), AttentionLogitRegularizer(1.0, objective="square"), "objective"),
        (AttentionLogitRegularizer(1.0), AttentionLogitRegularizer(1.0, bound=30.0), "bound"),
    ],
    ids=["objective", "bound"],
)
def test_a_checkpoint_of_another_quantity_is_refused(saved: Any, resumed: Any, argument: str, tmp_path: Path) -> None:
    trainer = tiny.trainer([saved])
    trainer.fit(tiny.Tiny(batches=1))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(ValueError, match=rf"`{argument}` of .* but the checkpoint was trained with"):
        tiny.trainer([resumed], max_epochs=2).fit(tiny.Tiny(batches=1), ckpt_path=str(tmp_path / "saved.ckpt"))
