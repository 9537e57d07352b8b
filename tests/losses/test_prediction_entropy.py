"""Entropy of predictions as a loss: objectives, masks and the sign."""

import math

import pytest
import torch
from torch import Tensor

from lightning_reg.functional import prediction_entropy
from lightning_reg.losses import PredictionEntropyLoss

BOUNDS = {"maximize": None, "minimize": None, "floor": 0.6, "ceiling": 0.4, "target": 0.5}
KIND = pytest.mark.parametrize("multi_label", [False, True], ids=["softmax", "sigmoids"])


def by_hand(objective: str, entropies: list[float], bound: float | None) -> float:
    """The table of the docstring, in plain Python."""
    penalties = {
        "maximize": lambda h: -h,
        "minimize": lambda h: h,
        "floor": lambda h: max(0.0, bound - h),
        "ceiling": lambda h: max(0.0, h - bound),
        "target": lambda h: (h - bound) ** 2,
    }
    return sum(map(penalties[objective], entropies)) / len(entropies)


@KIND
@pytest.mark.parametrize("normalize", [False, True], ids=["nats", "normalised"])
@pytest.mark.parametrize("objective", BOUNDS)
def test_objective_by_hand(objective: str, normalize: bool, multi_label: bool) -> None:
    logits = torch.randn(4, 3, 5, dtype=torch.float64) * 2
    mask = torch.rand(4, 3) < 0.6
    p = logits.sigmoid() if multi_label else logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    if multi_label:
        entropy = (entropy - ((1 - p) * (1 - p).log()).sum(-1)) / 5
    if normalize:
        entropy = entropy / math.log(2 if multi_label else 5)
    loss = PredictionEntropyLoss(objective, bound=BOUNDS[objective], multi_label=multi_label, normalize=normalize)
    kept = entropy[mask].tolist()
    wanted = by_hand(objective, kept, BOUNDS[objective])
    assert wanted != 0
    assert loss(logits, mask=mask).item() == pytest.approx(wanted, abs=1e-12)
    passed, penalty, value = loss.tap(logits.requires_grad_(), mask)
    assert torch.equal(passed, logits)
    assert penalty.requires_grad
    assert not value.requires_grad
    assert value.item() == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("objective", BOUNDS)
def test_gradient_is_that_of_the_formula(objective: str) -> None:
    logits = (torch.randn(4, 3, 5, dtype=torch.float64) * 2).requires_grad_()
    mask, bound = torch.rand(4, 3) < 0.6, BOUNDS[objective]
    loss = PredictionEntropyLoss(objective, bound=bound)
    (got,) = torch.autograd.grad(0.7 * loss(logits, mask=mask), logits)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)[mask] / math.log(5)
    formula = {
        "maximize": lambda: -entropy,
        "minimize": lambda: entropy,
        "floor": lambda: (bound - entropy).relu(),
        "ceiling": lambda: (entropy - bound).relu(),
        "target": lambda: (entropy - bound) ** 2,
    }[objective]()
    (wanted,) = torch.autograd.grad(0.7 * formula.mean(), logits)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)
    assert wanted.abs().max() > 1e-3


@KIND
@pytest.mark.parametrize(
    ("objective", "bound", "direction"),
    [
        ("maximize", None, 1),
        ("minimize", None, -1),
        ("floor", 0.99, 1),
        ("ceiling", 0.01, -1),
        ("target", 1.0, 1),
        ("target", 0.0, -1),
    ],
)
def test_one_step_moves_the_entropy_the_right_way(
    objective: str, bound: float | None, direction: int, multi_label: bool
) -> None:
    logits = torch.randn(2, 3, 6, requires_grad=True)
    before = prediction_entropy(logits, multi_label=multi_label).mean()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    PredictionEntropyLoss(objective, bound=bound, multi_label=multi_label)(logits).backward()
    optimizer.step()
    change = prediction_entropy(logits, multi_label=multi_label).mean() - before
    assert change.item() * direction > 1e-5


