"""Attention entropy as a loss: objectives, levels, masks and the sign."""

import math

import pytest
import torch
from torch import Tensor

from lightning_reg.functional import attention_entropy, attention_entropy_from_scores
from lightning_reg.losses import AttentionEntropyLoss
from lightning_reg.losses.attention_entropy import OBJECTIVES

# nats of two samples, two heads and three queries; every row sees e^2 keys, so half of it is the normalised entropy
H = torch.tensor([[[0.2, 0.4, 0.6], [1.0, 1.2, 1.4]], [[0.0, 0.2, 0.4], [1.6, 1.8, 2.0]]])
VISIBLE = torch.full((2, 2, 3), 8)
BOUNDS = {"floor": 0.5, "ceiling": 1.5, "band": (0.5, 1.5), "target": 1.0}


def penalty(objective: str, values: list[float]) -> list[float]:
    """The table of the docstring, in plain Python."""
    return {
        "maximize": [-v for v in values],
        "minimize": values,
        "floor": [max(0.0, 0.5 - v) for v in values],
        "ceiling": [max(0.0, v - 1.5) for v in values],
        "band": [max(0.0, 0.5 - v) + max(0.0, v - 1.5) for v in values],
        "target": [(v - 1.0) ** 2 for v in values],
    }[objective]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def groups(level: str) -> list[list[float]]:
    if level == "query":
        return [[v] for v in H.flatten().tolist()]
    if level == "head":
        return [H[:, head].flatten().tolist() for head in range(2)]
    return [H.flatten().tolist()]


