"""The metric is the functional, averaged over the rows that have a choice."""

import math

import pytest
import torch
from torch import Tensor

from lightning_reg.functional import attention_entropy, attention_entropy_from_scores
from lightning_reg.metrics import AttentionEntropy


def ragged_masks() -> list[tuple[Tensor, Tensor, Tensor]]:
    batches = [(torch.randn(2, 3, 4, 8), torch.randn(2, 3, n, 8), torch.rand(2, 1, 4, n) > 0.4) for n in (2, 5, 9)]
    for _, _, mask in batches:
        mask[0, 0, 0] = False  # a row that sees nothing
    return batches


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "nats"])
def test_mean_of_the_functional_over_rows_with_a_choice(normalize: bool) -> None:
    metric, total, count = AttentionEntropy(normalize=normalize), 0.0, 0
    for query, key, mask in ragged_masks():
        metric.update(query, key, attn_mask=mask)
        rows = attention_entropy(query.double(), key.double(), attn_mask=mask, normalize=normalize)
        counted = (mask.sum(-1) > (1 if normalize else 0)).expand(2, 3, 4)
        total, count = total + rows[counted].sum().item(), count + int(counted.sum())
    assert metric.compute().item() == pytest.approx(total / count, rel=1e-5)
    assert metric.count.item() == count


def test_one_value_for_each_head() -> None:
    metric = AttentionEntropy(num_heads=3)
    rows = []
    for n in (5, 5):
        query, key = torch.randn(2, 3, 4, 8) * 3, torch.randn(2, 3, n, 8)
        metric.update(query, key)
        rows.append(attention_entropy(query, key, normalize=True))
    torch.testing.assert_close(metric.compute(), torch.cat(rows).mean((0, 2)))


def test_heads_without_rows_are_nan_and_the_others_not() -> None:
    mask = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    mask[:, 1] = False
    metric = AttentionEntropy(num_heads=2)
    metric.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8), attn_mask=mask)
    result = metric.compute()
    assert result[0] == 1
    assert result[1].isnan()


def test_three_inputs_give_one_value() -> None:
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    mask = torch.rand(2, 1, 4, 5) > 0.3
    scores = query @ key.mT / 8**0.5
    probs = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num()
    expected = AttentionEntropy()(query, key, attn_mask=mask)
    torch.testing.assert_close(AttentionEntropy("scores")(scores, attn_mask=mask), expected)
    torch.testing.assert_close(AttentionEntropy("probs")(probs, attn_mask=mask), expected)


def test_arguments_of_attention_arrive() -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    arguments = {"is_causal": True, "scale": 0.7, "enable_gqa": True}
    metric = AttentionEntropy(normalize=False, top_k=2)
    expected = attention_entropy(query, key, top_k=2, **arguments).mean()
    torch.testing.assert_close(metric(query, key, **arguments), expected)


def test_bags_of_one_instance_do_not_count_when_normalised() -> None:
    metric = AttentionEntropy("scores")
    for keys in (4, 1, 1):
        metric.update(torch.zeros(1, keys))
    assert metric.compute() == 1
    nats = AttentionEntropy("scores", normalize=False)
    for keys in (4, 1):
        nats.update(torch.zeros(1, keys))
    assert nats.compute().item() == pytest.approx(math.log(4) / 2)


def test_empty_update_changes_nothing() -> None:
    metric = AttentionEntropy("scores")
    metric.update(torch.zeros(0, 4))
    assert metric.compute().isnan()
    metric.update(torch.zeros(1, 4))
    metric.update(torch.zeros(0, 4))
    assert metric.compute() == 1


def test_nan_stays_until_reset() -> None:
    metric = AttentionEntropy("scores")
    metric.update(torch.tensor([[math.nan, 0.0]]))
    metric.update(torch.zeros(1, 2))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.zeros(1, 2))
    assert metric.compute() == 1


def test_many_rows_in_half_precision_add_up() -> None:
    metric = AttentionEntropy("scores")
    scores = torch.randn(4096, 8, dtype=torch.bfloat16)
    for part in scores.split(256):
        metric.update(part)
    expected = attention_entropy_from_scores(scores.double(), normalize=True).mean()
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-5)


def test_plot_is_bounded_when_normalised() -> None:
    assert (AttentionEntropy().plot_lower_bound, AttentionEntropy().plot_upper_bound) == (0.0, 1.0)
    assert AttentionEntropy(normalize=False).plot_upper_bound is None


Q = torch.zeros(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionEntropy("logits"), "`input` must be one of query_key, scores, probs, got 'logits'"),
        (lambda: AttentionEntropy(num_heads=0), "`num_heads` must be >= 1 or None for one value, got 0"),
        (lambda: AttentionEntropy("probs", top_k=3), "`top_k=3` needs scores: use `input='scores'`"),
        (lambda: AttentionEntropy(top_k=1), "`top_k` must be at least 2"),
        (lambda: AttentionEntropy().update(Q), "`key` is missing: give queries and keys, or set `input='scores'`"),
        (
            lambda: AttentionEntropy("scores").update(Q, Q),
            "`input='scores'` takes one tensor and `attn_mask`; leave out",
        ),
        (lambda: AttentionEntropy("probs").update(Q, is_causal=True), "`input='probs'` takes one tensor"),
        (lambda: AttentionEntropy(num_heads=3).update(Q, Q), r"`num_heads=3` must be the size .* shape \(1, 2, 3\)"),
        (lambda: AttentionEntropy("scores", num_heads=3).update(Q[0, 0]), r"`num_heads=3` .* shape \(3,\)"),
        (lambda: AttentionEntropy("probs").update(Q - 1), "`probs` must be non-negative"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