def test_confidence_penalty_prefers_the_undecided_unlike_that_of_netcal() -> None:
    """netcal returns +weight * H, by which the uniform prediction (1.099) costs more than a sure one (.035)."""
    uniform, sure = torch.zeros(1, 3), torch.tensor([[6.0, 0.0, 0.0]])
    assert prediction_entropy(uniform).item() == pytest.approx(1.0986, abs=1e-4)
    loss = PredictionEntropyLoss("maximize", normalize=False)
    assert loss(uniform).item() == pytest.approx(-1.0986, abs=1e-4)
    assert loss(uniform) < loss(sure) < 0
    # and its threshold raised a TypeError
    hinge = PredictionEntropyLoss("floor", bound=0.5, normalize=False)
    assert hinge(uniform).item() == 0
    assert 0.4 < hinge(sure).item() < 0.5


@pytest.mark.parametrize("poison", [0.0, math.nan], ids=["finite", "nan"])
@pytest.mark.parametrize("objective", BOUNDS)
def test_nothing_valid_is_exactly_zero_without_gradient(objective: str, poison: float) -> None:
    logits = (torch.randn(2, 3, 4) + poison).requires_grad_()
    loss = PredictionEntropyLoss(objective, bound=BOUNDS[objective])
    penalty = loss(logits, labels=torch.full((2, 3), -100))
    penalty.backward()
    assert penalty.item() == 0
    assert logits.grad.eq(0).all()
    assert loss.tap(logits, torch.zeros(2, 3, dtype=torch.bool))[2].item() == 0


@pytest.mark.parametrize("objective", BOUNDS)
def test_positions_left_out_leave_no_trace(objective: str) -> None:
    logits = torch.randn(3, 4)
    logits[1] = math.nan
    logits.requires_grad_()
    loss = PredictionEntropyLoss(objective, bound=BOUNDS[objective])
    penalty = loss(logits, labels=torch.tensor([0, -100, 3]))
    penalty.backward()
    torch.testing.assert_close(penalty, loss(logits[[0, 2]]))
    assert logits.grad[1].eq(0).all()
    assert torch.isfinite(logits.grad).all()


def test_labels_and_mask_choose_the_positions() -> None:
    logits = torch.randn(2, 3, 4)
    labels = torch.tensor([[5, -100, 2], [-100, 1, 9]])
    entropy = prediction_entropy(logits, normalize=True)

    def mean(*places: tuple[int, int]) -> Tensor:
        return torch.stack([entropy[place] for place in places]).mean()

    def loss(**arguments: int) -> PredictionEntropyLoss:
        return PredictionEntropyLoss("minimize", **arguments)

    torch.testing.assert_close(loss()(logits, labels=labels), mean((0, 0), (0, 2), (1, 1), (1, 2)))
    torch.testing.assert_close(loss(shift=True)(logits, labels=labels), mean((0, 1), (1, 0), (1, 1)))
    torch.testing.assert_close(loss(ignore_index=9)(logits, labels=labels), entropy.flatten()[:5].mean())
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    torch.testing.assert_close(loss()(logits, labels=labels, mask=mask), mean((0, 0), (1, 2)))


def make(*args, **kwargs) -> PredictionEntropyLoss:
    return PredictionEntropyLoss(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("maximise"), "`objective` must be one of maximize, .*, target, got 'maximise'"),
        (lambda: make("maximize", bound=0.5), "`bound` has no meaning for objective 'maximize', got 0.5; leave it out"),
        (lambda: make("floor"), "`bound` of objective 'floor' must be a number >= 0, got None"),
        (lambda: make("ceiling", bound=-0.1), "`bound` of objective 'ceiling' must be a number >= 0, got -0.1"),
        (lambda: make("target", bound=math.nan), "must be a number >= 0, got nan"),
        (lambda: make("target", bound=math.inf, normalize=False), "must be a number >= 0, got inf"),
        (lambda: make("floor", bound=True), "must be a number >= 0, got True"),
        (lambda: make("floor", bound=1.5), "`bound` of a normalised entropy must be <= 1, got 1.5; set `normalize="),
        (lambda: make()(torch.ones(2, 3), mask=torch.ones(3)), "`mask` must have the shape of `x` without its last"),
        (lambda: make()(torch.ones(2, 1)), "`logits` must have at least 2 classes, got 1; set `multi_label=True`"),
        (lambda: make()(torch.tensor(1.0)), "`logits` must be floating point of shape"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bound_in_nats_and_repr() -> None:
    assert make("floor", bound=3, normalize=False).bound == 3.0
    assert repr(make("floor", bound=0.5)) == (
        "PredictionEntropyLoss('floor', bound=0.5, multi_label=False, normalize=True, ignore_index=-100, shift=False)"
    )
