"""The metric is the functional, over the tokens of all batches and processes."""

import pytest
import torch
from torch import Tensor

from lightning_reg.functional import dead_neurons
from lightning_reg.metrics import DeadNeurons


def test_a_neuron_is_dead_only_if_it_is_in_all_batches() -> None:
    batches = [(torch.randn(n, 5, 16) - 1.5).relu() for n in (1, 2, 1)]
    masks = [torch.rand(x.shape[:-1]) > 0.5 for x in batches]
    metric = DeadNeurons(threshold=0.2)
    for x, mask in zip(batches, masks):
        metric.update(x, mask)
    expected = dead_neurons(torch.cat(batches), threshold=0.2, mask=torch.cat(masks))
    assert 0 < expected < min(dead_neurons(x, threshold=0.2, mask=mask) for x, mask in zip(batches, masks))
    torch.testing.assert_close(metric.compute(), expected)
    active = torch.cat(batches)[torch.cat(masks)] > 0.2
    torch.testing.assert_close(metric.active_rates(), active.float().mean(0))


def test_merged_states_equal_one_metric() -> None:
    batches = [(torch.randn(5, 16) - 1.5).relu() for _ in range(3)]
    whole, parts = DeadNeurons(), [DeadNeurons() for _ in batches]
    for part, x in zip(parts, batches):
        part.update(x)
        whole.update(x)
    empty = DeadNeurons()
    empty.update(torch.zeros(0, 16))
    for part in parts:
        empty.merge_state(part)
    assert empty.compute() == whole.compute()
    assert torch.equal(empty.active_rates(), whole.active_rates())
    fresh = DeadNeurons()
    fresh.merge_state(whole)
    assert torch.equal(fresh.firing, whole.firing)


@pytest.mark.parametrize("width", [1, 7])
def test_a_process_without_data_takes_part(width: int) -> None:
    """Two processes, the second of which saw nothing, by their gathered states."""
    x = (torch.randn(4, width) - 0.5).relu()
    full, idle = DeadNeurons(), DeadNeurons()
    full.update(x)
    none = torch.zeros(width, dtype=torch.int64)
    rounds = [[torch.tensor(width), torch.tensor(1)]]
    rounds += [[getattr(full, name), none if name == "firing" else getattr(idle, name)] for name in full._defaults]
    asked: list[Tensor] = []

    def gather(state: Tensor, group: object = None) -> list[Tensor]:
        answer = rounds[len(asked) % len(rounds)]
        asked.append(state)
        assert torch.equal(state, answer[1])
        return answer

    idle.dist_sync_fn, idle.distributed_available_fn = gather, lambda: True
    idle._update_count = 1
    assert idle.compute() == full.compute()
    assert torch.equal(idle.active_rates(), full.active_rates())
    assert idle.firing.tolist() == [0], "its own state is back"


def test_reset_forgets_the_width() -> None:
    metric = DeadNeurons()
    metric.update(torch.ones(2, 3))
    metric.reset()
    metric.update(torch.zeros(2, 5))
    assert metric.compute() == 1
    assert metric.active_rates().shape == (5,)


def test_empty_update_changes_nothing() -> None:
    metric = DeadNeurons()
    metric.update(torch.zeros(0, 4))
    metric.update(torch.ones(2, 4), mask=torch.zeros(2, dtype=torch.bool))
    assert metric.compute().isnan()
    assert metric.active_rates().isnan().all()
    metric.update(torch.eye(4)[:3])
    assert metric.compute() == 0.25


def test_counts_do_not_saturate() -> None:
    metric = DeadNeurons()
    metric.update(torch.ones(1, 3))
    metric.firing += 2**40
    metric.update(torch.ones(1, 3))
    assert metric.firing.tolist() == [2**40 + 2] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DeadNeurons(threshold=-1), "`threshold` must be >= 0, got -1"),
        (lambda: DeadNeurons().update(torch.ones(2, 3), torch.ones(3).bool()), r"`mask` .* got \(3,\)"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_another_width_is_refused() -> None:
    metric = DeadNeurons()
    metric.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`x` must keep its width, 3, got \(2, 4\): use one metric a layer"):
        metric.update(torch.ones(2, 4))
