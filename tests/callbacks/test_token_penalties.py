"""Penalties over tokens and before the activation: training equals the hand-written loss, document by document."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_reg.callbacks import (
    ActivationHoyerRegularizer,
    ActivationL1Regularizer,
    ActivationLocalityRegularizer,
    ChunkDensityRegularizer,
    TemporalDeltaRegularizer,
)
from tests import tiny

EXACT, DIFFERENT = 1e-6, 1e-3
PRE = "mlp_pre_activation"


def runs(documents: Tensor) -> list[tuple[int, slice]]:
    """Row and tokens of each document of a batch."""
    found = []
    for row, numbers in enumerate(documents.tolist()):
        borders = [t for t in range(len(numbers)) if t == 0 or numbers[t] != numbers[t - 1]] + [len(numbers)]
        found += [(row, slice(a, b)) for a, b in pairwise(borders) if numbers[a]]
    return found


def chunks(x: Tensor, documents: Tensor, size: int) -> list[Tensor]:
    return [part for row, tokens in runs(documents) for part in x[row, tokens].split(size)]


def neighbours(x: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    parts = [x[row, tokens] for row, tokens in runs(documents)]
    return torch.cat([part[:-1] for part in parts]), torch.cat([part[1:] for part in parts])


def unit(x: Tensor, documents: Tensor) -> Tensor:
    return x.detach()[documents != 0].square().mean().sqrt()


def chunk_density(x: Tensor, documents: Tensor) -> Tensor:
    epsilon = 0.5 * unit(x, documents).square()
    silent = [(1 - p**2 / (p**2 + epsilon) + 1e-5).log().sum(0) for p in chunks(x, documents, 2)]
    return (1 - torch.stack(silent).exp()).mean()


def chunk_share(x: Tensor, documents: Tensor) -> Tensor:
    shares = [p.abs() / (p.abs().sum(-1, keepdim=True) + 1e-5) for p in chunks(x, documents, 3)]
    return torch.stack([1 - (1 - p + 1e-5).prod(0) for p in shares]).mean()


def locality(x: Tensor, documents: Tensor) -> Tensor:
    earlier, later = neighbours(x, documents)
    return F.binary_cross_entropy((4 * earlier).sigmoid(), (4 * later).sigmoid())


def temporal_delta(x: Tensor, documents: Tensor) -> Tensor:
    y = x / unit(x, documents)
    earlier, later = neighbours(y + ((y / 0.1).round() * 0.1 - y).detach(), documents)
    return (earlier - later).abs().mean()


def floored_l1(x: Tensor, documents: Tensor) -> Tensor:
    return (x[documents != 0] + 0.2).relu().mean()


def floored_hoyer(x: Tensor, documents: Tensor) -> Tensor:
    height = (x[documents != 0] + 0.2).relu()
    return (height.sum(-1).square() / height.square().sum(-1)).mean() / x.shape[-1]


Penalty = Callable[[Tensor, Tensor], Tensor]
# the callback, what it is by hand, and whether of the pre-activation
PENALTIES: dict[str, tuple[Callable[..., pl.Callback], Penalty, bool]] = {
    "chunk_density": (
        lambda **k: ChunkDensityRegularizer(2.0, chunk=2, epsilon=0.5, relative=True, **k), chunk_density, False,
    ),
    "chunk_share": (lambda **k: ChunkDensityRegularizer(100.0, chunk=3, probability="share", **k), chunk_share, False),
    "chunk_density_pre": (
        lambda **k: ChunkDensityRegularizer(2.0, chunk=2, epsilon=0.5, relative=True, role=PRE, **k),
        chunk_density, True,
    ),
    "locality": (lambda **k: ActivationLocalityRegularizer(2.0, alpha=4.0, **k), locality, True),
    "temporal_delta": (
        lambda **k: TemporalDeltaRegularizer(2.0, theta=0.1, relative=True, **k), temporal_delta, False,
    ),
    "preact_l1": (lambda **k: ActivationL1Regularizer(2.0, floor=-0.2, role=PRE, **k), floored_l1, True),
    "preact_hoyer": (lambda **k: ActivationHoyerRegularizer(2.0, floor=-0.2, role=PRE, **k), floored_hoyer, True),
}  # fmt: skip
WEIGHTS = {name: make().weight for name, (make, _, _) in PENALTIES.items()}


class Packed(tiny.Tiny):
    """Batches of (x, documents); optionally with the penalty written by hand."""

    def __init__(self, penalty: str = "", documents: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.penalty, self.documents = penalty, documents

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, documents = batch
        loss = self.loss(x)
        return loss + self.term(x, documents if self.documents else torch.ones_like(documents))

    def term(self, x: Tensor, documents: Tensor) -> Tensor:
        if not self.penalty:
            return torch.zeros(())
        _, penalty, before = PENALTIES[self.penalty]
        terms = []
        for block in self.net.blocks:
            x = x + block.attention(x)
            entering = block.fc1(x)
            hidden = torch.tanh(entering)
            terms.append(penalty(entering if before else hidden, documents))
            x = x + block.fc2(hidden)
        return WEIGHTS[self.penalty] * torch.stack(terms).mean()

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(1)
        samples = 4 * self.batches
        x = torch.randn(samples, tiny.TOKENS, tiny.WIDTH, generator=generator)
        # most neighbours are of one document; one row in five ends in padding
        documents = 1 + torch.rand(samples, tiny.TOKENS, generator=generator).gt(0.7).cumsum(-1)
        documents[::5, -2:] = 0
        return DataLoader(TensorDataset(x, documents), batch_size=4)


def callback(name: str, documents: bool = True) -> list[pl.Callback]:
    return [PENALTIES[name][0](mask=1 if documents else None)]


@cache
def by_hand(penalty: str, documents: bool = True, accumulate: int = 1) -> Tensor:
    """Parameters after training with the penalty by hand, or with none; without checkpoints, which change nothing."""
    return tiny.fit(Packed(penalty, documents), accumulate_grad_batches=accumulate)


CASES = {
    # use_reentrant, accumulate_grad_batches
    "plain": (None, 1),
    "accumulate_ragged": (None, 3),
    "nonreentrant_checkpoint": (False, 1),
    "reentrant_checkpoint": (True, 1),
    "reentrant_accumulate": (True, 3),
}


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PENALTIES)
def test_training_equals_the_handwritten_loss(name: str, case: str, documents: bool) -> None:
    use_reentrant, accumulate = CASES[case]
    wanted = by_hand(name, documents, accumulate)
    got = tiny.fit(Packed(use_reentrant=use_reentrant), callback(name, documents), accumulate_grad_batches=accumulate)
    assert tiny.distance(got, wanted) <= EXACT
    assert tiny.distance(by_hand("", accumulate=accumulate), wanted) > DIFFERENT


@pytest.mark.parametrize("name", ["chunk_density", "locality", "temporal_delta"])
def test_documents_make_a_difference(name: str) -> None:
    assert tiny.distance(by_hand(name), by_hand(name, documents=False)) > DIFFERENT


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("name", PENALTIES)
def test_compiled_training_equals_eager_without_graph_breaks(name: str, documents: bool) -> None:
    from torch._dynamo.utils import counters

    wanted = by_hand(name, documents)
    torch.compiler.reset()
    counters.clear()
    module = Packed()
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert tiny.distance(tiny.fit(module, callback(name, documents)), wanted) <= EXACT
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("name", ["chunk_density", "locality", "temporal_delta"])
def test_inductor_equals_eager(name: str) -> None:
    wanted = tiny.fit(Packed(name, batches=3))
    torch.compiler.reset()
    module = Packed(batches=3)
    for block in module.net.blocks:
        block.compile(fullgraph=True)
    assert tiny.distance(tiny.fit(module, callback(name)), wanted) <= EXACT


def test_boolean_and_float_masks_mean_one_document_a_row() -> None:
    masks: dict[str, Callable[[Any], Tensor]] = {
        "boolean": lambda batch: batch[1] != 0,
        "float": lambda batch: (batch[1] != 0).float(),
        "integer": lambda batch: (batch[1] != 0).long(),
    }
    fits = [tiny.fit(Packed(), [ChunkDensityRegularizer(2.0, chunk=2, epsilon=0.5, mask=m)]) for m in masks.values()]
    assert tiny.distance(fits[0], fits[1]) == 0
    assert tiny.distance(fits[0], fits[2]) <= EXACT


def test_mask_that_is_not_in_the_batch_is_named() -> None:
    with pytest.raises(ValueError, match=r"`mask='documents'` is not in the batch, a list"):
        tiny.fit(Packed(), [TemporalDeltaRegularizer(1.0, mask="documents")])


def test_activations_without_tokens_are_refused_by_name() -> None:
    class Flat(tiny.Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.net.blocks[0].fc2(torch.tanh(self.net.blocks[0].fc1(row))) for row in x[:, 0]])

        def loss(self, x: Tensor) -> Tensor:
            return self(x).square().mean()

    with pytest.raises(ValueError, match=r"`x` must have an axis of tokens.*got \(16,\).*`targets=`"):
        tiny.fit(Flat(), [TemporalDeltaRegularizer(1.0, targets=r"blocks\.0\.fc2")])


@pytest.mark.parametrize("kind", [ActivationL1Regularizer, ActivationHoyerRegularizer])
def test_floor_follows_the_role_unless_it_is_given(kind: type) -> None:
    assert kind(1.0).loss.floor is None
    assert kind(1.0, role=PRE).loss.floor == -10.0
    assert kind(1.0, role=PRE, floor=None).loss.floor is None
    assert kind(1.0, floor=0.5).loss.floor == 0.5
    assert kind(1.0, role=PRE, floor=-3).definition()["floor"] == -3
    with pytest.raises(ValueError, match=r"`floor` must be a finite number, or None"):
        kind(1.0, floor="none")
    with pytest.raises(ValueError, match=r"`role` must be"):
        kind(1.0, role="mlp")


@pytest.mark.parametrize(
    ("saved", "resumed", "argument"),
    [
        (ActivationL1Regularizer(1.0, role=PRE), ActivationL1Regularizer(1.0, role=PRE, floor=-5.0), "floor"),
        (ActivationHoyerRegularizer(1.0), ActivationHoyerRegularizer(1.0, role=PRE, floor=None), "role"),
        (ChunkDensityRegularizer(1.0), ChunkDensityRegularizer(1.0, chunk=8), "chunk"),
        (ChunkDensityRegularizer(1.0), ChunkDensityRegularizer(1.0, probability="share"), "probability"),
        (ActivationLocalityRegularizer(1.0), ActivationLocalityRegularizer(1.0, alpha=5.0), "alpha"),
        (ActivationLocalityRegularizer(1.0), ActivationLocalityRegularizer(1.0, role="mlp_hidden"), "role"),
        (TemporalDeltaRegularizer(1.0), TemporalDeltaRegularizer(1.0, theta=0.1), "theta"),
        (TemporalDeltaRegularizer(1.0), TemporalDeltaRegularizer(1.0, relative=True), "relative"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_checkpoint_of_another_quantity_is_refused(saved: Any, resumed: Any, argument: str, tmp_path: Path) -> None:
    trainer = tiny.trainer([saved])
    trainer.fit(tiny.Tiny(batches=1))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(ValueError, match=rf"`{argument}` of .* but the checkpoint was trained with"):
        tiny.trainer([resumed], max_epochs=2).fit(tiny.Tiny(batches=1), ckpt_path=str(tmp_path / "saved.ckpt"))


@pytest.mark.parametrize("make", [ChunkDensityRegularizer, ActivationLocalityRegularizer, TemporalDeltaRegularizer])
def test_weight_zero_is_bit_identical_to_no_callback(make: type) -> None:
    assert torch.equal(tiny.fit(Packed(), [make(0.0, mask=1)]), by_hand(""))
