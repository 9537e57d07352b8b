"""Attention logits as a loss: objectives, masks, and what a collapsed head gets."""

import math

import pytest
import torch
from torch import Tensor

from lightning_reg.functional import attention_entropy_from_scores
from lightning_reg.functional.attention_logits import logit_rows_from_scores
from lightning_reg.losses import AttentionEntropyLoss, AttentionLogitLoss


def by_hand(objective: str, scores: Tensor, shown: Tensor, valid: Tensor, bound: float) -> tuple[float, float]:
    """Penalty and value, row by row."""
    penalties, values = [], []
    for row, seen, counts in zip(scores.flatten(0, -2), shown.flatten(0, -2), valid.flatten(), strict=True):
        kept = row[seen].tolist()
        if not (kept and counts):
            continue
        if objective == "hinge":
            penalties.append(max(0.0, max(map(abs, kept)) - bound) ** 2)
            values.append(max(map(abs, kept)))
        else:
            penalties.append(math.log(sum(map(math.exp, kept))) ** 2)
            values.append(penalties[-1])
    return sum(penalties) / len(penalties), sum(values) / len(values)


@pytest.mark.parametrize("objective", ["hinge", "square"])
def test_penalty_and_value_by_hand(objective: str) -> None:
    query, key = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3, torch.randn(2, 3, 6, 5, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 6) > 0.3
    mask[1, 0, 2] = False
    valid = torch.tensor([[[True, True, False, True]], [[True, True, True, False]]])
    scores = query @ key.mT * 0.7
    penalty, value = by_hand(objective, scores, mask.expand(2, 3, 4, 6), valid.expand(2, 3, 4), 2.0)
    loss = AttentionLogitLoss(objective, bound=2.0)
    assert loss(query, key, attn_mask=mask, scale=0.7, valid=valid).item() == pytest.approx(penalty, abs=1e-12)
    assert loss.from_scores(scores, mask=mask, valid=valid).item() == pytest.approx(penalty, abs=1e-12)
    turned = loss.from_scores(scores.mT, mask=mask.mT, dim=-2, valid=valid)
    assert turned.item() == pytest.approx(penalty, abs=1e-12)
    rows, visible = logit_rows_from_scores(scores, statistic=loss.statistic, mask=mask)
    assert loss.reduce(rows, visible, valid)[1].item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("objective", ["hinge", "square"])
def test_arguments_of_attention_arrive(objective: str) -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    scores = (query @ key.repeat_interleave(2, 1).mT * 0.9).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    loss = AttentionLogitLoss(objective, bound=1.0)
    got = loss(query, key, is_causal=True, scale=0.9, enable_gqa=True)
    torch.testing.assert_close(got, loss.from_scores(scores))


@pytest.mark.parametrize("objective", ["hinge", "square"])
def test_nothing_valid_is_zero_without_gradient(objective: str) -> None:
    query = torch.full((1, 2, 3, 4), 90.0, requires_grad=True)
    loss = AttentionLogitLoss(objective)
    for arguments in ({"attn_mask": torch.zeros(3, 3, dtype=torch.bool)}, {"valid": torch.zeros(1, 1, 3) > 0}):
        penalty = loss(query, query.detach(), **arguments)
        assert penalty.item() == 0
        assert torch.autograd.grad(penalty, query)[0].eq(0).all()


def test_below_the_bound_nothing_pulls() -> None:
    scores = torch.tensor([[49.0, -50.0, 3.0]], requires_grad=True)
    penalty = AttentionLogitLoss().from_scores(scores)
    penalty.backward()
    assert penalty.item() == 0
    assert scores.grad.eq(0).all()


def test_gradient_of_the_hinge_by_hand() -> None:
    scores = torch.tensor([[60.0, -80.0, 3.0], [55.0, 0.0, -1.0], [1.0, 2.0, 3.0]], requires_grad=True)
    AttentionLogitLoss(bound=50.0).from_scores(scores).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, -20.0, 0.0], [10.0 / 3, 0.0, 0.0], [0.0] * 3]))


def test_collapsed_head_gets_a_gradient_where_that_of_the_entropy_vanishes() -> None:
    """One key has all the weight, by 200: the entropy and its gradient are 0 in float32."""
    collapsed = torch.zeros(1, 1, 4, 8)
    collapsed[..., 3] = 200.0
    gradients = {}
    for name, loss in {
        "hinge": AttentionLogitLoss("hinge"),
        "square": AttentionLogitLoss("square"),
        "entropy": AttentionEntropyLoss("maximize"),
        "floor": AttentionEntropyLoss("floor", bound=0.5),
    }.items():
        scores = collapsed.clone().requires_grad_()
        gradients[name] = torch.autograd.grad(loss.from_scores(scores), scores)[0].abs().max().item()
    assert gradients["entropy"] == gradients["floor"] == 0
    assert gradients["hinge"] == pytest.approx(2 * 150 / 4)
    assert gradients["square"] == pytest.approx(2 * 200 / 4)


def test_square_says_nothing_of_a_head_that_collapsed_downwards() -> None:
    collapsed = torch.full((1, 8), -200.0)
    collapsed[:, 3] = 0.0
    scores = collapsed.clone().requires_grad_()
    (square,) = torch.autograd.grad(AttentionLogitLoss("square").from_scores(scores), scores)
    assert square.abs().max() == 0
    (hinge,) = torch.autograd.grad(AttentionLogitLoss("hinge").from_scores(scores), scores)
    assert hinge.abs().max() > 10


def entropy_after(loss: AttentionLogitLoss | AttentionEntropyLoss, steps: int = 300) -> float:
    """Normalised entropy of a collapsed head after gradient descent on the penalty alone, of queries and keys."""
    generator = torch.Generator().manual_seed(0)
    query, key = (8 * torch.randn(1, 1, 6, 4, generator=generator) for _ in range(2))
    query.requires_grad_()
    key.requires_grad_()
    optimizer = torch.optim.SGD([query, key], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(query, key).backward()
        optimizer.step()
    return attention_entropy_from_scores(query @ key.mT / 2, normalize=True).mean().item()


def test_penalty_on_logits_rescues_a_head_that_the_entropy_cannot() -> None:
    before = entropy_after(AttentionLogitLoss(), 0)
    assert before < 0.06
    assert entropy_after(AttentionLogitLoss("hinge", bound=2.0)) > 0.6
    # the square pulls at what is large and positive, and leaves the rest of the row far below it
    assert before + 0.08 < entropy_after(AttentionLogitLoss("square")) < 0.3
    for objective, bound in (("maximize", None), ("floor", 0.5)):
        assert entropy_after(AttentionEntropyLoss(objective, bound=bound)) < before + 0.02


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="`objective` must be 'hinge' or 'square', got 'max'"):
        AttentionLogitLoss("max")  # type: ignore[arg-type]
    for bound in (-1.0, math.inf, math.nan, True, None, "50"):
        with pytest.raises(ValueError, match=r"`bound` must be a finite number >= 0, got .*: the largest logit to"):
            AttentionLogitLoss(bound=bound)  # type: ignore[arg-type]


def test_repr_shows_the_arguments() -> None:
    assert repr(AttentionLogitLoss(bound=30)) == "AttentionLogitLoss('hinge', bound=30.0)"
    assert repr(AttentionLogitLoss("square")) == "AttentionLogitLoss('square')"