@pytest.mark.parametrize("level", ["query", "head", "site"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objective_of_each_level_by_hand(objective: str, level: str) -> None:
    loss = AttentionEntropyLoss(objective, normalize=False, bound=BOUNDS.get(objective), level=level)
    actual, value = loss.reduce(H, VISIBLE)
    assert actual.item() == pytest.approx(mean(penalty(objective, [mean(group) for group in groups(level)])), abs=1e-6)
    assert value.item() == pytest.approx(H.mean().item())


@pytest.mark.parametrize("level", ["query", "head", "site"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_left_out_leave_no_trace(objective: str, level: str) -> None:
    loss = AttentionEntropyLoss(objective, normalize=False, bound=BOUNDS.get(objective), level=level)
    valid = torch.tensor([[[True, False, True]], [[True, True, False]]])  # (batch, 1, queries)
    poisoned = torch.where(valid, H, math.nan)
    actual, value = loss.reduce(poisoned, VISIBLE, valid)
    kept = H.transpose(0, 1)[:, valid.squeeze(1)]  # (heads, rows)
    expected, expected_value = loss.reduce(kept, torch.full((2, 4), 8))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(value, expected_value)


@pytest.mark.parametrize("level", ["query", "head", "site"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "nats"])
def test_nothing_valid_is_zero_without_gradient(objective: str, level: str, normalize: bool) -> None:
    bound = {"floor": 0.5, "ceiling": 0.5, "band": (0.4, 0.6), "target": 0.5}.get(objective)
    loss = AttentionEntropyLoss(objective, bound=bound, level=level, normalize=normalize)
    entropy = H.clone().requires_grad_()
    for visible, valid in ((torch.zeros_like(VISIBLE), None), (VISIBLE, torch.zeros(2, 2, 3, dtype=torch.bool))):
        actual, value = loss.reduce(entropy, visible, valid)
        assert actual.item() == value.item() == 0
        assert torch.autograd.grad(actual, entropy)[0].eq(0).all()


@pytest.mark.parametrize("level", ["head", "site"])
def test_a_head_without_rows_adds_no_constant(level: str) -> None:
    loss = AttentionEntropyLoss("floor", bound=0.5, level=level, normalize=False)
    visible = VISIBLE.clone()
    visible[:, 1] = 0
    expected, _ = loss.reduce(H[:, :1], VISIBLE[:, :1])
    torch.testing.assert_close(loss.reduce(H, visible)[0], expected)


def test_single_key_rows_do_not_count_when_normalised() -> None:
    visible = torch.tensor([[[1, 8, 8]]])
    entropy = torch.tensor([[[0.0, 1.0, 2.0]]])
    assert AttentionEntropyLoss("minimize").reduce(entropy, visible)[0].item() == pytest.approx(1.5 / math.log(8))
    nats = AttentionEntropyLoss("minimize", normalize=False).reduce(entropy, visible)[0]
    assert nats.item() == pytest.approx(1.0)


def test_entropies_of_any_rank_reduce() -> None:
    for shape in ((), (3,), (2, 3), (2, 2, 2, 3)):
        entropy = torch.rand(shape)
        for level in ("query", "head", "site"):
            loss = AttentionEntropyLoss("target", bound=0.0, level=level, normalize=False)
            actual, value = loss.reduce(entropy, torch.full(shape, 8))
            assert actual.shape == value.shape == ()
            assert value.item() == pytest.approx(entropy.mean().item())


def test_three_inputs_give_one_penalty() -> None:
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    mask = torch.rand(2, 1, 4, 5) > 0.3
    scores = query @ key.mT / 8**0.5
    loss = AttentionEntropyLoss("band", bound=(0.5, 0.6))
    expected = loss(query, key, attn_mask=mask)
    torch.testing.assert_close(loss.from_scores(scores, mask=mask), expected)
    probs = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(loss.from_probs(probs, mask=mask), expected)
    torch.testing.assert_close(loss.from_probs(probs.mT, mask=mask.mT, dim=-2), expected)


def test_arguments_of_attention_arrive() -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    loss = AttentionEntropyLoss("minimize", normalize=False, top_k=2)
    arguments = {"is_causal": True, "scale": 0.7, "enable_gqa": True}
    expected = attention_entropy(query, key, top_k=2, **arguments).mean()
    torch.testing.assert_close(loss(query, key, **arguments), expected)


def test_aem_loss_is_reproduced() -> None:
    scores = torch.randn(1, 1, 40) * 2
    div = torch.sum(torch.softmax(scores, -1) * torch.log_softmax(scores, -1))
    torch.testing.assert_close(AttentionEntropyLoss("maximize", normalize=False).from_scores(scores), div)
    values = torch.softmax(scores, -1).topk(10)[0]
    values = values / values.sum()
    loss = AttentionEntropyLoss("maximize", normalize=False, top_k=10)
    torch.testing.assert_close(loss.from_scores(scores), torch.sum(values * values.log()))


@pytest.mark.parametrize(
    ("objective", "bound", "direction"),
    [
        ("maximize", None, 1),
        ("minimize", None, -1),
        ("floor", 0.99, 1),
        ("ceiling", 0.01, -1),
        ("band", (0.98, 0.99), 1),
        ("band", (0.01, 0.02), -1),
        ("target", 1.0, 1),
        ("target", 0.0, -1),
    ],
)
@pytest.mark.parametrize("level", ["query", "head", "site"])
def test_one_step_moves_the_entropy_the_right_way(objective: str, bound, direction: int, level: str) -> None:
    scores = torch.randn(2, 3, 4, 6, requires_grad=True)
    before = attention_entropy_from_scores(scores).mean()
    loss = AttentionEntropyLoss(objective, bound=bound, level=level)
    optimizer = torch.optim.SGD([scores], lr=1.0)
    loss.from_scores(scores).backward()
    optimizer.step()
    change = attention_entropy_from_scores(scores).mean() - before
    assert change.item() * direction > 1e-6


def test_inside_its_bounds_nothing_pulls() -> None:
    scores = torch.randn(2, 3, 4, 6, requires_grad=True)
    for objective, bound in (("floor", 0.0), ("ceiling", 1.0), ("band", (0.0, 1.0))):
        loss = AttentionEntropyLoss(objective, bound=bound).from_scores(scores)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, scores)[0].eq(0).all()


def make(*args, **kwargs) -> AttentionEntropyLoss:
    return AttentionEntropyLoss(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("maximise"), "`objective` must be one of maximize, .*, target, got 'maximise'"),
        (lambda: make(level="token"), "`level` must be one of query, head, site, got 'token'"),
        (lambda: make("maximize", bound=0.5), "`bound` has no meaning for objective 'maximize', got 0.5; leave it out"),
        (lambda: make("floor"), "`bound` of objective 'floor' must be a number >= 0, got None"),
        (lambda: make("floor", bound=(0.1, 0.2)), "`bound` of objective 'floor' must be a number"),
        (lambda: make("target", bound=-0.1), "`bound` of objective 'target' must be a number >= 0, got -0.1"),
        (lambda: make("ceiling", bound=math.nan), "`bound` of objective 'ceiling' must be a number >= 0, got nan"),
        (lambda: make("ceiling", bound=math.inf, normalize=False), "`bound` .* must be a number >= 0, got inf"),
        (lambda: make("band", bound=0.5), r"`bound` of objective 'band' must be a pair \(low, high\) >= 0, got 0.5"),
        (lambda: make("band", bound=(0.6, 0.5)), r"must be a pair \(low, high\) >= 0, got \(0.6, 0.5\)"),
        (lambda: make("floor", bound=1.5), "`bound` of a normalised entropy must be <= 1, got 1.5; set `normalize="),
        (lambda: make(top_k=1), "`top_k` must be at least 2"),
        (lambda: make(top_k=5).from_probs(torch.ones(1, 1)), "`top_k=5` needs scores: use `from_scores`"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bound_keeps_the_form_it_was_given() -> None:
    assert AttentionEntropyLoss("band", bound=[0.1, 0.2]).bound == (0.1, 0.2)
    assert AttentionEntropyLoss("floor", bound=1).bound == 1.0
    assert AttentionEntropyLoss("floor", bound=3, normalize=False).bound == 3.0
    assert AttentionEntropyLoss().bound is None


def test_repr_shows_the_arguments() -> None:
    assert repr(AttentionEntropyLoss("floor", bound=0.3, top_k=8)) == (
        "AttentionEntropyLoss('floor', normalize=True, bound=0.3, level='query', top_k=8)"
    )


def gradient_of(loss: AttentionEntropyLoss, scores: Tensor) -> Tensor:
    scores = scores.clone().requires_grad_()
    return torch.autograd.grad(loss.from_scores(scores), scores)[0]


def test_query_level_is_a_mean_over_rows() -> None:
    loss = AttentionEntropyLoss("floor", bound=0.9)
    scores = torch.randn(4, 2, 3, 6)
    halves = torch.cat([gradient_of(loss, half) for half in scores.chunk(2)])
    torch.testing.assert_close(halves / 2, gradient_of(loss, scores))
