"""Trainings through the kernels, in Triton's interpreter or on a GPU, equal the hand-written loss."""

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_reg import kernels
from lightning_reg.callbacks import (
    ActivationHoyerRegularizer,
    ActivationL1Regularizer,
    AttentionEntropyRegularizer,
    AttentionLogitRegularizer,
    QKClip,
)
from lightning_reg.kernels import operators
from tests import tiny
from tests.test_engine import Sparse

EXACT, DIFFERENT = 1e-6, 1e-3


def run(module: pl.LightningModule, callbacks: list[Any], device: str, **settings: Any) -> torch.Tensor:
    """Parameters after three steps on the device."""
    return tiny.fit(module, callbacks, accelerator=device, max_steps=3, **settings).cpu()


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
def test_entropy_and_density_equal_the_handwritten_loss(use_reentrant: bool | None, device: str) -> None:
    wanted = run(tiny.Tiny(handwritten=True), [], device)
    got = run(tiny.Tiny(use_reentrant=use_reentrant), tiny.regularizers(), device)
    assert tiny.distance(got, wanted) <= EXACT
    assert tiny.distance(run(tiny.Tiny(), [], device), wanted) > DIFFERENT


@pytest.mark.parametrize("use_reentrant", [None, True], ids=["plain", "reentrant"])
def test_l1_and_hoyer_equal_the_handwritten_loss(use_reentrant: bool | None, device: str) -> None:
    wanted = run(Sparse(handwritten=True), [], device)
    before = ActivationL1Regularizer(0.3, role="mlp_pre_activation", floor=-0.5, name="before")
    got = run(
        Sparse(use_reentrant=use_reentrant),
        [ActivationL1Regularizer(0.5), ActivationHoyerRegularizer(2.0), before],
        device,
    )
    assert tiny.distance(got, wanted) <= EXACT


def test_compiled_blocks_call_the_kernels_without_graph_break(device: str) -> None:
    from torch._dynamo.utils import counters

    wanted = run(tiny.Tiny(handwritten=True), [], device)
    torch.compiler.reset()
    counters.clear()
    module = tiny.Tiny()
    for block in module.net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert tiny.distance(run(module, tiny.regularizers(), device), wanted) <= EXACT
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_table_of_matches_names_the_way(fraction: float, device: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(tiny.Tiny(), [AttentionEntropyRegularizer(1.0, query_fraction=fraction)], device)
    assert "scaled_dot_product_attention, fused kernel" in caplog.text


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "nonreentrant", "reentrant"])
@pytest.mark.parametrize("beside", ["alone", "entropy", "logits"])
def test_qk_clip_takes_the_largest_logits_from_the_attention_itself(
    beside: str, use_reentrant: bool | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def callbacks() -> list[Any]:
        others = {
            "alone": [], "entropy": [AttentionEntropyRegularizer(0.5)],
            "logits": [AttentionLogitRegularizer(0.5, bound=0.01)],
        }[beside]  # fmt: skip
        return [QKClip(threshold=0.05, heads=2), *others]

    with kernels.disabled():
        wanted = run(tiny.Tiny(use_reentrant=use_reentrant), callbacks(), device)
    launched: list[str] = []
    choose = operators._launcher
    monkeypatch.setattr(operators, "_launcher", lambda name, *args: launched.append(name) or choose(name, *args))
    got = run(tiny.Tiny(use_reentrant=use_reentrant), callbacks(), device)
    assert tiny.distance(got, wanted) <= EXACT
    assert tiny.distance(run(tiny.Tiny(use_reentrant=use_reentrant), callbacks()[1:], device), wanted) > DIFFERENT
    assert "attention_entropy.forward" in launched
    assert ("attention_logits.forward" in launched) == (beside == "logits")  # which needs a gradient
