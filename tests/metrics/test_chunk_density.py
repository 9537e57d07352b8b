"""The metric is the functional, over the chunks of all batches."""

import pytest
import torch

from lightning_reg.functional import exact_chunk_density
from lightning_reg.metrics import ChunkDensity


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_batches_weigh_by_their_chunks(chunk: int) -> None:
    batches = [torch.randn(n, 7, 6).relu() for n in (1, 4, 2)]
    metric = ChunkDensity(chunk, threshold=0.3)
    for x in batches:
        metric.update(x)
    expected = exact_chunk_density(torch.cat(batches), chunk=chunk, threshold=0.3)
    torch.testing.assert_close(metric.compute(), expected)


def test_documents_arrive() -> None:
    x, documents = torch.randn(2, 9, 3).relu(), torch.tensor([[1, 1, 1, 2, 2, 0, 0, 3, 3], [0, 0, 4, 4, 4, 4, 4, 4, 4]])
    expected = exact_chunk_density(x, chunk=2, documents=documents)
    torch.testing.assert_close(ChunkDensity(2)(x, documents), expected)
    torch.testing.assert_close(ChunkDensity(2)(x, documents=documents), expected)


def test_hand_worked_numbers() -> None:
    # one chunk of two tokens and one of one: 2 and 1 of 2 neurons
    assert ChunkDensity(2)(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]])) == 0.75


def test_empty_update_changes_nothing() -> None:
    metric = ChunkDensity()
    metric.update(torch.zeros(0, 3, 4))
    metric.update(torch.ones(2, 3, 4), documents=torch.zeros(2, 3).long())
    assert metric.compute().isnan()
    metric.update(torch.ones(2, 3, 4))
    assert metric.compute() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChunkDensity(0), "`chunk` must be .* got 0"),
        (lambda: ChunkDensity(threshold=-1), "`threshold` must be >= 0, got -1"),
        (
            lambda: ChunkDensity().update(torch.ones(3)),
            r"`x` must have an axis of tokens before the last, .*, got \(3,\)",
        ),
        (lambda: ChunkDensity().update(torch.ones(2, 3), torch.ones(3).long()), r"`documents` .* got \(3,\)"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
