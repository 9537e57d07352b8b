"""The metric is the functional, over the neighbours of all batches."""

import pytest
import torch

from lightning_reg.functional import reuse_ratio
from lightning_reg.metrics import ReuseRatio


def test_batches_weigh_by_their_active_neurons() -> None:
    batches = [torch.randn(n, 7, 6).relu() for n in (1, 4, 2)]
    metric = ReuseRatio(threshold=0.3)
    for x in batches:
        metric.update(x)
    torch.testing.assert_close(metric.compute(), reuse_ratio(torch.cat(batches), threshold=0.3))


def test_batches_are_no_neighbours() -> None:
    metric = ReuseRatio()
    metric.update(torch.ones(1, 4))
    metric.update(torch.ones(1, 4))
    assert metric.compute().isnan()


def test_documents_arrive() -> None:
    x, documents = torch.randn(2, 9, 3).relu(), torch.randint(0, 3, (2, 9))
    expected = reuse_ratio(x, documents=documents)
    torch.testing.assert_close(ReuseRatio()(x, documents), expected)
    torch.testing.assert_close(ReuseRatio()(x, documents=documents), expected)


def test_sums_are_divided_once() -> None:
    metric = ReuseRatio()
    metric.update(torch.ones(2, 9))  # 9 of 9
    metric.update(torch.eye(2))  # 0 of 1
    assert metric.compute().item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReuseRatio(threshold=-1), "`threshold` must be >= 0, got -1"),
        (lambda: ReuseRatio().update(torch.ones(2, 3), torch.ones(2)), "`documents` must be boolean"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
