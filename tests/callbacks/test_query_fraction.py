"""The entropy of a sample of the queries: the same as writing those rows by hand, others in every batch."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_reg import regularize
from lightning_reg.callbacks import AttentionEntropyRegularizer
from tests import tiny

EXACT, DIFFERENT = 1e-6, 1e-3
WEIGHT, FRACTION = 2.0, 0.4
GOLDEN = (math.sqrt(5) - 1) / 2


def rows_of(batch: int) -> list[int]:
    """Two of five rows, turned by the golden ratio."""
    turn = math.floor((batch + 1) * GOLDEN % 1 * tiny.TOKENS)
    return [(place + turn) % tiny.TOKENS for place in (0, 2)]


class Sampled(tiny.Tiny):
    """Writes the term by hand."""

    seen: list[list[int]]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0]
        loss = (self(x) - x.roll(1, 1)).square().mean()
        if not self.handwritten:
            return loss
        rows = rows_of(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        terms = []
        for block in self.net.blocks:
            shape = (*x.shape[:2], 3, tiny.HEADS, tiny.WIDTH // tiny.HEADS)
            q, k, _ = block.attention.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
            log_p = (q[..., rows, :] @ k.mT / math.sqrt(tiny.WIDTH // tiny.HEADS)).log_softmax(-1)
            terms.append((-(log_p.exp() * log_p).sum(-1) / math.log(tiny.TOKENS)).mean())
            x = x + block.attention(x)
            x = x + block.fc2(torch.tanh(block.fc1(x)))
        return loss - WEIGHT * torch.stack(terms).mean()


def callbacks() -> list[pl.Callback]:
    return [AttentionEntropyRegularizer(WEIGHT, query_fraction=FRACTION)]


CASES = {
    "plain": {}, "ragged accumulation": {"accumulate_grad_batches": 3}, "two epochs": {"max_epochs": 2},
}  # fmt: skip


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_rows_written_by_hand(case: str, use_reentrant: bool | None) -> None:
    wanted = tiny.fit(Sampled(handwritten=True), **CASES[case])
    got = tiny.fit(Sampled(use_reentrant=use_reentrant), callbacks(), **CASES[case])
    assert tiny.distance(got, wanted) <= EXACT
    assert tiny.distance(tiny.fit(Sampled(), **CASES[case]), wanted) > DIFFERENT
    whole = tiny.fit(Sampled(), [AttentionEntropyRegularizer(WEIGHT)], **CASES[case])
    assert tiny.distance(whole, wanted) > 10 * EXACT


def test_compiled_code_serves_every_batch() -> None:
    from torch._dynamo.utils import counters

    wanted = tiny.fit(Sampled(handwritten=True))
    torch.compiler.reset()
    counters.clear()
    module = Sampled()
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert tiny.distance(tiny.fit(module, callbacks()), wanted) <= EXACT
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the first block's input needs no gradient


def test_resumed_training_draws_as_an_uninterrupted_one(tmp_path) -> None:
    whole = tiny.fit(Sampled(), callbacks(), max_epochs=2)
    first = tiny.trainer(callbacks(), max_epochs=1)
    first.fit(Sampled())
    first.save_checkpoint(tmp_path / "first.ckpt")
    module = Sampled()
    tiny.trainer(callbacks(), max_epochs=2).fit(module, ckpt_path=tmp_path / "first.ckpt", weights_only=False)
    assert torch.equal(tiny.parameters(module), whole)


def test_both_entropies_of_one_attention_are_joined() -> None:
    both = [*callbacks(), AttentionEntropyRegularizer(0.5, name="whole")]
    module = Sampled()
    trainer = tiny.trainer(both, max_steps=1, log_every_n_steps=1)
    trainer.fit(module)
    assert {"reg/attention_entropy/value", "reg/whole/value"} <= set(trainer.callback_metrics)
    assert tiny.distance(tiny.parameters(module), tiny.fit(Sampled(), callbacks(), max_steps=1)) > DIFFERENT / 10


def test_rows_of_padding_do_not_count() -> None:
    q = torch.randn(3, 2, 8, 4)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(self.project(x), x, x, attn_mask=mask)

    net = Net()
    mask = torch.ones(3, 1, 1, 8, dtype=torch.bool)
    mask[:, :, :, 5:] = False
    rows = [(place + math.floor(GOLDEN * 8)) % 8 for place in (0, 2, 4, 6)]
    log_p = (net.project(q)[..., rows, :] @ q[..., :5, :].mT / 2).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[..., [row < 5 for row in rows]].mean() / math.log(5)
    regularizer = AttentionEntropyRegularizer(1.0, query_fraction=0.5, targets="")
    with regularize(net, [regularizer]) as reg:
        net(q, mask)
        reg.add(torch.zeros((), requires_grad=True))
        torch.testing.assert_close(reg.values["attention_entropy/value"], entropy.detach())


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan"), True])
def test_fraction_must_be_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`query_fraction` must be in \(0, 1\]"):
        AttentionEntropyRegularizer(0.1, query_fraction=fraction)


def test_fraction_and_adapter_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="no meaning with `adapter`"):
        AttentionEntropyRegularizer(0.1, query_fraction=0.5, adapter="clam")
