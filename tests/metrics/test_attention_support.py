"""Support of attention rows over updates."""

import math

import pytest
import torch

from lightning_reg.functional import attention_entropy_from_scores, attention_support
from lightning_reg.metrics import AttentionSupport


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_mean_over_all_rows_of_all_updates(mass: float) -> None:
    batches = [torch.randn(3, 7).mul(3), torch.randn(1, 2, 5).mul(3), torch.randn(4, 1)]
    rows = [row.double() for batch in batches for row in batch.reshape(-1, batch.shape[-1])]
    wanted = sum(attention_support(row.softmax(-1), mass=mass).item() for row in rows) / len(rows)
    effective = sum(math.exp(attention_entropy_from_scores(row)) for row in rows) / len(rows)
    for given in ("scores", "probs"):
        support = AttentionSupport(given, mass=mass)
        count = AttentionSupport(given, measure="effective")
        for batch in batches:
            support.update(batch if given == "scores" else batch.softmax(-1))
            count.update(batch if given == "scores" else batch.softmax(-1))
        assert support.compute().item() == pytest.approx(wanted)
        assert count.compute().item() == pytest.approx(effective, rel=1e-5)


@pytest.mark.parametrize("given", ["scores", "probs"])
@pytest.mark.parametrize("measure", ["support", "effective"])
def test_rows_that_see_no_key_do_not_count(given: str, measure: str) -> None:
    shown = torch.tensor([[True, True, False], [False, False, False]])
    rows = torch.zeros(2, 3) if given == "scores" else torch.full((2, 3), 0.5)
    metric = AttentionSupport(given, measure=measure)
    assert metric(rows, shown).item() == pytest.approx(2, abs=1e-5)
    metric.reset()
    assert metric(rows[:1], shown[1:]).isnan()


def test_nan_stays() -> None:
    metric = AttentionSupport()
    metric.update(torch.tensor([[math.nan, 1.0]]))
    metric.update(torch.tensor([[0.5, 0.5]]))
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": "logits"}, "`input` must be one of probs, scores, got 'logits'"),
        ({"measure": "count"}, "`measure` must be one of support, effective, got 'count'"),
        ({"mass": 0.0}, r"`mass` must be in \(0, 1\], got 0.0"),
    ],
)
def test_errors_name_the_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionSupport(**arguments)


def test_a_mask_must_be_boolean() -> None:
    for given in ("scores", "probs"):
        with pytest.raises(ValueError, match="`mask` must be boolean"):
            AttentionSupport(given).update(torch.ones(2, 3), torch.ones(2, 3))
