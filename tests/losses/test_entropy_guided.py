"""Entropy-guided thresholds as a loss: visible keys, rows that count, and what is logged."""

import math

import pytest
import torch

from lightning_reg.functional import attention_entropy, entropy_guided
from lightning_reg.losses import EntropyGuidedLoss

THRESHOLD = torch.tensor([0.2, 0.5])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_loss_is_the_functional_of_the_normalised_entropy(causal: bool) -> None:
    query, key = 3 * torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    entropy = attention_entropy(query, key, is_causal=causal, normalize=True)
    mask = torch.arange(5) > 0 if causal else None  # the first row sees itself only
    wanted = entropy_guided(entropy, THRESHOLD, margin=0.05, mask=mask)
    got = EntropyGuidedLoss(0.05)(query, key, THRESHOLD, is_causal=causal)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert got > 0
    scores = query @ key.transpose(-1, -2) / 2
    visible = torch.ones(5, 5, dtype=torch.bool).tril() if causal else None
    assert EntropyGuidedLoss(0.05).from_scores(scores, THRESHOLD, mask=visible).item() == pytest.approx(
        wanted.item(), rel=1e-5
    )


def test_rows_left_out_leave_no_trace_and_the_value_is_the_mean_of_the_others() -> None:
    nats = torch.rand(2, 2, 3)
    visible = torch.tensor([8, 4, 1]).expand(2, 2, 3)
    valid = torch.tensor([[[True, True, True]], [[False, True, True]]])
    poisoned = torch.where(valid & (visible > 1), nats, math.nan)
    penalty, value = EntropyGuidedLoss(0.0).reduce(poisoned, visible, THRESHOLD, valid)
    rows = torch.cat([nats[:, :, 1] / math.log(4), nats[:1, :, 0] / math.log(8)]).double()  # of three rows by two heads
    assert penalty.item() == pytest.approx(((rows.mean(0) - THRESHOLD.double()) ** 2).mean().item(), rel=1e-5)
    assert value.item() == pytest.approx(rows.mean().item(), rel=1e-6)
    assert not value.requires_grad


def test_repr_and_bad_arguments() -> None:
    assert repr(EntropyGuidedLoss(0.1, objective="floor")) == "EntropyGuidedLoss(0.1, objective='floor')"
    with pytest.raises(ValueError, match=r"`margin` must be in \[0, 1\], a share of log\(visible keys\), got -1"):
        EntropyGuidedLoss(-1)
    with pytest.raises(ValueError, match="`objective` must be one of band, floor, ceiling, got 'minimize'"):
        EntropyGuidedLoss(objective="minimize")
