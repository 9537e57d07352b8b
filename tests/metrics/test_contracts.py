"""What holds for every metric: batches equal the whole, two processes equal one, states keep their type."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_reg.metrics import (
    CETT,
    ActivationDensity,
    AttentionEntropy,
    AttentionSupport,
    ChunkDensity,
    DeadNeurons,
    EffectiveRank,
    LRSensitivity,
    MassiveActivations,
    ReuseRatio,
    SpectralNorm,
    WeightSparsity,
)

Make = Callable[[], Metric]
Updates = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _attention() -> Updates:
    shapes = [(2, 3, 4, 5), (1, 3, 2, 7), (3, 3, 6, 1), (2, 3, 1, 9)]
    return [
        ((torch.randn(b, h, m, 4), torch.randn(b, h, n, 4)), {"attn_mask": torch.rand(b, 1, m, n) > 0.2})
        for b, h, m, n in shapes
    ]


def _scores() -> Updates:
    return [
        ((scores,), {}) for scores in (torch.randn(2, 3, 5), torch.randn(4, 3, 8), torch.randn(3, 1), torch.ones(1, 4))
    ]


def _activations() -> Updates:
    return [((torch.randn(n, 6).relu(),), {"mask": torch.rand(n) > 0.3}) for n in (4, 1, 7, 3)]


def _normal() -> Updates:
    return [((torch.randn(n, 6),), {"mask": torch.rand(n) > 0.3}) for n in (4, 3, 7, 3)]


def _sequences() -> Updates:
    shapes = [(2, 5), (1, 9), (3, 1), (2, 4)]
    return [((torch.randn(*shape, 6).relu(),), {"documents": torch.randint(0, 3, shape)}) for shape in shapes]


def _projections() -> Updates:
    weight = torch.randn(3, 6)
    return [((torch.randn(n, 6).relu(), weight.clone()), {"mask": torch.arange(n) != 1}) for n in (4, 1, 7, 3)]


def _weights() -> Updates:
    return [((torch.randn(4, 6),), {}) for _ in range(4)]


def _sparse_weights() -> Updates:
    return [((torch.randn(n, 6).relu(),), {}) for n in (4, 1, 7, 3)]


def _learning_rates() -> Updates:
    # a part of the grid, all of it, one run, and a seed more
    rates = [torch.tensor(x) for x in ([1e-3, 1e-1], [1e-1, 1e-2, 1e-3], [1e-2], [1e-3, 1e-2, 1e-1])]
    return [((rate, 3 * torch.rand(len(rate)), 2 + torch.rand(len(rate))), {}) for rate in rates]


CASES: dict[str, tuple[Make, Callable[[], Updates]]] = {
    "entropy": (AttentionEntropy, _attention),
    "entropy_nats": (lambda: AttentionEntropy(normalize=False), _attention),
    "entropy_heads": (lambda: AttentionEntropy(num_heads=3), _attention),
    "entropy_scores": (lambda: AttentionEntropy("scores", top_k=3), _scores),
    "support": (lambda: AttentionSupport("scores"), _scores),
    "effective": (lambda: AttentionSupport("scores", measure="effective"), _scores),
    "effective_rank": (EffectiveRank, _sparse_weights),
    "massive": (MassiveActivations, _normal),
    "density": (ActivationDensity, _activations),
    "density_threshold": (lambda: ActivationDensity(threshold=0.5), _activations),
    "density_relative": (lambda: ActivationDensity(relative=0.1), _activations),
    "chunk_density": (lambda: ChunkDensity(chunk=3), _sequences),
    "reuse_ratio": (ReuseRatio, _sequences),
    "dead_neurons": (lambda: DeadNeurons(threshold=0.8), _activations),
    "cett": (CETT, _projections),
    "cett_thresholds": (lambda: CETT([0.5, 1.5]), _projections),
    "spectral": (SpectralNorm, _weights),
    "lr_sensitivity": (lambda: LRSensitivity([1e-3, 1e-2, 1e-1]), _learning_rates),
    "sparsity": (WeightSparsity, _sparse_weights),
    "spectral_weights": (lambda: SpectralNorm(num_weights=1), _weights),
}
ALL = pytest.mark.parametrize("case", CASES)


def run(metric: Metric, updates: Updates) -> Tensor:
    for args, kwargs in updates:
        metric.update(*args, **kwargs)
    return metric.compute()


@ALL
def test_order_and_split_of_batches_do_not_matter(case: str) -> None:
    make, data = CASES[case]
    updates = data()
    whole = run(make(), updates)
    assert whole.isfinite().all()
    torch.testing.assert_close(run(make(), updates[::-1]), whole)


@ALL
def test_forward_gives_the_batch_and_keeps_the_total(case: str) -> None:
    make, data = CASES[case]
    metric, updates = make(), data()
    for args, kwargs in updates:
        torch.testing.assert_close(metric(*args, **kwargs), run(make(), [(args, kwargs)]), equal_nan=True)
    torch.testing.assert_close(metric.compute(), run(make(), updates))


@ALL
def test_compute_is_pure(case: str) -> None:
    make, data = CASES[case]
    metric, updates = make(), data()
    first = run(metric, updates[:2])
    metric._computed = None
    assert torch.equal(metric.compute(), first)
    torch.testing.assert_close(run(metric, updates[2:]), run(make(), updates))


@ALL
def test_nothing_counted_is_nan(case: str) -> None:
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert CASES[case][0]().compute().isnan().all()


@ALL
def test_reset_forgets(case: str) -> None:
    make, data = CASES[case]
    metric = make()
    run(metric, data())
    metric.reset()
    updates = data()
    torch.testing.assert_close(run(metric, updates), run(make(), updates))


@ALL
def test_copies_go_their_own_way(case: str) -> None:
    make, data = CASES[case]
    updates = data()
    metric = make()
    before = run(metric, updates[:1])
    copies = [metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))]
    for copied in copies:
        torch.testing.assert_close(run(copied, updates[1:]), run(make(), updates))
    torch.testing.assert_close(metric.compute(), before, equal_nan=True)


@ALL
def test_checkpoints_stay_clean(case: str) -> None:
    make, data = CASES[case]
    metric = make()
    run(metric, data())
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == []


@ALL
@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "to", "set_dtype"])
def test_states_keep_their_type_when_the_parent_is_converted(case: str, convert: str) -> None:
    make, data = CASES[case]
    parent = nn.ModuleDict({"metric": make(), "layer": nn.Linear(2, 2)})
    metric, updates = parent["metric"], data()
    run(metric, updates[:2])
    if convert == "set_dtype":
        metric.set_dtype(torch.bfloat16)
    elif convert == "to":
        parent.to(torch.bfloat16)
    else:
        getattr(parent, convert)()
    for name in metric._defaults:
        assert getattr(metric, name).dtype == make()._defaults[name].dtype
        assert getattr(metric, name).dtype in (torch.float64, torch.int64)
    torch.testing.assert_close(run(metric, updates[2:]), run(make(), updates))


@ALL
def test_states_move_to_another_device(case: str) -> None:
    metric = CASES[case][0]()
    metric.to("meta")
    for name, default in metric._defaults.items():
        assert getattr(metric, name).device.type == default.device.type == "meta"
    assert metric.device.type == "meta"


@ALL
def test_no_graph_is_kept(case: str) -> None:
    make, data = CASES[case]
    metric = make()
    for args, kwargs in data():
        value = metric(*(arg.requires_grad_() for arg in args), **kwargs)
        assert not value.requires_grad
    assert not any(getattr(metric, name).requires_grad for name in metric._defaults)


@ALL
def test_annotations_name_the_states(case: str) -> None:
    metric = CASES[case][0]()
    assert set(type(metric).__annotations__) >= set(metric._defaults)
    assert (metric.is_differentiable, metric.higher_is_better, metric.full_state_update) == (False, None, False)


@ALL
def test_result_is_float32(case: str) -> None:
    make, data = CASES[case]
    assert run(make(), data()).dtype == torch.float32


@ALL
def test_plot_draws_one_value_and_many(case: str) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    make, data = CASES[case]
    metric = make()
    values = [metric(*args, **kwargs) for args, kwargs in data()]
    for drawn in (metric.plot(), metric.plot(values[:2]), metric.plot(values[0], ax=pyplot.figure().add_subplot())):
        assert drawn[1] is not None
    pyplot.close("all")


def test_collections_pass_each_its_arguments() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    collection = MetricCollection({"mean": AttentionEntropy(), "nats": AttentionEntropy(normalize=False)})
    result = collection(query, key, is_causal=True)
    assert set(result) == {"mean", "nats"}
    torch.testing.assert_close(result["mean"], AttentionEntropy()(query, key, is_causal=True))


@pytest.mark.parametrize(
    ("first", "second", "batches"),
    [
        (ActivationDensity(), ActivationDensity(threshold=0.5), [torch.ones(2, 4), torch.full((2, 4), 0.1)]),
        (ActivationDensity(), ActivationDensity(relative=0.5), [torch.ones(2, 4), torch.arange(8.0).view(2, 4) + 1]),
        (ChunkDensity(2), ChunkDensity(3), [torch.ones(2, 4), torch.eye(3)]),
        (ChunkDensity(), ChunkDensity(threshold=0.5), [torch.ones(2, 4), torch.full((2, 4), 0.1)]),
        (ReuseRatio(), ReuseRatio(threshold=0.5), [torch.ones(2, 4), torch.tensor([[0.1], [1.0]])]),
        (DeadNeurons(), DeadNeurons(threshold=0.5), [torch.zeros(2, 4), torch.full((2, 4), 0.1)]),
    ],
)
def test_collections_do_not_share_what_looks_alike_in_the_first_batch(
    first: Metric, second: Metric, batches: list[Tensor]
) -> None:
    collection = MetricCollection({"first": first.clone(), "second": second.clone()})
    for x in batches:
        for metric in (collection, first, second):
            metric.update(x)
    expected = {"first": first.compute(), "second": second.compute()}
    torch.testing.assert_close(collection.compute(), expected, equal_nan=True)
    assert expected["first"] != expected["second"]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for case, (make, _) in CASES.items():
            updates = torch.load(f"{folder}/{case}.pt")
            metric = make()
            value = run(metric, updates[rank::2])
            torch.save(value, f"{folder}/{case}.{rank}.out")
            # ranks may hold different numbers of batches, or none that counts
            metric.reset()
            torch.save(run(metric, updates if rank == 0 else updates[:1]), f"{folder}/{case}.{rank}.uneven")
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    data = {case: updates() for case, (_, updates) in CASES.items()}
    for case, updates in data.items():
        torch.save(updates, tmp_path / f"{case}.pt")
    torch.multiprocessing.start_processes(_worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for case, (make, _) in CASES.items():
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"{case}.{rank}.out"), run(make(), data[case]))
            uneven = run(make(), [*data[case], data[case][0]])
            torch.testing.assert_close(torch.load(tmp_path / f"{case}.{rank}.uneven"), uneven)
