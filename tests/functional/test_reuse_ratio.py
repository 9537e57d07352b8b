"""The reuse ratio against numpy loops and hand-worked numbers."""

import math

import pytest
import torch
from torch import Tensor

from lightning_reg.functional import exact_density, reuse_ratio
from lightning_reg.functional.reuse_ratio import count_reuse


def reference(x: Tensor, threshold: float = 0.0, documents: Tensor | None = None) -> tuple[int, int]:
    """Sets of active neurons, token by token."""
    kept = active = 0
    documents = torch.ones(x.shape[:-1], dtype=torch.long) if documents is None else documents.long()
    for row, marks in zip(x.reshape(-1, *x.shape[-2:]).tolist(), documents.reshape(-1, x.shape[-2]).tolist()):
        sets = [{j for j, value in enumerate(token) if abs(value) > threshold} for token in row]
        for t in range(len(sets) - 1):
            if marks[t] == marks[t + 1] != 0:
                kept, active = kept + len(sets[t] & sets[t + 1]), active + len(sets[t + 1])
    return kept, active


@pytest.mark.parametrize("kind", ["none", "valid", "ids"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 7, 5), (2, 2, 1, 3), (2, 9, 1)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_counts_equal_a_loop(shape: tuple[int, ...], kind: str, threshold: float) -> None:
    x = torch.randn(shape).relu()
    documents = {"none": None, "valid": torch.rand(shape[:-1]) > 0.3, "ids": torch.randint(0, 3, shape[:-1])}[kind]
    counts = count_reuse(x, threshold=threshold, documents=documents)
    assert tuple(count.item() for count in counts) == reference(x, threshold, documents)
    assert all(count.dtype == torch.int64 for count in counts)


def test_hand_worked_numbers() -> None:
    # active: {0, 1}, {1, 2}, {1}: kept 1 of 2, then 1 of 1
    x = torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, 2.0], [0.0, 3.0, 0.0]])
    assert reuse_ratio(x).item() == pytest.approx(2 / 3)
    assert reuse_ratio(x, documents=torch.tensor([1, 1, 2])).item() == pytest.approx(1 / 2)
    assert reuse_ratio(x, documents=torch.tensor([True, False, True])) == 0


def test_a_packed_row_equals_its_documents_apart() -> None:
    x = torch.randn(9, 6).relu()
    packed = count_reuse(x, documents=torch.tensor([0, 5, 5, 5, 2, 2, 7, 0, 0]))
    parts = [count_reuse(part) for part in (x[1:4], x[4:6], x[6:7])]
    assert [count.item() for count in packed] == [sum(part[i].item() for part in parts) for i in range(2)]


def test_always_active_neurons_are_all_kept_and_alternating_ones_never() -> None:
    assert reuse_ratio(torch.ones(4, 3)) == 1
    assert reuse_ratio(torch.eye(2).repeat(3, 1)) == 0


def test_independent_neurons_give_the_density() -> None:
    x = (torch.rand(4, 500, 64) < 0.2).float()
    assert reuse_ratio(x).item() == pytest.approx(exact_density(x).item(), abs=0.01)


def test_no_neighbours_give_zero() -> None:
    for x in (torch.ones(3, 1, 4), torch.ones(3, 0, 4), torch.zeros(3, 5, 4), torch.ones(3, 5, 0)):
        assert reuse_ratio(x) == 0


def test_padding_may_hold_nan() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [math.nan, math.nan]])
    assert reuse_ratio(x, documents=torch.tensor([True, True, False])) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reuse_ratio(torch.ones(3)), r"`x` must have an axis of tokens before the last, .*, got \(3,\)"),
        (lambda: reuse_ratio(torch.ones(2, 3), threshold=-1.0), "`threshold` must be >= 0, got -1.0"),
        (lambda: reuse_ratio(torch.ones(2, 3), documents=torch.ones(3).long()), r"`documents` .* \(2,\), got \(3,\)"),
        (
            lambda: reuse_ratio(torch.ones(2, 3), documents=torch.ones(2)),
            r"`documents` must be boolean .* got torch.float32; use `documents.bool\(\)` or `.long\(\)`",
        ),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
